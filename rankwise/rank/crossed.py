"""Means over S seeds × N examples, where both are samples: of the seeds and of the examples that could have been.

The model is x[s, i] = mean + seed[s] + example[i] + rest[s, i], all three random (two-way random effects). The variance
of the mean over all x is then seed²/S + example²/N + rest²/(S·N), estimated by the mean squares of the analysis of
variance, with Satterthwaite's degrees of freedom: with few seeds that differ much they are near S - 1, with seeds that
agree near N - 1. Sources: Searle, Casella and McCulloch 1992, "Variance Components", section 4; Satterthwaite 1946.

Where a few examples carry much of the mean, a t bound over the examples is too near to it. So the examples' part of a
bound is at least that of the bootstrap-t (Hall 1988): the distance from the mean is √(t²·s² + (q² - t_N²)·s_N²), with
s the standard error of the mean, s_N that of the means of the examples, t_N its quantile and q the bootstrap's.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Array = NDArray[np.float64]

CONFIDENCE = 0.95
"""Of each one-sided bound; an interval between two of them covers 90 %."""
POWER = 0.8
"""What a plan asks for: how often a true statement is found."""
LEAST_EXAMPLES = 10
"""With fewer held-out examples that ask different things no bound keeps its level."""
MOST_NEEDED = 1000
"""Seeds, or times the examples, above which a plan says that they would not do."""
_RESAMPLES = 999
"""Drawn for one bound; (999 + 1)·5 % is a whole number."""
_FAR = 30.0
"""In standard errors: beyond it scipy's noncentral t ends in nan, and the normal part of it no longer matters."""


