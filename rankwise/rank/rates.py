"""The check of the learning rate: is there one that suits all ranks, or does each need its own?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rankwise.rank.compare import MARGIN_SHARE_OF_GAIN
from rankwise.rank.runs import BASE, FULL, Key, PendingRuns

RATE_STEP = 3.0
"""Between the learning rates of the check."""
MAX_RATE_FACTOR = 27.0
"""The check goes no further than this factor and its inverse."""
TOLERANCE = 0.01
"""Where every rank trains with its own best rate, it must lower the loss by this share of the gain over the base to
count as better: a choice among equals by noise would end at extreme rates."""

FIRST_RATE_FACTORS = (1.0, 1 / RATE_STEP, RATE_STEP)
"""The factors that the check begins with."""


@dataclass(frozen=True)
class RateCheck:
    """The learning rates that were tried at one rank, with the first seed."""

    rank: int
    losses: dict[float, float]
    """Held-out loss by factor; infinite where training diverged."""
    tolerance: float
    """Losses that differ by less count as equal."""
    factor: float
    """The one to train with."""

    @property
    def at_the_edge(self) -> bool:
        """Whether the best rate may lie beyond those that were tried."""
        return self.factor in (min(self.losses), max(self.losses))


def check_rates_of_ranks(
    runs: PendingRuns, ranks: Sequence[int], with_full: bool, seed: int, margin: float | None
) -> list[RateCheck]:
    """At three ranks, or at all of them where no rate suits the three; and of a head alone and of full fine-tuning."""
    base, head = _check_head(runs, seed)
    three = sorted({ranks[0], ranks[len(ranks) // 2], ranks[-1]})
    checks = _rates_for_all(runs, three, ranks, seed, base, margin)
    return [*head, *checks, *(_own_rates(runs, [FULL], seed, base) if with_full else [])]


def check_rates_of_values(
    runs: PendingRuns, values: Sequence[int], of_head_alone: bool, seed: int, margin: float | None
) -> list[RateCheck]:
    """At all values of a setting (none where the setting is the rate: `of_head_alone`), and of a head alone."""
    base, head = _check_head(runs, seed)
    return head if of_head_alone else [*head, *_rates_for_all(runs, values, values, seed, base, margin)]


def _check_head(runs: PendingRuns, seed: int) -> tuple[float, list[RateCheck]]:
    """The loss of the base, whose head, if it has one to train, trains with its best rate; and the check of that."""
    base = runs.base_loss(seed)
    if runs.result(Key(BASE, seed)).parameters == 0:
        return base, []
    head = _own_rates(runs, [BASE], seed, base)
    return head[0].losses[head[0].factor], head


def _rates_for_all(
    runs: PendingRuns, checked: Sequence[int], ranks: Sequence[int], seed: int, base: float, margin: float | None
) -> list[RateCheck]:
    """One factor for all ranks, if it lies within δ of the best at each of the checked; else the own best of every."""
    losses: dict[int, dict[float, float]] = {rank: {} for rank in checked}
    factors = list(FIRST_RATE_FACTORS)
    while True:
        _try(runs, [Key(rank, seed, factor) for rank in checked for factor in factors], losses)
        if all(math.isinf(own[1.0]) for own in losses.values()):
            raise runs.diverged(Key(checked[0], seed))
        gain = base - min(loss for own in losses.values() for loss in own.values())
        delta = MARGIN_SHARE_OF_GAIN * max(gain, 0.0) if margin is None else margin
        agreed = _agreed(list(losses.values()), delta)
        if agreed is None:
            return _own_rates(runs, ranks, seed, base)
        checks = [RateCheck(rank, own, delta, agreed) for rank, own in losses.items()]
        factors = _further(checks[0])
        if not factors:
            return checks


def _agreed(losses: Sequence[dict[float, float]], delta: float) -> float | None:
    """The factor nearest to 1 (of two, the one with the smaller sum of excesses) that is within δ of every best."""
    excesses = {factor: [own[factor] - min(own.values()) for own in losses] for factor in losses[0]}
    within = [factor for factor, excess in excesses.items() if all(part <= delta for part in excess)]
    return min(within, key=lambda factor: (round(abs(math.log(factor)), 6), sum(excesses[factor])), default=None)


def _own_rates(runs: PendingRuns, ranks: Sequence[int], seed: int, base: float) -> list[RateCheck]:
    """The check of each of these ranks by itself, a round of all of them at a time."""
    losses: dict[int, dict[float, float]] = {rank: {} for rank in ranks}
    wanted = [Key(rank, seed, factor) for rank in ranks for factor in FIRST_RATE_FACTORS]
    while True:
        _try(runs, wanted, losses)
        checks = [_own_check(rank, losses[rank], base) for rank in ranks]
        for check in checks:
            if not any(map(math.isfinite, check.losses.values())):
                raise runs.diverged(Key(check.rank, seed))
        wanted = [Key(check.rank, seed, factor) for check in checks for factor in _further(check)]
        if not wanted:
            return checks


def _try(runs: PendingRuns, keys: Sequence[Key], losses: dict[int, dict[float, float]]) -> None:
    runs.do(keys)
    for key in keys:
        losses[key.rank][key.factor] = runs.loss(key)


def _own_check(rank: int, losses: dict[float, float], base: float) -> RateCheck:
    # A head alone starts from no other loss than its own.
    gain = base if rank == BASE else base - min(losses.values())
    tolerance = TOLERANCE * max(gain, 0.0)
    best = _agreed([losses], tolerance)
    return RateCheck(rank, losses, tolerance, 1.0 if best is None else best)


def _further(check: RateCheck) -> list[float]:
    """The factor beyond the chosen one, where that may be better still."""
    further = check.factor * (RATE_STEP if check.factor > 1 else 1 / RATE_STEP)
    return [further] if check.at_the_edge and 1 / MAX_RATE_FACTOR <= further <= MAX_RATE_FACTOR else []


def factor_for(checks: Sequence[RateCheck], rank: int) -> float:
    """That of its own check, or the one that the checked ranks agree on."""
    own = {check.rank: check.factor for check in checks}
    agreed = [factor for checked, factor in own.items() if checked > 0]
    return own.get(rank, agreed[0] if agreed and rank > 0 else 1.0)
