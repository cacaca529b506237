"""The ground truth: train at every rank with several seeds, and compare held-out losses pair by pair.

What the runs of one seed share makes them pairs: the rows in the same order, the same dropout masks, and the start of A
(rank r begins with the first r rows of the largest rank's A). lora_alpha is the same for all ranks and the scale is
lora_alpha / r, with which the best learning rate hardly depends on the rank (Schulman 2025, "LoRA Without Regret").
That is checked and not assumed: at the smallest, a middle and the largest rank the first seed is also trained with a
third of the rate and with three times the rate, and further that way while it gets better. A factor that lies within
δ of the best at each of the three serves all ranks; only where there is none, every rank is checked and trains with
its own best.

Settings without an order (modules, lora_alpha, learning rates) are swept in the same way at one rank; the first value
is the reference.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.errors import ConfigError, RankwiseError, listing
from rankwise.rank.compare import MARGIN_SHARE_OF_GAIN, Comparisons, compare, joint_confidence
from rankwise.rank.crossed import CONFIDENCE, LEAST_EXAMPLES, POWER, Array, Estimate, estimate, largest_deviation
from rankwise.rank.runs import Key, RunResult, Runs

BASE, FULL = 0, -1
"""What stands in the place of a rank for the base without an update, and for full fine-tuning."""
RATE_STEP = 3.0
"""Between the learning rates of the check."""
MAX_RATE_FACTOR = 27.0
"""The check goes no further than this factor and its inverse."""
TOLERANCE = 0.01
"""Where every rank trains with its own best rate, it must lower the loss by this share of the gain over the base to
count as better: a choice among equals by noise would end at extreme rates."""

FIRST_RATE_FACTORS = (1.0, 1 / RATE_STEP, RATE_STEP)
"""The factors that the check begins with."""

Run = Callable[[int, int, float], RunResult]
"""run(rank, seed, factor): train with `factor` times the learning rate, and measure on the held-out examples."""
Together = Callable[[Sequence[Key]], Iterable[tuple[Key, RunResult]]]
"""From runs to be done to each one's result, as soon as it is there."""


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


@dataclass(frozen=True)
class Cost:
    """What one training took, in the mean over the seeds."""

    parameters: int
    """Trained numbers."""
    adapter_bytes: int
    """Of the file; 0: not known."""
    peak_bytes: float
    """The most memory that the process held; 0: not known."""
    seconds: float
    shared_by: tuple[int, ...] = ()
    """Ranks whose runs shared passes with these, this one too: memory and time are then those of all together."""


@dataclass(frozen=True)
class Sweep:
    """All that a sweep measured."""

    comparisons: Comparisons
    losses: dict[int, Array]
    """By rank [S, N]: summed losses of the held-out examples."""
    counts: Array
    """[N]"""
    seeds: tuple[int, ...]
    costs: dict[int, Cost]
    """By rank."""
    factors: dict[int, float]
    """On the learning rate, by rank."""
    rate_checks: tuple[RateCheck, ...]
    margin_is_share: bool
    """Whether δ is a share of the gain, and no number that the user gave."""
    axis: str = "r"
    """What differs between the runs: r, or the name of a setting."""
    values: dict[int, str] = field(default_factory=dict)
    """The setting's values by number; empty for ranks, which stand for themselves."""

    @property
    def ordered(self) -> bool:
        """Whether these are ranks."""
        return not self.values

    def label(self, rank: int) -> str:
        """A rank (or the value of a setting) in a table."""
        return {BASE: "base", FULL: "full"}.get(rank) or self.values.get(rank, str(rank))

    def name(self, rank: int) -> str:
        """The same in a sentence."""
        return _name(rank, self.axis, self.values)

    @property
    def against_full(self) -> Estimate | None:
        """Loss at the sufficient rank minus that of full fine-tuning; None if that was not trained."""
        return self._minus_full(self.comparisons.sufficient)

    @property
    def reference_against_full(self) -> Estimate | None:
        """The same of the largest rank."""
        return self._minus_full(self.comparisons.reference)

    def _minus_full(self, rank: int) -> Estimate | None:
        return estimate(self.losses[rank] - self.losses[FULL], self.counts) if FULL in self.losses else None


