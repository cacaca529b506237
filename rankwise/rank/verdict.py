"""What a sweep says, in words: which rank to take, how sure that is, or what would be needed to tell."""

from rankwise.rank.compare import MARGIN_SHARE_OF_GAIN, Comparison
from rankwise.rank.crossed import POWER, most_seeds_needed, needed
from rankwise.rank.sweep import BASE, Sweep

SCOPE = (
    "A sufficient rank belongs to this task, this amount of data, these modules and this recipe; "
    "with other ones it may be another."
)
HEAVY = 0.3
"""A row with this share of the squared deviations of all rows is remarked on."""
SCOPE_OF_SETTING = "The answer belongs to this task, this amount of data, this rank and the other settings."


def verdict(sweep: Sweep) -> str:
    """Which rank to take and how sure that is, or that the data cannot tell and what could, in one or two sentences."""
    return ": ".join(conclusion(sweep))


def conclusion(sweep: Sweep) -> tuple[str, str]:
    """The verdict in two parts: what to do, and why."""
    c = sweep.comparisons
    reference = sweep.name(c.reference)
    if not sweep.learned:
        return (
            f"These data cannot tell which {'rank suffices' if sweep.ordered else f'{sweep.axis} is better'}",
            f"{reference} has not lowered the held-out loss beyond chance "
            f"(by {c.gain.mean:.4f} nats, 90 % interval {c.gain.lower:.4f} to {c.gain.upper:.4f}). "
            "Train longer, or with another --lr.",
        )
    if c.gain.mean <= c.margin:
        return (
            f"The margin of {c.margin:.4f} nats asks nothing",
            f"{reference} gains {c.gain.mean:.4f} nats over the base, which would itself pass. Give a smaller --delta, "
            "or leave it out.",
        )
    if not sweep.ordered:
        return _of_setting(sweep)
    if c.better:
        best = min(c.better, key=lambda found: found.loss)
        return (
            f"{reference} is a poor reference, as {_names([f'r = {found.rank}' for found in c.better])} did better",
            f"r = {best.rank} by {-best.difference:.4f} nats ({best.jointly.interval_name} "
            f"{-best.jointly.upper:.4f} to {-best.jointly.lower:.4f}), by more than the margin of {c.margin:.4f} "
            "(95 % confidence for all ranks together). So it says little that others do as "
            f"well as the largest rank; check its training, or compare with r = {best.rank} as the largest.",
        )
    return _of_rank(sweep)


