"""Means over S seeds × N examples, where both are samples: of the seeds and of the examples that could have been.

The model is x[s, i] = mean + seed[s] + example[i] + rest[s, i], all three random (two-way random effects). The variance
of the mean over all x is then seed²/S + example²/N + rest²/(S·N), estimated by the mean squares of the analysis of
variance, with Satterthwaite's degrees of freedom: with few seeds that differ much they are near S - 1, with seeds that
agree near N - 1. Sources: Searle, Casella and McCulloch 1992, "Variance Components", section 4; Satterthwaite 1946.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Array = NDArray[np.float64]

CONFIDENCE = 0.95
"""Of each one-sided bound; an interval between two of them covers 90 %."""
POWER = 0.8
"""What a plan asks for: how often a true statement is found."""


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
        return float(stats.nct.sf(stats.t.ppf(confidence, freedom), freedom, distance / error))


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds × examples and how sure it is."""

    mean: float
    components: Components
    seeds: int
    examples: int
    confidence: float = CONFIDENCE
    """Of each bound; 95 % where nothing else is said."""

    @property
    def standard_error(self) -> float:
        return self.components.standard_error(self.seeds, self.examples)

    @property
    def half_width(self) -> float:
        """Distance from the mean to its one-sided bound."""
        freedom = self.components.degrees_of_freedom(self.seeds, self.examples)
        return float(stats.t.ppf(self.confidence, freedom)) * self.standard_error

    @property
    def lower(self) -> float:
        """One-sided bound."""
        return self.mean - self.half_width

    @property
    def upper(self) -> float:
        """One-sided bound."""
        return self.mean + self.half_width


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
    return Estimate(float(mean), components, seeds, examples, confidence)


def needed(found: Estimate, distance: float, most: int = 1000) -> tuple[int | None, int | None]:
    """(seeds, examples): how many of the one, with the other as it is, would tell a mean from a limit so far away.

    With probability 0.8, if the true mean is the one found. None: more than `most` seeds, or `most` times the examples.
    """
    parts, seeds, examples = found.components, found.seeds, found.examples
    sure = found.confidence
    enough_seeds = _first(lambda n: parts.power(distance, n, examples, sure) >= POWER, seeds, most)
    enough_examples = _first(lambda n: parts.power(distance, seeds, n, sure) >= POWER, examples, most * examples)
    return enough_seeds, enough_examples


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


def largest_deviation(seeds: int) -> float:
    """How much paired differences may vary from seed to seed, in units of the margin, for a power of 0.8.

    It is the plan before any run: with an equally good rank and so many seeds, a larger standard deviation than this
    one times the margin would leave the question open more often than once in five times.
    """
    quantile = stats.t.ppf(CONFIDENCE, seeds - 1)
    found = optimize.root_scalar(lambda nc: stats.nct.sf(quantile, seeds - 1, nc) - POWER, bracket=(0.5, 50))
    return float(np.sqrt(seeds) / found.root)
