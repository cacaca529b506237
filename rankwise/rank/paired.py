"""Is a candidate's held-out loss at most δ worse than a reference's? A paired test, example by example."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.engine.engine import Engine
from rankwise.engine.held_out import per_example
from rankwise.rank.crossed import CONFIDENCE, POWER

_RESAMPLES = 999
"""Drawn for one bound; (999 + 1)·5 % is a whole number."""
_SKEWED = 2.0
"""Skewness of the rows above which their largest is taken to be rarer in the sample than it is."""
_AT_ONCE = 1_000_000
"""Numbers in memory while they are drawn."""


@dataclass(frozen=True)
class ExampleLosses:
    """What a model lost on each of n examples, in their order."""

    sums: NDArray[np.float64]
    """[n], nats, summed over the trained tokens of an example (its text, for classification)"""
    counts: NDArray[np.float64]
    """[n], how many those are"""

    @property
    def mean(self) -> float:
        """Nats for each trained token (or text): the loss that `rankwise eval` prints."""
        return float(self.sums.sum() / self.counts.sum())

    def by_unit(self, unit: NDArray[np.int64]) -> "ExampleLosses":
        """The same with the examples of each unit [n] in one."""
        sums, counts = (np.bincount(unit, own).astype(np.float64) for own in (self.sums, self.counts))
        return ExampleLosses(sums, counts)


def units(examples: Sequence[Any]) -> NDArray[np.int64]:
    """[n], numbers from 0 that examples share which ask the same: a paired test may not take them for independent.

    They are given in the order of the examples, so where all ask something else they are 0, 1, 2, …

    They read the same text first (of a conversation: before the last trained stretch; of one without a question: all),
    or one goes on from the other's question, as `rankwise.data.rows.split_rows` keeps rows on one side.
    """
    asked = [_asked(example) for example in examples]
    leader = {own[-1]: own[-1] for own in asked}

    def lead(key: int) -> int:
        while leader[key] != key:
            key = leader[key]
        return key

    for own in asked:
        for earlier in own[:-1]:
            if earlier in leader:
                leader[lead(own[-1])] = lead(earlier)
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(lead(own[-1]), len(numbers)) for own in asked], dtype=np.int64)


def _asked(example: Any) -> list[int]:
    """Hashes of what comes before each answer, the last one at the end."""
    ids: Sequence[int] = getattr(example, "texts", (example,))[0]
    trained: Sequence[bool] = getattr(example, "trained", ())
    # A first token alone is what every row begins with.
    starts = [at for at in range(2, len(trained)) if trained[at] and not trained[at - 1]]
    return [hash(ids[:start]) for start in starts] or [hash(ids)]


def measure(
    engine: Engine[Any], examples: Sequence[Any], on_progress: Callable[[str], None] = lambda text: None
) -> ExampleLosses:
    """The loss of the engine's model, with the adapters at work in it, on each of `examples`."""
    return ExampleLosses(*per_example(engine, examples, on_progress))


@dataclass(frozen=True)
class PairedTest:
    """Of a candidate against a reference on the same rows; nats for each trained token (or text)."""

    difference: float
    """Mean loss of the candidate minus that of the reference."""
    bound: float
    """One-sided upper 95 % bound of the difference."""
    deviation: float
    """Standard deviation of what one row adds to the difference."""
    rows: int
    heaviest: float = 0.0
    """The share of how much rows differ (the sum of squares) that the row with the largest added loss makes up."""

    def within(self, delta: float) -> bool:
        """Whether the candidate is shown to be at most `delta` worse (a test at the 5 % level)."""
        return self.bound <= delta

    def rows_needed(self, delta: float) -> int | None:
        """Rows with which the test passes with probability 0.8, should this difference be the true one.

        None: no number of rows would do, as the difference is not below `delta`.
        """
        if self.difference >= delta:
            return None
        z = NormalDist().inv_cdf(CONFIDENCE) + NormalDist().inv_cdf(POWER)
        return math.ceil((z * self.deviation / (delta - self.difference)) ** 2)


def paired_test(candidate: ExampleLosses, reference: ExampleLosses) -> PairedTest:
    """The mean difference of the loss, and its upper 95 % bound, from paired rows.

    Rows are the independent units, not tokens (clustered standard errors: Miller 2024, arXiv 2411.00640): the mean over
    all tokens, Σ(candidate - reference) / Σ counts, is a ratio, whose variance is that of its linearised terms. Losses
    are skewed, and the bound of a t test is then too low; this one is the bootstrap's (bootstrap-t: Hall 1988), which
    draws rows with replacement and takes the distribution of t from there. Where they are skewed by more than 2, a
    sample tends to have too few of the rows that lose most, so one more like the largest counts as seen for the bound.
    What rows lose of which the sample has none, no bound can know (docs/shrink.md has numbers). The same losses give
    the same bound.
    """
    weight = reference.counts.mean()
    each = (candidate.sums - reference.sums) / weight
    difference = float(each.mean())
    terms = each - difference * reference.counts / weight
    n, deviation = len(terms), float(terms.std(ddof=1))
    if deviation == 0:
        return PairedTest(difference, difference, 0.0, n)
    heaviest = max(0.0, float(terms.max())) ** 2 / float(terms @ terms)
    skewness = float((terms**3).mean()) / float(terms.std()) ** 3
    seen = np.append(terms, terms.max()) if skewness > _SKEWED else terms
    return PairedTest(difference, difference + _upper_bound(seen), deviation, n, heaviest)


def _upper_bound(terms: NDArray[np.float64]) -> float:
    """Of their mean."""
    mean, deviation = float(terms.mean()), float(terms.std(ddof=1))
    t = np.quantile(_bootstrapped_t(terms - mean, deviation), 1 - CONFIDENCE)
    return mean - float(t) * deviation / math.sqrt(len(terms))


def _bootstrapped_t(terms: NDArray[np.float64], deviation: float) -> NDArray[np.float64]:
    """[_RESAMPLES], the t of rows drawn with replacement from `terms`, whose mean is 0."""
    draw, n = np.random.default_rng(0), len(terms)
    means, deviations = np.empty(_RESAMPLES), np.empty(_RESAMPLES)
    block = max(1, _AT_ONCE // n)
    for start in range(0, _RESAMPLES, block):
        here = slice(start, min(start + block, _RESAMPLES))
        drawn = terms[draw.integers(n, size=(here.stop - start, n), dtype=np.int32)]
        means[here], deviations[here] = drawn.mean(1), drawn.std(1, ddof=1)
    # Where all drawn rows are equal, t has no bound; this one is large enough to fail any test.
    return means / np.maximum(deviations, 1e-3 * deviation) * math.sqrt(n)
