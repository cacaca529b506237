"""Metrics of held-out rows against their definitions, written slowly."""

import math
import random

import numpy as np
import pytest

from rankwise.train import metrics

CASES = [(classes, rows, seed) for classes in (2, 3, 20) for rows in (2, 7, 60) for seed in range(3)]


def labels(classes, rows, seed):
    draw = random.Random(seed)
    targets = [draw.randrange(classes) for _ in range(rows)]
    predicted = [target if draw.random() < 0.6 else draw.randrange(classes) for target in targets]
    return np.array(targets), np.array(predicted)


def slow_f1(targets, predicted):
    scores = []
    for label in set(targets) | set(predicted):
        pairs = list(zip(targets, predicted, strict=True))
        true = sum(t == p == label for t, p in pairs)
        precision = true / max(1, sum(p == label for _, p in pairs))
        recall = true / max(1, sum(t == label for t, _ in pairs))
        scores.append(2 * precision * recall / (precision + recall) if true else 0.0)
    return sum(scores) / len(scores)


def slow_matthews(targets, predicted):
    """Pearson's correlation of the one-hot rows, summed over classes: Gorodkin's definition."""
    classes = max(*targets, *predicted) + 1
    X = [[float(p == k) for k in range(classes)] for p in predicted]
    Y = [[float(t == k) for k in range(classes)] for t in targets]

    def covariance(A, B):
        total = 0.0
        for k in range(classes):
            a, b = [row[k] for row in A], [row[k] for row in B]
            mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
            total += sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
        return total

    spread = covariance(X, X) * covariance(Y, Y)
    return covariance(X, Y) / math.sqrt(spread) if spread > 1e-12 else 0.0


@pytest.mark.parametrize(("classes", "rows", "seed"), CASES)
def test_scores_of_classes_equal_their_definitions(classes, rows, seed):
    targets, predicted = labels(classes, rows, seed)
    pair = targets.tolist(), predicted.tolist()
    assert metrics.accuracy(targets, predicted) == sum(t == p for t, p in zip(*pair, strict=True)) / rows
    assert metrics.macro_f1(targets, predicted) == pytest.approx(slow_f1(*pair), abs=1e-12)
    assert metrics.matthews(targets, predicted) == pytest.approx(slow_matthews(*pair), abs=1e-12)


@pytest.mark.parametrize("classes", [2, 5])
def test_all_right_is_one_and_one_class_alone_correlates_with_nothing(classes):
    targets = np.arange(20) % classes
    assert metrics.macro_f1(targets, targets) == metrics.matthews(targets, targets) == 1.0
    assert metrics.matthews(targets, np.zeros(20, int)) == 0.0


def test_a_ratio_and_its_interval_are_those_of_resampled_rows():
    draw = np.random.default_rng(3)
    counts = draw.integers(1, 30, 80).astype(float)
    losses = counts * draw.gamma(2.0, 0.5, 80)
    found = metrics.ratio(losses, counts)
    assert found.value == pytest.approx(losses.sum() / counts.sum())
    values = []
    for _ in range(4000):
        rows = draw.integers(0, 80, 80)
        values.append(losses[rows].sum() / counts[rows].sum())
    lower, upper = np.quantile(values, [0.025, 0.975])
    width = upper - lower
    assert found.lower == pytest.approx(lower, abs=0.1 * width)
    assert found.upper == pytest.approx(upper, abs=0.1 * width)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = metrics.mean(draw.exponential(1.0, 60))
        hits += found.lower <= 1.0 <= found.upper
    # 95 % asked; percentile intervals of a skew mean of 60 rows fall a little short.
    assert 176 <= hits <= 199


def test_the_same_rows_give_the_same_interval():
    targets, predicted = labels(4, 30, 0)
    assert metrics.classification(targets, predicted) == metrics.classification(targets, predicted)


def test_a_single_row_has_a_value_and_no_interval():
    found = metrics.classification(np.array([1]), np.array([1]))
    assert found["accuracy"] == metrics.Estimate(1.0)


def test_perplexity_is_the_exponential_of_the_loss_and_of_its_bounds():
    found = metrics.perplexity(metrics.Estimate(1.0, 0.5, 2.0))
    assert (found.value, found.lower, found.upper) == pytest.approx((math.e, math.exp(0.5), math.exp(2.0)))
    assert metrics.perplexity(metrics.Estimate(2.0)) == metrics.Estimate(math.exp(2.0))
    assert math.inf > metrics.perplexity(metrics.Estimate(1e4)).value > 1e308, "JSON knows no infinity"
