"""What is measured on held-out rows, each value with a 95 % interval from resampling the rows (bootstrap, Efron 1979).

An interval says how far the value depends on which rows happened to be held out; it knows nothing of other seeds of
training. Where all rows agree (no answer right, say) it is a single point, and too narrow.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 1000
CONFIDENCE = 0.95
SEED = 0
"""Of the resampling: the same rows always give the same interval."""
LARGEST_EXPONENT = math.log(sys.float_info.max)
"""Above it exp is infinite, which JSON does not know."""
AT_ONCE = 4_000_000
"""Values of resampled rows held in memory at a time."""


@dataclass(frozen=True)
class Estimate:
    """A value with the bounds of its interval; no bounds for a single row, which cannot be resampled."""

    value: float
    lower: float | None = None
    upper: float | None = None


def ratio(values: NDArray[Any], counts: NDArray[Any]) -> Estimate:
    """Σ values / Σ counts over rows [n], such as the mean loss of all trained tokens."""

    def statistic(values: NDArray[Any], counts: NDArray[Any], axis: int = -1) -> NDArray[Any]:
        return values.sum(axis) / counts.sum(axis)

    return _estimate(statistic, (values, counts), vectorized=True)


def mean(values: NDArray[Any]) -> Estimate:
    """The mean over rows [n]."""
    return ratio(values, np.ones(len(values)))


def perplexity(loss: Estimate) -> Estimate:
    """exp of a mean loss in nats; it rises with the loss, so the bounds are those of the loss."""
    bounds = (None if bound is None else _exp(bound) for bound in (loss.lower, loss.upper))
    return Estimate(_exp(loss.value), *bounds)


def _exp(value: float) -> float:
    return math.exp(min(value, LARGEST_EXPONENT))


def classification(targets: NDArray[Any], predicted: NDArray[Any]) -> dict[str, Estimate]:
    """accuracy, macro_f1 and mcc of predicted classes [n], as class numbers from 0."""
    return {
        name: _estimate(statistic, (targets, predicted), vectorized=False)
        for name, statistic in (("accuracy", accuracy), ("macro_f1", macro_f1), ("mcc", matthews))
    }


def accuracy(targets: NDArray[Any], predicted: NDArray[Any]) -> float:
    """The share of rows whose class is right."""
    return float((targets == predicted).mean())


def macro_f1(targets: NDArray[Any], predicted: NDArray[Any]) -> float:
    """The mean over classes of 2·right / (rows of the class + rows predicted as it).

    As in scikit-learn, a class counts if a row has it or is predicted to have it.
    """
    right, of_class, as_class = _counts(targets, predicted)
    present = of_class + as_class > 0
    return float((2 * right[present] / (of_class + as_class)[present]).mean())


def micro_f1(right: NDArray[Any], of: NDArray[Any], found: NDArray[Any]) -> Estimate:
    """2·right / (of + found), summed over rows [n]: how many of a row's things are there and found, there, found.

    0 where nothing is there and nothing was found.
    """

    def statistic(right: NDArray[Any], both: NDArray[Any], axis: int = -1) -> NDArray[Any]:
        sums = both.sum(axis)
        return np.divide(2 * right.sum(axis), sums, out=np.zeros(np.shape(sums)), where=sums > 0)

    return _estimate(statistic, (right, of + found), vectorized=True)


def macro_f1_of_counts(right: NDArray[Any], of: NDArray[Any], found: NDArray[Any]) -> Estimate:
    """The mean over classes of the same for [n, classes], each class by itself; a class counts as in `macro_f1`."""

    def statistic(rows: NDArray[Any]) -> float:
        times = np.bincount(rows, minlength=len(right))
        both = times @ (of + found)
        present = both > 0
        return float((2 * (times @ right)[present] / both[present]).mean()) if present.any() else 0.0

    return _estimate(statistic, (np.arange(len(right)),), vectorized=False)


def matthews(targets: NDArray[Any], predicted: NDArray[Any]) -> float:
    """Matthews' correlation coefficient in [-1, 1] for any number of classes (Gorodkin 2004); 0 where it is 0 / 0."""
    right, of_class, as_class = _counts(targets, predicted)
    n = len(targets)
    covariance = right.sum() * n - of_class @ as_class
    spread = (n**2 - of_class @ of_class) * (n**2 - as_class @ as_class)
    return float(covariance / np.sqrt(spread)) if spread else 0.0


def _counts(targets: NDArray[Any], predicted: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """For each class: rows that are right, rows that have it, rows that are predicted to have it."""
    classes = int(max(targets.max(), predicted.max())) + 1
    right, of_class, as_class = (
        np.bincount(rows, minlength=classes).astype(float)
        for rows in (targets[targets == predicted], targets, predicted)
    )
    return right, of_class, as_class


def _estimate(statistic: Callable[..., Any], rows: tuple[NDArray[Any], ...], vectorized: bool) -> Estimate:
    value, count = float(statistic(*rows)), len(rows[0])
    if count < 2:
        return Estimate(value)
    interval = stats.bootstrap(
        rows,
        statistic,
        paired=True,
        vectorized=vectorized,
        n_resamples=RESAMPLES,
        batch=max(1, AT_ONCE // count),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))