def sweep(
    run: Run,
    ranks: Sequence[int],
    seeds: Sequence[int],
    *,
    together: Together | None = None,
    margin: float | None = None,
    with_full: bool = False,
    check_rates: bool = True,
    folder: Path | None = None,
    settings: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Sweep:
    """Train at every rank with every seed, and say how much worse each is than the largest.

    `run` is also asked for rank 0, the base (a classifier's head is trained there, so that it is not counted as a gain
    of the rank), and, `with_full`, for rank -1, full fine-tuning. `together`, if given, is asked instead of `run`, each
    time for all runs that are known to be needed. `margin`: δ in nats; None: 5 % of the largest rank's gain. With
    `folder`, each finished run is kept there, and a later call with the same `settings` goes on; it may have more
    seeds. `say` is told what goes on. Raises ConfigError for ranks or seeds that cannot be, or other settings in the
    folder.
    """
    ranks = _checked(ranks, seeds, margin)
    does = together or partial(_one_by_one, run)
    runs = _PendingRuns(does, Runs(folder, settings, say), say, lambda rank: _name(rank, "r", {}))
    say(_plan("rank", f"r = {ranks[-1]}", len(seeds)))
    checks = _check_rates(runs, ranks, with_full, seeds[0], margin) if check_rates else []
    return _run_and_compare(runs, [BASE, *ranks, *([FULL] if with_full else [])], seeds, checks, margin)


def sweep_setting(
    run: Run,
    setting: str,
    values: Sequence[str],
    seeds: Sequence[int],
    *,
    margin: float | None = None,
    check_rates: bool = True,
    folder: Path | None = None,
    settings: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Sweep:
    """Train with every value of a setting and every seed, and compare each with the first value.

    `run` is asked for 1, 2, … in the place of a rank: the first, the second, … value; 0 is the base. With `check_rates`
    the learning rate is checked at each value. The other arguments, and errors, are those of `sweep`.
    """
    problems = [*_problems(seeds, margin)]
    if len(set(values)) < 2 or len(set(values)) < len(values):
        problems.append(f"--over needs at least two values, all different, found {', '.join(values) or 'none'}")
    if problems:
        raise ConfigError("invalid sweep:\n" + listing(problems))
    numbered = dict(enumerate(values, start=1))
    does = partial(_one_by_one, run)
    runs = _PendingRuns(does, Runs(folder, settings, say), say, lambda number: _name(number, setting, numbered))
    confidence = joint_confidence(len(values) - 1)
    say(_plan("value", f"the first, {setting} = {values[0]},", len(seeds), confidence))
    base = runs.base_loss(seeds[0])
    checks = _rates_for_all(runs, list(numbered), list(numbered), seeds[0], base, margin) if check_rates else []
    return _run_and_compare(runs, [BASE, *numbered], seeds, checks, margin, 1, setting, numbered)


def _run_and_compare(
    runs: "_PendingRuns",
    compared: Sequence[int],
    seeds: Sequence[int],
    checks: Sequence[RateCheck],
    margin: float | None,
    reference: int | None = None,
    axis: str = "r",
    values: dict[int, str] | None = None,
) -> Sweep:
    """Do all runs, each with its learning rate, and compare them."""
    factors = {rank: _factor(checks, rank) for rank in compared}
    runs.do([Key(rank, seed, factors[rank]) for seed in seeds for rank in compared], finite=True)
    results = {rank: [runs.finite_result(Key(rank, seed, factors[rank])) for seed in seeds] for rank in compared}
    losses = {rank: np.stack([result.losses for result in of_rank]) for rank, of_rank in results.items()}
    counts = _same_counts(results)
    return Sweep(
        compare({rank: losses[rank] for rank in compared if rank != FULL}, counts, margin, reference),
        losses,
        counts,
        tuple(seeds),
        {rank: _cost(of_rank) for rank, of_rank in results.items()},
        factors,
        tuple(checks),
        margin is None,
        axis,
        values or {},
    )


def _cost(results: Sequence[RunResult]) -> Cost:
    peaks, seconds = ([getattr(result, name) for result in results] for name in ("peak_bytes", "seconds"))
    shared_by = tuple(sorted({rank for result in results for rank in result.shared_by}))
    first = results[0]
    return Cost(first.parameters, first.adapter_bytes, float(np.mean(peaks)), float(np.mean(seconds)), shared_by)


def _one_by_one(run: Run, keys: Sequence[Key]) -> Iterable[tuple[Key, RunResult]]:
    return ((key, run(key.rank, key.seed, key.factor)) for key in keys)


class _PendingRuns:
    """Does the runs that are not there yet."""

    def __init__(self, together: Together, runs: Runs, say: Callable[[str], None], name: Callable[[int], str]) -> None:
        self._together, self._runs, self._say, self._name = together, runs, say, name

    def do(self, keys: Sequence[Key], finite: bool = False) -> None:
        """Those of `keys` that are not there yet. Raises RankwiseError at the first that is not `finite`, if asked."""
        missing = [key for key in keys if self._runs.get(key) is None]
        for key, result in self._together(missing) if missing else ():
            # Before any further training: no later run can mend it.
            if len(result.counts) < LEAST_EXAMPLES:
                found = len(result.counts)
                raise ConfigError(f"a sweep needs at least {LEAST_EXAMPLES} different held-out examples, found {found}")
            self._runs.add(key, result)
            loss = f"held-out loss {self.loss(key):.4f}"
            self._say(f"{self._name(key.rank)}, seed {key.seed}, rate × {key.factor:.3g}: {loss}")
            if finite:
                self.finite_result(key)

    def result(self, key: Key) -> RunResult:
        self.do([key])
        result = self._runs.get(key)
        assert result is not None
        return result

    def loss(self, key: Key) -> float:
        """Mean held-out loss, infinite where training diverged."""
        result = self.result(key)
        mean = float(result.losses.sum() / result.counts.sum())
        return mean if math.isfinite(mean) else math.inf

    def base_loss(self, seed: int) -> float:
        """Raises RankwiseError if it is not finite."""
        self.finite_result(Key(BASE, seed))
        return self.loss(Key(BASE, seed))

    def finite_result(self, key: Key) -> RunResult:
        """Raises RankwiseError if the training diverged."""
        result = self.result(key)
        if not np.isfinite(result.losses).all():
            raise self.diverged(key)
        return result

    def diverged(self, key: Key) -> RankwiseError:
        return RankwiseError(f"training diverged at {self._name(key.rank)}, seed {key.seed}; give a lower --lr")


def _plan(what: str, reference: str, seeds: int, confidence: float = CONFIDENCE) -> str:
    """The power, before any run."""
    return (
        f"plan: with {seeds} seeds a {what} exactly as good as {reference} passes in {POWER:.0%} of sweeps if its "
        f"difference varies by {largest_deviation(seeds, confidence):.2g}·δ from seed to seed (a standard deviation) "
        "and hardly from one held-out example to the next; that part is not counted, and can make passing much rarer"
    )


def _name(rank: int, axis: str, values: dict[int, str]) -> str:
    return {BASE: "base", FULL: "full fine-tuning"}.get(rank) or f"{axis} = {values.get(rank, rank)}"


def _check_rates(
    runs: _PendingRuns, ranks: list[int], with_full: bool, seed: int, margin: float | None
) -> list[RateCheck]:
    """At three ranks, or at all of them where no rate suits the three; and of a head alone and of full fine-tuning."""
    base, head = runs.base_loss(seed), []
    if runs.result(Key(BASE, seed)).parameters > 0:
        head = _own_rates(runs, [BASE], seed, base)
        base = head[0].losses[head[0].factor]
    three = sorted({ranks[0], ranks[len(ranks) // 2], ranks[-1]})
    checks = _rates_for_all(runs, three, ranks, seed, base, margin)
    return [*head, *checks, *(_own_rates(runs, [FULL], seed, base) if with_full else [])]


def _rates_for_all(
    runs: _PendingRuns, checked: Sequence[int], ranks: Sequence[int], seed: int, base: float, margin: float | None
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


def _own_rates(runs: _PendingRuns, ranks: Sequence[int], seed: int, base: float) -> list[RateCheck]:
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


def _try(runs: _PendingRuns, keys: Sequence[Key], losses: dict[int, dict[float, float]]) -> None:
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


def _factor(checks: Sequence[RateCheck], rank: int) -> float:
    """That of its own check, or the one that the checked ranks agree on."""
    own = {check.rank: check.factor for check in checks}
    agreed = [factor for checked, factor in own.items() if checked > 0]
    return own.get(rank, agreed[0] if agreed and rank > 0 else 1.0)


def _checked(ranks: Sequence[int], seeds: Sequence[int], margin: float | None) -> list[int]:
    problems = [*_problems(seeds, margin)]
    if len(set(ranks)) < 2 or min(ranks) < 1:
        problems.append(f"--ranks needs at least two ranks from 1 on, found {', '.join(map(str, ranks)) or 'none'}")
    if problems:
        raise ConfigError("invalid sweep:\n" + listing(problems))
    return sorted(set(ranks))


def _problems(seeds: Sequence[int], margin: float | None) -> Iterator[str]:
    if len(set(seeds)) < 2 or len(set(seeds)) < len(seeds):
        yield "a sweep needs at least two different seeds: one says nothing on how much seeds differ"
    if margin is not None and not 0 < margin < math.inf:
        yield f"--delta must be a finite number above 0, found {margin}"


def _same_counts(results: dict[int, list[RunResult]]) -> Array:
    first, *others = [result.counts for of_rank in results.values() for result in of_rank]
    if any(not np.array_equal(first, other) for other in others):
        raise ConfigError("the runs were measured on different held-out examples, so they are no pairs")
    return first
