"""The ground truth: train at every rank with several seeds, and compare held-out losses pair by pair.

What the runs of one seed share makes them pairs: the rows in the same order, the same dropout masks, and the start of A
(rank r begins with the first r rows of the largest rank's A). lora_alpha is the same for all ranks and the scale is
lora_alpha / r, with which the best learning rate hardly depends on the rank (Schulman 2025, "LoRA Without Regret").
That is checked and not assumed: at the smallest, a middle and the largest rank the first seed is also trained with a
third of the rate and with three times the rate, and further that way while it gets better. If the three agree, all
ranks train with that rate; else every rank is checked and trains with its own best.

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
from rankwise.rank.compare import Comparisons, compare
from rankwise.rank.crossed import POWER, Array, Estimate, estimate, largest_deviation
from rankwise.rank.runs import Key, RunResult, Runs

BASE, FULL = 0, -1
"""What stands in the place of a rank for the base without an update, and for full fine-tuning."""
STEP = 3.0
"""Between the learning rates of the check."""
WIDEST = 27.0
"""The check goes no further than this factor and its inverse."""
TOLERANCE = 0.01
"""A rate must lower the loss by this share of the gain over the base to count as better, a fifth of the usual margin:
less cannot decide on a rank, and a choice among equals by noise would end at extreme rates."""

FIRST = (1.0, 1 / STEP, STEP)
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
    """Held-out loss by factor."""
    tolerance: float
    """Losses that differ by less count as equal."""

    @property
    def best(self) -> float:
        """The factor nearest to 1 among those whose losses equal the lowest."""
        enough = min(self.losses.values()) + self.tolerance
        good = [factor for factor, loss in self.losses.items() if loss <= enough]
        return min(good, key=lambda factor: abs(math.log(factor)))

    @property
    def at_the_edge(self) -> bool:
        """Whether the best rate may lie beyond those that were tried."""
        return self.best in (min(self.losses), max(self.losses))


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
        if FULL not in self.losses:
            return None
        return estimate(self.losses[self.comparisons.sufficient] - self.losses[FULL], self.counts)


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
    runs = _Doing(does, Runs(folder, settings), say, lambda rank: _name(rank, "r", {}))
    say(
        f"plan: a rank as good as r = {ranks[-1]} passes in {POWER:.0%} of sweeps with {len(seeds)} seeds if its "
        f"difference varies by up to {largest_deviation(len(seeds)):.2f}·δ from seed to seed"
    )
    checks = _check_rates(runs, ranks, with_full, seeds[0]) if check_rates else []
    return _measured(runs, [BASE, *ranks, *([FULL] if with_full else [])], seeds, checks, margin)


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
    each value trains with its own best learning rate. The other arguments, and errors, are those of `sweep`.
    """
    problems = [*_problems(seeds, margin)]
    if len(set(values)) < 2 or len(set(values)) < len(values):
        problems.append(f"--over needs at least two values, all different, found {', '.join(values) or 'none'}")
    if problems:
        raise ConfigError("this sweep cannot be:\n" + listing(problems))
    numbered = dict(enumerate(values, start=1))
    does = partial(_one_by_one, run)
    runs = _Doing(does, Runs(folder, settings), say, lambda number: _name(number, setting, numbered))
    say(f"plan: every {setting} is compared with the first, {values[0]}")
    base = runs.loss(Key(BASE, seeds[0]))
    checks = _rates_of(runs, list(numbered), seeds[0], base) if check_rates else []
    return _measured(runs, [BASE, *numbered], seeds, checks, margin, 1, setting, numbered)


