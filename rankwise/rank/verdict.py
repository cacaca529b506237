"""What a sweep says, in words: which rank to take, how sure that is, or what would be needed to tell."""

from rankwise.rank.compare import SHARE, Comparison
from rankwise.rank.crossed import POWER, needed
from rankwise.rank.sweep import BASE, Sweep

SCOPE = (
    "A sufficient rank belongs to this task, this amount of data, these modules and this recipe; "
    "with other ones it may be another."
)
SCOPE_OF_SETTING = "The answer belongs to this task, this amount of data, this rank and the other settings."


def verdict(sweep: Sweep) -> str:
    """Which rank to take and how sure that is, or that the data cannot tell and what could, in one or two sentences."""
    c = sweep.comparisons
    if not learned(sweep):
        return (
            f"These data cannot tell any {'rank' if sweep.ordered else sweep.axis}: {sweep.name(c.reference)} has not "
            f"lowered the held-out loss beyond chance "
            f"(by {c.gain.mean:.4f} nats, 90 % interval {c.gain.lower:.4f} to {c.gain.upper:.4f}). "
            "Train longer, or with another --lr."
        )
    if not sweep.ordered:
        return _of_setting(sweep)
    below = c.below
    if c.sufficient != c.reference:
        passed = c.of(c.sufficient)
        take = (
            f"Take r = {passed.rank}: with 95 % confidence its held-out loss is at most {_above(passed.upper)} that "
            f"of r = {c.reference}, within the margin of {c.margin:.4f}"
        )
        return f"{take}. {_saturation(sweep)}{_why_not_less(below)}"
    assert below is not None
    if below.outcome == "worse":
        return (
            f"Take r = {c.reference} or more: r = {below.rank} is worse by {below.difference:.4f} nats, which is more "
            f"than the margin of {c.margin:.4f} (95 %). The loss still falls at the largest rank; try larger ones."
        )
    return (
        f"These data cannot tell whether less than r = {c.reference} suffices: r = {below.rank} is worse by "
        f"{below.difference:.4f} nats, 90 % interval {below.lower:.4f} to {below.upper:.4f}, and the margin is "
        f"{c.margin:.4f}; {_more_for(below)}."
    )


def _of_setting(sweep: Sweep) -> str:
    """Which value of a setting to take, and how each of the others compares with the reference."""
    c = sweep.comparisons
    reference, costs = sweep.name(c.reference), sweep.costs
    better = [found for found in c.ranks if found.upper < 0]
    smaller = [
        found
        for found in c.ranks
        if found.outcome == "passes" and costs[found.rank].parameters < costs[c.reference].parameters
    ]
    if better:
        taken = min(better, key=lambda found: found.loss)
        lead = (
            f"Take {sweep.name(taken.rank)}: its held-out loss is at least {-taken.upper:.4f} nats below that of "
            f"{reference}, the reference (95 % for all comparisons together)."
        )
    elif smaller:
        taken = min(smaller, key=lambda found: costs[found.rank].parameters)
        times = costs[c.reference].parameters / costs[taken.rank].parameters
        lead = (
            f"Take {sweep.name(taken.rank)}: it trains {times:.1f} times fewer numbers than {reference}, the "
            f"reference, and is {_against(taken, c.margin)} (95 % for all comparisons together)."
        )
    else:
        taken = None
        lead = f"Stay with {reference}: no other value is shown to be better, or as good with fewer trained numbers."
    return " ".join(
        [lead, *(f"{sweep.name(found.rank)} is {_against(found, c.margin)}." for found in c.ranks if found != taken)]
    )


def _against(found: Comparison, margin: float) -> str:
    if found.upper < 0:
        return f"better, by at least {-found.upper:.4f} nats"
    if found.outcome == "worse":
        return f"worse by {found.difference:.4f} nats, more than the margin of {margin:.4f}"
    if found.outcome == "passes":
        return f"not worse: by at most {found.upper:.4f} nats, and the margin is {margin:.4f}"
    return (
        f"an open question: {found.difference:+.4f} nats, interval {found.lower:+.4f} to {found.upper:+.4f}, and the "
        f"margin is {margin:.4f}; {_more_for(found)}"
    )


