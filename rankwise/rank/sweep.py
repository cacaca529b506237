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

from rankwise.errors import ConfigError, listing
from rankwise.rank.compare import Comparisons, allowed_loss, compare, joint_confidence
from rankwise.rank.crossed import CONFIDENCE, POWER, Array, Estimate, estimate, largest_deviation
from rankwise.rank.rates import RateCheck, check_rates_of_ranks, check_rates_of_values, factor_for
from rankwise.rank.runs import BASE, FULL, Key, PendingRuns, RunResult, Runs, Together

Run = Callable[[int, int, float], RunResult]
"""run(rank, seed, factor): train with `factor` times the learning rate, and measure on the held-out examples."""


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
    def learned(self) -> bool:
        """Whether the largest rank lowered the loss at all, with 95 % confidence; if not, nothing can be said."""
        return self.comparisons.gain.lower > 0

    @property
    def answers(self) -> bool:
        """Whether the verdict compares at all: something was learned, the margin asks something, the reference fits."""
        c = self.comparisons
        return self.learned and c.gain.mean > c.margin and not (self.ordered and c.better)

    @property
    def taken(self) -> int | None:
        """The rank that is shown to suffice; None for settings, and where no rank below the largest passed."""
        c = self.comparisons
        return c.sufficient if self.ordered and self.answers and c.sufficient != c.reference else None

    @property
    def at_least(self) -> int | None:
        """The largest rank where the one before it is shown to be worse, so that a larger one may be needed."""
        c = self.comparisons
        falls = self.ordered and self.answers and c.ranks[-1].outcome == "worse"
        return c.reference if falls else None

    @property
    def against_full(self) -> Estimate | None:
        """Loss at the sufficient rank minus that of full fine-tuning; None if that was not trained."""
        return self._minus_full(self.comparisons.sufficient)

    @property
    def reference_against_full(self) -> Estimate | None:
        """The same of the largest rank."""
        return self._minus_full(self.comparisons.reference)

    @property
    def full_beyond_margin(self) -> Estimate | None:
        """`against_full` minus δ, which is measured too where it is a share of the gain."""
        if FULL not in self.losses:
            return None
        c, losses = self.comparisons, self.losses
        allowed = allowed_loss(
            losses[BASE], losses[c.reference], self.counts, None if self.margin_is_share else c.margin
        )
        return estimate(losses[c.sufficient] - losses[FULL] - allowed, self.counts)

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
    runs = PendingRuns(does, Runs(folder, settings, say), say, lambda rank: _name(rank, "r", {}))
    say(_plan("rank", f"r = {ranks[-1]}", len(seeds)))
    checks = check_rates_of_ranks(runs, ranks, with_full, seeds[0], margin) if check_rates else []
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
    the learning rate is checked at each value (of "lr": of a base's head alone). The other arguments, and errors, are
    those of `sweep`.
    """
    problems = [*_problems(seeds, margin)]
    if len(set(values)) < 2 or len(set(values)) < len(values):
        problems.append(f"--over needs at least two values, all different, found {', '.join(values) or 'none'}")
    if problems:
        raise ConfigError("invalid sweep:\n" + listing(problems))
    numbered = dict(enumerate(values, start=1))
    does = partial(_one_by_one, run)
    runs = PendingRuns(does, Runs(folder, settings, say), say, lambda number: _name(number, setting, numbered))
    confidence = joint_confidence(len(values) - 1)
    say(_plan("value", f"the first, {setting} = {values[0]},", len(seeds), confidence))
    checks = check_rates_of_values(runs, list(numbered), setting == "lr", seeds[0], margin) if check_rates else []
    return _run_and_compare(runs, [BASE, *numbered], seeds, checks, margin, 1, setting, numbered)


def _run_and_compare(
    runs: PendingRuns,
    compared: Sequence[int],
    seeds: Sequence[int],
    checks: Sequence[RateCheck],
    margin: float | None,
    reference: int | None = None,
    axis: str = "r",
    values: dict[int, str] | None = None,
) -> Sweep:
    """Do all runs, each with its learning rate, and compare them."""
    factors = {rank: factor_for(checks, rank) for rank in compared}
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


def _plan(what: str, reference: str, seeds: int, confidence: float = CONFIDENCE) -> str:
    """The power, before any run."""
    return (
        f"plan: with {seeds} seeds a {what} exactly as good as {reference} passes in {POWER:.0%} of sweeps if its "
        f"difference varies by {largest_deviation(seeds, confidence):.2g}·δ from seed to seed (a standard deviation) "
        "and hardly from one held-out example to the next; that part is not counted, and can make passing much rarer"
    )


def _name(rank: int, axis: str, values: dict[int, str]) -> str:
    return {BASE: "base", FULL: "full fine-tuning"}.get(rank) or f"{axis} = {values.get(rank, rank)}"


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
