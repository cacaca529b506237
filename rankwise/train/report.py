"""report.html: a run on one page that needs no other file."""

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader

from rankwise.train.loop import Step

WIDTH, HEIGHT = 640, 200
"""Of the loss curve, in the drawing's own units."""


def render_report(settings: dict[str, Any], result: dict[str, Any], steps: Sequence[Step], matrices: str) -> str:
    """The page: result, loss curve, settings and the table of adapted matrices."""
    losses = [step.loss for step in steps] or [0.0]
    lowest, highest = min(losses), max(losses)
    height = (highest - lowest) or 1.0
    points = " ".join(
        f"{50 + WIDTH * index / max(1, len(losses) - 1):.1f},{HEIGHT * (highest - loss) / height:.1f}"
        for index, loss in enumerate(losses)
    )
    template = Environment(loader=PackageLoader("rankwise.train", "."), autoescape=True).get_template("report.html.j2")
    return template.render(
        settings=settings,
        result=result,
        points=points,
        steps=len(steps),
        lowest=lowest,
        highest=highest,
        width=WIDTH,
        height=HEIGHT,
        matrices=matrices,
    )
