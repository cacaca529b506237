"""report.html: a run on one page that needs no other file. Ten seconds should tell whether the run worked."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2 import Environment, PackageLoader

from rankwise.lora.report import TrainedUpdate
from rankwise.train.chart import Chart, Series, draw
from rankwise.train.loop import Step

MOST_MATRICES, MOST_TEXT, MOST_SETTING = 1000, 1500, 500
"""Rows of the table of matrices, characters of a sample's text and of a setting: the page stays below 1 MB."""
BARS = 16
"""Singular values drawn of a matrix."""
TRAINED, HELD_OUT, OTHER = "#7a9", "#a20", "#357"
"""Colours."""


@dataclass(frozen=True)
class Verdict:
    """The page's first sentence."""

    kind: str
    """good, bad or open"""
    text: str


def render_report(
    settings: dict[str, Any],
    result: dict[str, Any],
    steps: Sequence[Step],
    data: str = "",
    updates: Sequence[TrainedUpdate] = (),
) -> str:
    """The page: verdict, curves, metrics, samples, cost, data, spectra, settings and all of result.json."""
    template = Environment(loader=PackageLoader("rankwise.train", "."), autoescape=True).get_template("report.html.j2")
    shown = {"metrics_before", "metrics_after", "samples"}
    return template.render(
        verdict=verdict(result, steps),
        settings={name: str(value)[:MOST_SETTING] for name, value in settings.items()},
        result={name: str(value)[:MOST_SETTING] for name, value in result.items() if name not in shown},
        charts=[chart for chart in _charts(result, steps) if chart],
        metrics=_metrics(result),
        samples=[{name: _cut(name, text) for name, text in s.items()} for s in result.get("samples") or []],
        cost=_cost(result),
        data=data.splitlines(),
        updates=[(update, spectrum_bars(update.sigma)) for update in updates[:MOST_MATRICES]],
        more_updates=max(0, len(updates) - MOST_MATRICES),
        bars=BARS,
    )


def verdict(result: dict[str, Any], steps: Sequence[Step]) -> Verdict:
    """Whether the held-out rows show that the run worked. It is clear where the two 95 % intervals lie apart."""
    before, after = result["eval_loss_before"], result["eval_loss_after"]
    if after is None:
        trained = f"training loss {steps[0].loss:.4f} → {steps[-1].loss:.4f}" if steps else "no step was trained"
        if result["interrupted"]:
            return Verdict("open", f"Interrupted after {result['steps']} steps and not measured; {trained}.")
        return Verdict("open", f"Nothing was held out, so nothing shows whether it worked; {trained}.")
    facts = ", ".join(f"{name} {change}" for name, change in changes(result).items())
    if after >= before:
        return Verdict("bad", f"It did not learn: {facts}.")
    if cut := result.get("shrunk"):
        facts += (
            f"; some of these rows chose the ranks, and on {cut['rows']['confirmation']} others, which chose none, the "
            f"loss is {cut['loss_shrunk']:.4f} ({cut['loss_full']:.4f} before the cut)"
        )
    first, last = (result[f"metrics_{side}"].get("loss", {}) for side in ("before", "after"))
    if None in (first.get("lower"), last.get("upper")) or last["upper"] >= first["lower"]:
        return Verdict("open", f"A small gain, or chance in the choice of rows: {facts}.")
    return Verdict("good", f"It learned: {facts}.")


def changes(result: dict[str, Any]) -> dict[str, str]:
    """What became of the loss on the held-out rows, which a result has measured, and of the task's metric, by name."""
    before, after = result["eval_loss_before"], result["eval_loss_after"]
    share = f" ({after / before - 1:+.1%})" if before else ""
    found = {"held-out loss": f"{before:.4f} → {after:.4f}{share} on {result['eval_rows']:,} rows"}
    if result["metric_after"] is not None:
        name = result["metric_name"].replace("_", " ")
        found[name] = f"{result['metric_before']:.1%} → {result['metric_after']:.1%}"
    return found


def spectrum_bars(sigma: Sequence[float]) -> str:
    """The first singular values beside the largest, which comes first, as an SVG path 4·BARS wide and 16 high."""
    if not sigma or not sigma[0]:
        return ""
    heights = [round(16 * value / sigma[0], 1) for value in sigma[:BARS]]
    return "".join(f"M{4 * index} 16v-{height:g}h3v{height:g}z" for index, height in enumerate(heights))


def _charts(result: dict[str, Any], steps: Sequence[Step]) -> list[Chart | None]:
    held_out = [(step.number, step.eval_loss) for step in steps if step.eval_loss is not None]
    ends = ((0, result["eval_loss_before"]), (result["adapter_step"], result["eval_loss_after"]))
    # The last evaluation measures the kept adapter, whose step may have been measured while training.
    known = dict([(step, loss) for step, loss in ends if loss is not None] + held_out)
    seconds = [0.0, *(step.seconds for step in steps)]
    speeds = [
        (step.number, step.tokens / (now - before))
        for step, (before, now) in zip(steps, pairwise(seconds), strict=True)
        if now > before
    ]
    return [
        draw(
            "loss (nats)",
            [
                Series("training, a step", [(step.number, step.loss) for step in steps], TRAINED),
                Series("held out", sorted(known.items()), HELD_OUT, dots=True),
            ],
        ),
        draw("learning rate", [Series("", [(step.number, step.learning_rate) for step in steps], OTHER)]),
        draw("useful tokens a second", [Series("", speeds, OTHER)]),
    ]


def _metrics(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, before, after) of each metric."""
    before, after = result.get("metrics_before") or {}, result.get("metrics_after") or {}
    return [(name.replace("_", " "), _estimate(before[name]), _estimate(after.get(name))) for name in before]


def _estimate(found: dict[str, float] | None) -> str:
    if found is None:
        return "–"
    bounds = "" if found["lower"] is None else f" ({found['lower']:.4g} to {found['upper']:.4g})"
    return f"{found['value']:.4g}{bounds}"


def _cost(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, predicted, measured)"""
    predicted = result["predicted_seconds"], result["predicted_peak_memory_bytes"]
    speed = result["useful_tokens_per_second"]
    return [
        ("training time", f"{predicted[0]:.0f} s" if predicted[0] else "–", f"{result['seconds']:.0f} s"),
        ("peak memory", _gigabytes(predicted[1]), _gigabytes(result["peak_memory_bytes"])),
        ("useful tokens a second", "–", f"{speed:.0f}" if speed else "–"),
        ("trained numbers", f"{result['trainable_parameters']:,}", f"of {result['total_parameters']:,}"),
    ]


def _gigabytes(count: int | None) -> str:
    return f"{count / 1e9:.2f} GB" if count else "–"


def _cut(name: str, text: str | None) -> str:
    """A sample's text of bearable length; of a prompt the end, where the question usually is."""
    if text is None:
        return "–"
    if len(text) <= MOST_TEXT:
        return text
    return f"… {text[-MOST_TEXT:]}" if name == "prompt" else f"{text[:MOST_TEXT]} …"
