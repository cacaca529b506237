"""A sweep as a table for the terminal, as plain data for sweep.json, and as one page that needs no other file."""

from dataclasses import asdict, dataclass
from typing import Any

from jinja2 import Environment, PackageLoader

from rankwise.rank.crossed import estimate
from rankwise.rank.sweep import BASE, FULL, Sweep
from rankwise.rank.verdict import achieved_power, learned, margin_rule, notes, verdict

WIDTH, HEIGHT, LEFT = 640, 260, 60
"""Of the plot, in the drawing's own units; LEFT is the room for the axis."""


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    name: str
    parameters: int
    seconds: float
    loss: float
    difference: float | None
    """To the largest rank, in nats; None for that rank itself."""
    lower: float | None
    upper: float | None
    outcome: str


def lines(sweep: Sweep) -> list[Line]:
    """Base, ranks in ascending order, full fine-tuning."""
    c = sweep.comparisons
    compared = {r.rank: r for r in c.ranks}
    result = []
    for rank in sorted(sweep.losses, key=lambda rank: (rank == FULL, rank)):
        cost = sweep.parameters[rank], sweep.seconds[rank]
        loss = float(sweep.losses[rank].sum() / (len(sweep.seeds) * sweep.counts.sum()))
        if rank in compared:
            r = compared[rank]
            bounds = r.difference, r.lower, r.upper
            result.append(Line(str(rank), *cost, loss, *bounds, r.outcome if learned(sweep) else ""))
        elif rank == FULL:
            full = estimate(sweep.losses[FULL] - sweep.losses[c.reference], sweep.counts)
            result.append(Line("full", *cost, loss, full.mean, full.lower, full.upper, ""))
        else:
            name = "base" if rank == BASE else str(rank)
            outcome = "" if rank == BASE else "reference"
            result.append(Line(name, *cost, loss, None, None, None, outcome))
    return result


def table(sweep: Sweep) -> str:
    """The table of the terminal; the largest rank is what all others are compared with."""
    rows = [("rank", "trained", "s/run", "loss", f"to r = {sweep.comparisons.reference}", "90 % interval", "")]
    for line in lines(sweep):
        interval = "" if line.lower is None or line.upper is None else f"{line.lower:+.4f} to {line.upper:+.4f}"
        difference = "" if line.difference is None else f"{line.difference:+.4f}"
        cost = f"{line.parameters:,}", f"{line.seconds:.1f}"
        rows.append((line.name, *cost, f"{line.loss:.4f}", difference, interval, line.outcome))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column < 5 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def as_dict(sweep: Sweep) -> dict[str, Any]:
    """Everything that was measured, for sweep.json: all paired differences too, in nats, summed by example."""
    c = sweep.comparisons
    reference = sweep.losses[c.reference]
    return {
        "verdict": verdict(sweep),
        "notes": notes(sweep),
        "sufficient_rank": c.sufficient if learned(sweep) else None,
        "reference_rank": c.reference,
        "margin": c.margin,
        "margin_rule": margin_rule(sweep),
        "saturates": c.saturates,
        "achieved_power": achieved_power(sweep),
        "seeds": list(sweep.seeds),
        "examples": len(sweep.counts),
        "ranks": [asdict(line) for line in lines(sweep)],
        "variance_components": {r.rank: asdict(r.beyond_margin.components) for r in c.ranks},
        "rate_factors": {_key(rank): factor for rank, factor in sweep.factors.items()},
        "rate_checks": {_key(check.rank): check.losses for check in sweep.rate_checks},
        "counts": sweep.counts.tolist(),
        "differences": {
            _key(rank): (losses - reference).round(6).tolist()
            for rank, losses in sweep.losses.items()
            if rank != c.reference
        },
    }


def page(sweep: Sweep, settings: dict[str, Any]) -> str:
    """The HTML page: verdict, plot, table, settings."""
    template = Environment(loader=PackageLoader("rankwise.rank", "."), autoescape=True).get_template("sweep.html.j2")
    return template.render(
        verdict=verdict(sweep),
        notes=notes(sweep),
        lines=lines(sweep),
        reference=sweep.comparisons.reference,
        settings=settings,
        plot=_plot(sweep),
    )


def _key(rank: int) -> str:
    return {BASE: "base", FULL: "full"}.get(rank, str(rank))


def _plot(sweep: Sweep) -> dict[str, Any]:
    """Where everything lies in the drawing: ranks at equal distances (each is about twice the one before)."""
    c = sweep.comparisons
    ranks = sorted(rank for rank in sweep.losses if rank > 0)
    means = {r.rank: r.loss for r in c.ranks} | {c.reference: c.reference_loss}
    bounds = {r.rank: (c.reference_loss + r.lower, c.reference_loss + r.upper) for r in c.ranks}
    bounds[c.reference] = (c.reference_loss, c.reference_loss)
    limit = c.reference_loss + c.margin
    seeds = {rank: sweep.losses[rank].sum(1) / sweep.counts.sum() for rank in ranks}
    values = [
        limit,
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
        "dots": [(xs[r], y(value)) for r in ranks for value in seeds[r]],
        "ticks": [(xs[r], r) for r in ranks],
        "limit": y(limit),
        "limit_value": limit,
        "chosen": (xs[c.sufficient], y(means[c.sufficient])),
        "sufficient": c.sufficient,
        "axis": [(y(value), value) for value in (highest, (highest + lowest) / 2, lowest)],
    }