@dataclass(frozen=True)
class Components:
    """The variances of the three random parts."""

    seed: float
    example: float
    rest: float

    def standard_error(self, seeds: int, examples: int) -> float:
        """Of the mean over so many seeds and examples."""
        return (self.seed / seeds + self.example / examples + self.rest / (seeds * examples)) ** 0.5

    def degrees_of_freedom(self, seeds: int, examples: int) -> float:
        """Satterthwaite's, of the estimated standard error."""
        of_seeds = self.rest + examples * self.seed
        of_examples = self.rest + seeds * self.example
        total = of_seeds + of_examples - self.rest
        parts = (
            of_seeds**2 / (seeds - 1),
            of_examples**2 / (examples - 1),
            self.rest**2 / ((seeds - 1) * (examples - 1)),
        )
        return total**2 / sum(parts) if total > 0 else float(seeds - 1)

    def power(self, distance: float, seeds: int, examples: int, confidence: float = CONFIDENCE) -> float:
        """How often the bound of a mean falls short of a limit that lies `distance` above the true mean."""
        error, freedom = self.standard_error(seeds, examples), self.degrees_of_freedom(seeds, examples)
        if error == 0:
            return float(distance > 0)
        quantile, away = stats.t.ppf(confidence, freedom), distance / error
        if abs(away) > _FAR:
            return float(stats.chi2.cdf(freedom * (max(away, 0.0) / quantile) ** 2, freedom))
        return float(stats.nct.sf(quantile, freedom, away))


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds × examples and how sure it is."""

    mean: float
    components: Components
    seeds: int
    examples: int
    confidence: float = CONFIDENCE
    """Of each bound; 95 % where nothing else is said."""
    skew: tuple[float, float] = (0.0, 0.0)
    """What the skew of the examples adds to the squared distance of the lower and of the upper bound."""
    heaviest: float = 0.0
    """The largest part of one example in the squared deviations of all examples."""

    @property
    def standard_error(self) -> float:
        return self.components.standard_error(self.seeds, self.examples)

    @property
    def half_width(self) -> float:
        """Distance from the mean to its one-sided bound, but for the skew."""
        freedom = self.components.degrees_of_freedom(self.seeds, self.examples)
        return float(stats.t.ppf(self.confidence, freedom)) * self.standard_error

    @property
    def lower(self) -> float:
        """One-sided bound."""
        return self.mean - (self.half_width**2 + self.skew[0]) ** 0.5

    @property
    def upper(self) -> float:
        """One-sided bound."""
        return self.mean + (self.half_width**2 + self.skew[1]) ** 0.5

    @property
    def interval_name(self) -> str:
        """What the interval between both one-sided bounds covers."""
        return f"{100 * (2 * self.confidence - 1):.3g} % interval"


def estimate(sums: Array, counts: Array, confidence: float = CONFIDENCE) -> Estimate:
    """The mean over all that is counted, of `sums` [S, N] over `counts` [N] predictions of each example.

    The mean is a ratio, Σ sums / (S·Σ counts); its error is that of its linearisation. S and N must be at least 2.
    """
    seeds, examples = sums.shape
    mean = sums.sum() / (seeds * counts.sum())
    values = mean + (sums - mean * counts) / counts.mean()
    of_seeds, of_examples = values.mean(1), values.mean(0)
    rest = values - of_seeds[:, None] - of_examples + mean
    square_seeds = examples * np.square(of_seeds - mean).sum() / (seeds - 1)
    square_examples = seeds * np.square(of_examples - mean).sum() / (examples - 1)
    square_rest = np.square(rest).sum() / ((seeds - 1) * (examples - 1))
    components = Components(
        float(max(0.0, square_seeds - square_rest) / examples),
        float(max(0.0, square_examples - square_rest) / seeds),
        float(square_rest),
    )
    deviations = of_examples - mean
    squares = np.square(deviations)
    heaviest = float(squares.max() / squares.sum()) if squares.any() else 0.0
    skew = _widened_by_skew(deviations, confidence)
    return Estimate(float(mean), components, seeds, examples, confidence, skew, heaviest)


def _widened_by_skew(deviations: Array, confidence: float) -> tuple[float, float]:
    """(q² - t_N²)·s_N² for the lower and the upper bound, never below 0. The same deviations give the same."""
    n, error = len(deviations), deviations.std(ddof=1) / len(deviations) ** 0.5
    if error == 0:
        return 0.0, 0.0
    drawn = _drawn_counts(n)
    means, squares = np.empty(_RESAMPLES), np.empty(_RESAMPLES)
    for start in range(0, _RESAMPLES, 111):
        block = slice(start, start + 111)
        counts = drawn[block].astype(float)
        means[block], squares[block] = counts @ deviations / n, counts @ np.square(deviations) / n
    # Where all drawn examples are equal, t has no bound; this one is large enough to fail any test.
    errors = np.maximum(np.sqrt(np.maximum(squares - np.square(means), 0) / (n - 1)), 1e-3 * error)
    least = stats.t.ppf(confidence, n - 1)
    high, low = np.quantile(means / errors, (confidence, 1 - confidence))
    below, above = (float((max(q, least) ** 2 - least**2) * error**2) for q in (high, -low))
    return below, above


@lru_cache(maxsize=2)
def _drawn_counts(examples: int) -> NDArray[np.uint8]:
    """[_RESAMPLES, examples]: how often each example is drawn, with replacement."""
    rng = np.random.default_rng(0)
    drawn = [np.bincount(rng.integers(examples, size=examples), minlength=examples) for _ in range(_RESAMPLES)]
    return np.stack(drawn).astype(np.uint8)


def needed(found: Estimate, distance: float) -> tuple[int | None, int | None]:
    """(seeds, examples): how many of the one, with the other as it is, would tell a mean from a limit so far away.

    With probability 0.8, if the true mean is the one found. None: more than MOST_NEEDED seeds (or times the examples).
    """
    parts, seeds, examples = found.components, found.seeds, found.examples
    sure = found.confidence
    enough_examples = _first(lambda n: parts.power(distance, seeds, n, sure) >= POWER, examples, MOST_NEEDED * examples)
    return _enough_seeds(found, parts, distance), enough_examples


def most_seeds_needed(found: Estimate, distance: float) -> int | None:
    """As the seeds of `needed`, should their variance be at its upper bound, of 80 % (by the chi-squared distribution).

    Few seeds measure it badly: the bound is 15.6 times what two seeds show, and 2.4 times what five do.
    """
    parts, examples = found.components, found.examples
    square = (parts.rest + examples * parts.seed) * (found.seeds - 1) / stats.chi2.ppf(1 - POWER, found.seeds - 1)
    larger = Components(float(square - parts.rest) / examples, parts.example, parts.rest)
    return _enough_seeds(found, larger, distance)


def _enough_seeds(found: Estimate, parts: Components, distance: float) -> int | None:
    sure, examples = found.confidence, found.examples
    return _first(lambda n: parts.power(distance, n, examples, sure) >= POWER, found.seeds, MOST_NEEDED)


def _first(holds, start: int, most: int) -> int | None:
    """The smallest number from `start` to `most` for which a condition holds that stays true from there on."""
    low, high = start, start
    while not holds(high):
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high


def largest_deviation(seeds: int, confidence: float = CONFIDENCE) -> float:
    """How much paired differences may vary from seed to seed, in units of the margin, for a power of 0.8.

    It is the plan before any run: with an equally good rank and so many seeds, a larger standard deviation than this
    one times the margin would leave the question open more often than once in five times. It is the seeds' part alone:
    what the held-out examples add is not known yet, and can lower the power much.
    """
    unit = Components(float(seeds), 0.0, 0.0)  # The mean over the seeds has a standard error of 1.
    found = optimize.root_scalar(lambda away: unit.power(away, seeds, 2, confidence) - POWER, bracket=(0.5, 1e4))
    return float(np.sqrt(seeds) / found.root)