def _names(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _of_rank(sweep: Sweep) -> tuple[str, str]:
    c = sweep.comparisons
    below = c.below
    if sweep.taken is not None:
        passed = c.of(sweep.taken)
        return (
            f"Take r = {passed.rank}",
            f"with 95 % confidence its held-out loss exceeds that of r = {c.reference} by less than the margin of "
            f"{c.margin:.4f} nats (the difference is {_with_interval(passed, '90 % interval')}). "
            f"{_saturation(sweep)}{_why_not_less(below)}",
        )
    assert below is not None
    if sweep.at_least is not None:
        return (
            f"Take r = {c.reference} or more",
            f"r = {below.rank} is worse by {below.difference:.4f} nats, which is more than the margin of "
            f"{c.margin:.4f} (95 %). The loss still falls at the largest rank; try larger ones.",
        )
    return (
        f"These data cannot tell whether less than r = {c.reference} suffices",
        f"r = {below.rank} is {_by(below.difference)}, 90 % interval {below.lower:+.4f} to {below.upper:+.4f}, and "
        f"the margin is {c.margin:.4f}; {_more_for(below)}.",
    )


def _by(difference: float) -> str:
    """A difference of the mean losses, which may be nothing but chance."""
    return f"{'worse' if difference >= 0 else 'better'} by {abs(difference):.4f} nats in the mean"


def _of_setting(sweep: Sweep) -> tuple[str, str]:
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
        headline = f"Take {sweep.name(taken.rank)}"
        lead = (
            f"its held-out loss is at least {-taken.upper:.4f} nats below that of "
            f"{reference}, the reference (95 % for all comparisons together)."
        )
    elif smaller:
        taken = min(smaller, key=lambda found: costs[found.rank].parameters)
        times = costs[c.reference].parameters / costs[taken.rank].parameters
        headline = f"Take {sweep.name(taken.rank)}"
        lead = (
            f"it trains {times:.1f} times fewer numbers than {reference}, the "
            f"reference, and is {_against(taken, c.margin)} (95 % for all comparisons together)."
        )
    else:
        taken = None
        headline = f"Stay with {reference}"
        lead = "no other value is shown to be better, or as good with fewer trained numbers."
    others = (f"{sweep.name(found.rank)} is {_against(found, c.margin)}." for found in c.ranks if found != taken)
    return headline, " ".join([lead, *others])


def _against(found: Comparison, margin: float) -> str:
    if found.upper < 0:
        return f"better, by at least {-found.upper:.4f} nats"
    if found.outcome == "worse":
        return f"worse by {found.difference:.4f} nats, more than the margin of {margin:.4f}"
    if found.outcome == "passes":
        return f"not worse by more than the margin of {margin:.4f} nats ({_with_interval(found, 'interval')})"
    return (
        f"an open question: the difference is {_with_interval(found, 'interval')}, and the margin is {margin:.4f} "
        f"nats; {_more_for(found)}"
    )


def _with_interval(found: Comparison, interval: str) -> str:
    return f"{found.difference:+.4f}, {interval} {found.lower:+.4f} to {found.upper:+.4f}"


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
        ways.append(_more_seeds(seeds - over.seeds, most_seeds_needed(over, abs(over.mean)), over.seeds))
    if examples:
        more = max(1, examples - over.examples)
        ways.append(f"about {more:,} more held-out example{'s' * (more > 1)}")
    return f"{' or '.join(ways)} would" if ways else "neither more seeds nor more examples within reason would"


def _more_seeds(least: int, most: int | None, there: int) -> str:
    """A range, as so few seeds measure badly how much seeds differ."""
    least = max(1, least)
    if most is None:
        return f"at least {least} more seed{'s' * (least > 1)}"
    most = max(1, most - there)
    return f"{least} to {most} more seeds" if most > least else f"{least} more seed{'s' * (least > 1)}"


def margin_rule(sweep: Sweep) -> str:
    """How the margin came about."""
    c = sweep.comparisons
    if sweep.margin_is_share:
        return (
            f"δ = {c.margin:.4f} nats, {MARGIN_SHARE_OF_GAIN:.0%} of what {sweep.name(c.reference)} gains over the base"
        )
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
    lines = [f"{len(sweep.seeds)} seeds, {len(sweep.counts):,} held-out examples (rows that ask the same are one)."]
    if sweep.answers:
        power, kind = achieved_power(sweep), "rank" if sweep.ordered else "value"
        weak = "" if power >= POWER else f" Below {POWER:.0%}, an open question is no sign that a {kind} is worse."
        lines[0] = f"{margin_rule(sweep)}; {lines[0]}"
        lines.append(
            f"A {kind} exactly as good as {sweep.name(c.reference)} would have passed "
            f"in {power:.0%} of such sweeps.{weak}"
        )
        lines += _otherwise_than_the_interval(sweep)
    lines += [*_heavy_rows(sweep), *_rates(sweep), *_shared(sweep), *_full(sweep)]
    if not sweep.ordered:
        sure = c.ranks[0].beyond_margin.confidence
        lines.append(f"Each bound is one-sided, of {sure:.1%}, so that all together hold with 95 % (Bonferroni).")
        return [*lines, SCOPE_OF_SETTING]
    return [*lines, SCOPE]


def _otherwise_than_the_interval(sweep: Sweep) -> list[str]:
    """What passes, or does not, though the end of its interval beside δ looks otherwise: δ is measured too."""
    c = sweep.comparisons
    names = [
        sweep.name(r.rank)
        for r in c.ranks
        if (r.outcome == "passes") != (r.upper < c.margin) or (r.outcome == "worse") != (r.lower > c.margin)
    ]
    if not sweep.margin_is_share or not names:
        return []
    return [
        f"At {_names(names)} the interval of the difference and the test against δ disagree: δ is measured too, which "
        "only the test counts. The test decides."
    ]


def _heavy_rows(sweep: Sweep) -> list[str]:
    """Where a few rows carry a difference, its bounds are too near to it, whatever is done about it."""
    heaviest = max(sweep.comparisons.ranks, key=lambda found: found.beyond_margin.heaviest)
    share = heaviest.beyond_margin.heaviest
    if share < HEAVY:
        return []
    return [
        f"A single held-out row makes up {share:.0%} of how much rows differ at {sweep.name(heaviest.rank)}; then "
        "bounds are less sure than they say, and more rows help more than seeds."
    ]


def _shared(sweep: Sweep) -> list[str]:
    """Which costs are no rank's own."""
    ranks = [rank for rank, cost in sweep.costs.items() if cost.shared_by]
    if not ranks:
        return []
    return [
        f"Time and memory of {_names([sweep.name(rank) for rank in ranks])} are those of passes that several runs "
        "shared (with + in the table); --at-once 1 measures each by itself."
    ]


def _full(sweep: Sweep) -> list[str]:
    """The comparison with full fine-tuning."""
    c = sweep.comparisons
    full = sweep.against_full if sweep.answers else sweep.reference_against_full
    if full is None:
        return []
    between = f"{full.mean:+.4f} nats, 90 % interval {full.lower:+.4f} to {full.upper:+.4f}"
    if not sweep.answers:
        return [f"{sweep.name(c.reference)} against full fine-tuning: {between}."]
    over = sweep.full_beyond_margin
    assert over is not None
    found = "ruled out (95 %)" if over.upper < 0 else "shown (95 %)" if over.lower > 0 else "not ruled out"
    return [f"r = {c.sufficient} against full fine-tuning: {between}; a loss beyond δ is {found}."]


def _rates(sweep: Sweep) -> list[str]:
    """What the check of the learning rate found."""
    lines = []
    for factor in sorted({check.factor for check in sweep.rate_checks}):
        checks = [check for check in sweep.rate_checks if check.factor == factor]
        names = _names(["the base's head" if check.rank == BASE else sweep.name(check.rank) for check in checks])
        tolerance = max(check.tolerance for check in checks)
        beyond = "; the best may lie beyond" if any(check.at_the_edge for check in checks) else ""
        used = "as given" if factor == 1 else f"× {factor:.2g}"
        lines.append(
            f"Learning rate: {used}, checked at {names}; none that was tried is better there by more than "
            f"{tolerance:.4f} nats{beyond}."
        )
    return lines
