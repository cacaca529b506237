"""A sweep as a table for the terminal and as plain data for sweep.json."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.rank.crossed import estimate
from rankwise.rank.sweep import FULL, Sweep
from rankwise.rank.verdict import achieved_power, margin_rule, notes, verdict


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    name: str
    parameters: int
    adapter_bytes: int
    peak_bytes: float
    seconds: float
    shared_by: tuple[str, ...]
    """Ranks whose runs shared passes with these, so that time and memory are those of all together; empty: its own."""
    loss: float
    difference: float | None
    """To the largest rank (the reference), in nats; None for that one itself."""
    lower: float | None
    upper: float | None
    outcome: str


def lines(sweep: Sweep) -> list[Line]:
    """Base, ranks in ascending order, full fine-tuning."""
    c = sweep.comparisons
    compared = {r.rank: r for r in c.ranks}
    result = []
    for rank in sorted(sweep.losses, key=lambda rank: (rank == FULL, rank)):
        cost = sweep.costs[rank]
        difference = lower = upper = None
        outcome = "reference" if rank == c.reference else ""
        if rank in compared:
            r = compared[rank]
            difference, lower, upper = r.difference, r.lower, r.upper
            outcome = r.outcome if sweep.answers else ""
        elif rank == FULL:
            full = estimate(sweep.losses[FULL] - sweep.losses[c.reference], sweep.counts)
            difference, lower, upper = full.mean, full.lower, full.upper
        loss = float(sweep.losses[rank].sum() / (len(sweep.seeds) * sweep.counts.sum()))
        result.append(
            Line(
                sweep.label(rank),
                cost.parameters,
                cost.adapter_bytes,
                cost.peak_bytes,
                cost.seconds,
                tuple(map(sweep.label, cost.shared_by)),
                loss=loss,
                difference=difference,
                lower=lower,
                upper=upper,
                outcome=outcome,
            )
        )
    return result


def table(sweep: Sweep) -> str:
    """The table of the terminal; the largest rank (the first value) is what all others are compared with."""
    axis = "rank" if sweep.ordered else sweep.axis
    reference = sweep.name(sweep.comparisons.reference)
    rows = [(axis, "trained", "MB", "peak GB", "s/run", "loss", f"to {reference}", interval_name(sweep), "")]
    for line in lines(sweep):
        interval = "" if line.lower is None or line.upper is None else f"{line.lower:+.4f} to {line.upper:+.4f}"
        difference = "" if line.difference is None else f"{line.difference:+.4f}"
        size, peak = (f"{size:.2f}" if size else "" for size in (line.adapter_bytes / 1e6, line.peak_bytes / 1e9))
        together = "+" if line.shared_by else ""
        cost = f"{line.parameters:,}", size, peak and peak + together, f"{line.seconds:.1f}{together}"
        rows.append((line.name, *cost, f"{line.loss:.4f}", difference, interval, line.outcome))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column < 7 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def interval_name(sweep: Sweep) -> str:
    """What the interval between both one-sided bounds covers."""
    return sweep.comparisons.ranks[0].beyond_margin.interval_name


def as_dict(sweep: Sweep) -> dict[str, Any]:
    """Everything that was measured, for sweep.json: all paired differences too, in nats, summed by example."""
    c = sweep.comparisons
    reference = sweep.losses[c.reference]
    return {
        "verdict": verdict(sweep),
        "notes": notes(sweep),
        "axis": sweep.axis,
        "sufficient_rank": sweep.taken,
        "at_least": sweep.at_least,
        "reference": sweep.label(c.reference),
        "margin": c.margin if sweep.answers else None,
        "margin_rule": margin_rule(sweep) if sweep.answers else None,
        "saturates": sweep.answers and c.saturates and sweep.ordered,
        "achieved_power": achieved_power(sweep) if sweep.answers else None,
        "seeds": list(sweep.seeds),
        "examples": len(sweep.counts),
        "ranks": [asdict(line) for line in lines(sweep)],
        "variance_components": {sweep.label(r.rank): asdict(r.beyond_margin.components) for r in c.ranks},
        "rate_factors": {sweep.label(rank): factor for rank, factor in sweep.factors.items()},
        # A rate at which the training went astray has no loss.
        "rate_checks": {
            sweep.label(check.rank): {
                factor: loss if math.isfinite(loss) else None for factor, loss in check.losses.items()
            }
            for check in sweep.rate_checks
        },
        "counts": sweep.counts.tolist(),
        "differences": {
            sweep.label(rank): (losses - reference).round(6).tolist()
            for rank, losses in sweep.losses.items()
            if rank != c.reference
        },
    }