def _measured(
    runs: "_Doing",
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
    runs.do([Key(rank, seed, factors[rank]) for seed in seeds for rank in compared])
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
    return Cost(results[0].parameters, results[0].adapter_bytes, float(np.mean(peaks)), float(np.mean(seconds)))


def _one_by_one(run: Run, keys: Sequence[Key]) -> Iterable[tuple[Key, RunResult]]:
    return ((key, run(key.rank, key.seed, key.factor)) for key in keys)


class _Doing:
    """Does the runs that are not there yet."""

    def __init__(self, together: Together, runs: Runs, say: Callable[[str], None], name: Callable[[int], str]) -> None:
        self._together, self._runs, self._say, self._name = together, runs, say, name

    def do(self, keys: Sequence[Key]) -> None:
        """Those of `keys` that are not there yet."""
        missing = [key for key in keys if self._runs.get(key) is None]
        for key, result in self._together(missing) if missing else ():
            self._runs.add(key, result)
            loss = f"held-out loss {self.loss(key):.4f}"
            self._say(f"{self._name(key.rank)}, seed {key.seed}, rate × {key.factor:.3g}: {loss}")

    def result(self, key: Key) -> RunResult:
        self.do([key])
        result = self._runs.get(key)
        assert result is not None
        return result

    def loss(self, key: Key) -> float:
        result = self.result(key)
        return float(result.losses.sum() / result.counts.sum())

    def finite_result(self, key: Key) -> RunResult:
        """Raises RankwiseError if the training diverged."""
        result = self.result(key)
        if not np.isfinite(result.losses).all():
            raise RankwiseError(f"training diverged at {self._name(key.rank)}, seed {key.seed}; give a lower --lr")
        return result


def _name(rank: int, axis: str, values: dict[int, str]) -> str:
    return {BASE: "base", FULL: "full fine-tuning"}.get(rank) or f"{axis} = {values.get(rank, rank)}"


def _check_rates(runs: _Doing, ranks: list[int], with_full: bool, seed: int) -> list[RateCheck]:
    """At three ranks, or at all of them where the three do not agree; and of a head alone and of full fine-tuning."""
    base, head = runs.loss(Key(BASE, seed)), []
    if runs.result(Key(BASE, seed)).parameters > 0:
        head = _rates_of(runs, [BASE], seed, base)
        base = head[0].losses[head[0].best]
    three = sorted({ranks[0], ranks[len(ranks) // 2], ranks[-1]})
    checks = _rates_of(runs, [*three, *([FULL] if with_full else [])], seed, base)
    if len({check.best for check in checks if check.rank != FULL}) > 1:
        checks += _rates_of(runs, [rank for rank in ranks if rank not in three], seed, base)
    return [*head, *sorted(checks, key=lambda check: math.inf if check.rank == FULL else check.rank)]


def _rates_of(runs: _Doing, ranks: Sequence[int], seed: int, base: float) -> list[RateCheck]:
    """The check at each of these ranks, a round of all of them at a time."""
    losses: dict[int, dict[float, float]] = {rank: {} for rank in ranks}
    wanted = [Key(rank, seed, factor) for rank in ranks for factor in FIRST]
    while True:
        runs.do(wanted)
        for key in wanted:
            losses[key.rank][key.factor] = runs.loss(key)
        checks = [_rate_check(rank, losses[rank], base) for rank in ranks]
        wanted = [Key(check.rank, seed, factor) for check in checks for factor in _further(check)]
        if not wanted:
            return checks


def _rate_check(rank: int, losses: dict[float, float], base: float) -> RateCheck:
    # A head alone starts from no other loss than its own.
    gain = base if rank == BASE else base - min(losses.values())
    return RateCheck(rank, losses, TOLERANCE * max(gain, 0.0))


def _further(check: RateCheck) -> list[float]:
    """The factor beyond the best one, where that may be better still."""
    further = check.best * (STEP if check.best > 1 else 1 / STEP)
    return [further] if check.at_the_edge and 1 / WIDEST <= further <= WIDEST else []


def _factor(checks: Sequence[RateCheck], rank: int) -> float:
    """The best at a checked rank, what the checked ranks agree on at another."""
    best = {check.rank: check.best for check in checks}
    agreed = [factor for checked, factor in best.items() if checked > 0]
    return best.get(rank, agreed[0] if agreed and rank > 0 else 1.0)


def _checked(ranks: Sequence[int], seeds: Sequence[int], margin: float | None) -> list[int]:
    problems = [*_problems(seeds, margin)]
    if len(set(ranks)) < 2 or min(ranks) < 1:
        problems.append(f"--ranks needs at least two ranks from 1 on, found {', '.join(map(str, ranks)) or 'none'}")
    if problems:
        raise ConfigError("this sweep cannot be:\n" + listing(problems))
    return sorted(set(ranks))


def _problems(seeds: Sequence[int], margin: float | None) -> Iterator[str]:
    if len(set(seeds)) < 2 or len(set(seeds)) < len(seeds):
        yield "a sweep needs at least two different seeds: one says nothing on how much seeds differ"
    if margin is not None and not margin > 0:
        yield f"--delta must be above 0, found {margin}"


def _same_counts(results: dict[int, list[RunResult]]) -> Array:
    first, *others = [result.counts for of_rank in results.values() for result in of_rank]
    if any(not np.array_equal(first, other) for other in others):
        raise ConfigError("the runs were measured on different held-out examples, so they are no pairs")
    if len(first) < 2:
        raise ConfigError("a sweep needs at least two held-out examples")
    return first