def learned(sweep: Sweep) -> bool:
    """Whether the largest rank lowered the loss at all, with 95 % confidence; if not, nothing can be said on ranks."""
    return sweep.comparisons.gain.lower > 0


def _above(bound: float) -> str:
    return f"{bound:.4f} nats above" if bound >= 0 else f"{-bound:.4f} nats below (better)"


def _saturation(sweep: Sweep) -> str:
    c = sweep.comparisons
    if not c.saturates:
        return ""
    return f"From there to r = {c.reference} the loss saturates: all are equivalent within the margin. "


def _why_not_less(below: Comparison | None) -> str:
    if below is None:
        return "It is the smallest rank that was tried."
    if below.outcome == "worse":
        return f"r = {below.rank} is worse by {below.difference:.4f} nats, more than the margin (95 %)."
    return f"Whether r = {below.rank} would do, these data cannot tell; {_more_for(below)}."


def _more_for(comparison: Comparison) -> str:
    over = comparison.beyond_margin
    seeds, examples = needed(over, abs(over.mean))
    ways = []
    if seeds:
        ways.append(f"about {max(1, seeds - over.seeds)} more seeds")
    if examples:
        ways.append(f"about {max(1, examples - over.examples):,} more held-out examples")
    return f"{' or '.join(ways)} would" if ways else "neither more seeds nor more examples within reason would"


def margin_rule(sweep: Sweep) -> str:
    """How the margin came about."""
    c = sweep.comparisons
    if sweep.margin_is_share:
        return f"δ = {c.margin:.4f} nats, {SHARE:.0%} of what {sweep.name(c.reference)} gains over the base"
    return f"δ = {c.margin:.4f} nats, as asked"


def achieved_power(sweep: Sweep) -> float:
    """How often this sweep would have passed a rank that is exactly as good as the largest.

    By the variances found at the next smaller rank, which is the nearest to being as good. For a setting: of the value
    that differs most from seed to seed and example to example.
    """
    c = sweep.comparisons
    size = len(sweep.seeds), len(sweep.counts)
    over = [found.beyond_margin for found in (c.ranks[-1:] if sweep.ordered else c.ranks)]
    return min(found.components.power(c.margin, *size, found.confidence) for found in over)


def notes(sweep: Sweep) -> list[str]:
    """What a reader must know beside the verdict."""
    c = sweep.comparisons
    lines = [f"{len(sweep.seeds)} seeds, {len(sweep.counts):,} held-out examples."]
    if learned(sweep):
        power = achieved_power(sweep)
        weak = "" if power >= POWER else f" Below {POWER:.0%}, an open question is no sign that a rank is worse."
        lines[0] = f"{margin_rule(sweep)}; {lines[0]}"
        lines.append(
            f"A {'rank' if sweep.ordered else 'value'} exactly as good as {sweep.name(c.reference)} would have passed "
            f"in {power:.0%} of such sweeps.{weak}"
        )
    lines += _rates(sweep)
    full = sweep.against_full
    if full is not None:
        passes = full.upper < c.margin
        lines.append(
            f"r = {c.sufficient} against full fine-tuning: {full.mean:+.4f} nats, 90 % interval {full.lower:+.4f} to "
            f"{full.upper:+.4f}; a loss beyond δ is {'ruled out (95 %)' if passes else 'not ruled out'}."
        )
    if not sweep.ordered:
        sure = c.ranks[0].beyond_margin.confidence
        lines.append(f"Each bound is one-sided, of {sure:.1%}, so that all together hold with 95 % (Bonferroni).")
        return [*lines, SCOPE_OF_SETTING]
    return [*lines, SCOPE]


def _rates(sweep: Sweep) -> list[str]:
    """What the check of the learning rate found."""
    lines = []
    for factor in sorted({check.best for check in sweep.rate_checks}):
        checks = [check for check in sweep.rate_checks if check.best == factor]
        names = ", ".join("the base's head" if check.rank == BASE else sweep.name(check.rank) for check in checks)
        if factor == 1:
            lines.append(f"Learning rate: neither a third nor three times of it was better at {names}.")
        else:
            beyond = "; the best may lie beyond" if any(check.at_the_edge for check in checks) else ""
            lines.append(f"Learning rate: × {factor:.2g} was better at {names} and is used there{beyond}.")
    return lines
