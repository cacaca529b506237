"""sweep.html: a sweep as one page that needs no other file. Ten seconds should tell which rank to take."""

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, Template

from rankwise.rank.illustrate import Illustrations
from rankwise.rank.report import interval_name, lines
from rankwise.rank.sweep import Sweep
from rankwise.rank.verdict import conclusion, notes

WIDTH, HEIGHT, LEFT = 640, 260, 60
"""Of the plot, in the drawing's own units; LEFT is the room for the axis."""
MOST_SETTING = 500
"""Characters of a setting that are shown."""


def page(sweep: Sweep, settings: dict[str, Any], illustrations: Illustrations | None = None) -> str:
    """The HTML page: verdict, plot, table, illustrations, settings."""
    (headline, reasons), table_lines = conclusion(sweep), lines(sweep)
    return _template("sweep.html.j2").render(
        headline=headline,
        reasons=reasons,
        clear=sweep.taken is not None if sweep.ordered else sweep.answers,
        notes=notes(sweep),
        lines=table_lines,
        shared=", ".join(dict.fromkeys(name for line in table_lines for name in line.shared_by)),
        settings={name: str(value)[:MOST_SETTING] for name, value in settings.items()},
        illustrations=illustrations or Illustrations(),
        shade=shade,
        margin_is_share=sweep.margin_is_share,
        **_drawn(sweep),
    )


def picture(sweep: Sweep) -> str:
    """The page's plot alone, as an SVG file."""
    return _template("curve.svg.j2").render(_drawn(sweep), alone=True)


def _template(name: str) -> Template:
    return Environment(loader=PackageLoader("rankwise.rank", "."), autoescape=True).get_template(name)


def _drawn(sweep: Sweep) -> dict[str, Any]:
    """What the plot shows."""
    return {
        "axis": "rank" if sweep.ordered else sweep.axis,
        "ordered": sweep.ordered,
        "reference": sweep.name(sweep.comparisons.reference),
        "interval": interval_name(sweep),
        "plot": _plot(sweep),
    }


def shade(value: float, values: Sequence[float | None]) -> str:
    """A cell's colour, from white for 0 to green for the largest of `values`."""
    largest = max((own for own in values if own is not None), default=0.0)
    return f"rgba(0, 170, 102, {min(1.0, value / largest) if largest > 0 else 0:.2f})"


def _plot(sweep: Sweep) -> dict[str, Any]:
    """Where everything lies in the drawing: ranks at equal distances (each is about twice the one before)."""
    c = sweep.comparisons
    ranks = sorted(rank for rank in sweep.losses if rank > 0)
    means = {r.rank: r.loss for r in c.ranks} | {c.reference: c.reference_loss}
    bounds = {r.rank: (c.reference_loss + r.lower, c.reference_loss + r.upper) for r in c.ranks}
    bounds[c.reference] = (c.reference_loss, c.reference_loss)
    limit = c.reference_loss + c.margin if sweep.answers else None
    seeds = {rank: sweep.losses[rank].sum(1) / sweep.counts.sum() for rank in ranks}
    values = [
        *([] if limit is None else [limit]),
        *means.values(),
        *(v for pair in bounds.values() for v in pair),
        *(v for s in seeds.values() for v in s),
    ]
    lowest, highest = min(values), max(values)
    height = (highest - lowest) or 1.0
    xs = {rank: LEFT + WIDTH * (index + 0.5) / len(ranks) for index, rank in enumerate(ranks)}

    def y(value: float) -> float:
        return 10 + (HEIGHT - 20) * (highest - value) / height

    edge = [(xs[r], y(bounds[r][1])) for r in ranks] + [(xs[r], y(bounds[r][0])) for r in reversed(ranks)]
    return {
        "width": LEFT + WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "curve": " ".join(f"{xs[r]:.1f},{y(means[r]):.1f}" for r in ranks),
        "band": " ".join(f"{px:.1f},{py:.1f}" for px, py in edge),
        "bars": [(xs[r], y(bounds[r][1]), y(bounds[r][0])) for r in ranks],
        "means": [(xs[r], y(means[r])) for r in ranks],
        "dots": [(xs[r], y(value)) for r in ranks for value in seeds[r]],
        "ticks": [(xs[r], sweep.label(r), r == sweep.taken) for r in ranks],
        "limit": None if limit is None else y(limit),
        "chosen": None if sweep.taken is None else (xs[sweep.taken], y(means[sweep.taken])),
        "axis": [(y(value), value) for value in (highest, (highest + lowest) / 2, lowest)],
    }
