"""Ranks compared with the largest: bounds and tests keep their level, whatever the margin is, and words stay true."""

import numpy as np
import pytest

from rankwise.rank.compare import compare
from rankwise.rank.crossed import estimate
from rankwise.rank.page import page
from rankwise.rank.runs import RunResult
from rankwise.rank.sweep import FULL, sweep
from rankwise.rank.verdict import notes, verdict

SEEDS, EXAMPLES = 5, 200
DRAWS = 200
MOST = DRAWS * (0.05 + 3 * (0.05 * 0.95 / DRAWS) ** 0.5)
"""5 % of the draws and three standard errors."""


def drawn(rng, lost, lost_by_gain, examples=EXAMPLES):
    """(base, reference, candidate) [S, N]: a gain that differs from row to row, 1 in truth; the candidate loses `lost`,
    more on rows that gain more by `lost_by_gain`."""
    gain = rng.gamma(2, 0.5, examples)
    noise = 0.02 * rng.standard_normal((SEEDS, examples)) + 0.005 * rng.standard_normal(examples)
    candidate = 1 + lost + lost_by_gain * (gain - 1) + noise
    return np.tile(gain + 1, (SEEDS, 1)), np.ones((SEEDS, examples)), candidate


@pytest.mark.parametrize("lost_by_gain", [0.0, 0.05])
def test_the_bounds_are_those_of_the_difference_where_the_margin_is_a_share(lost_by_gain):
    rng, above, below = np.random.default_rng(1), 0, 0
    for _ in range(DRAWS):
        base, best, candidate = drawn(rng, 0.05, lost_by_gain)
        [found] = compare({0: base, 1: candidate, 2: best}, np.ones(EXAMPLES)).ranks
        above += found.upper < 0.05
        below += found.lower > 0.05
    assert max(above, below) <= MOST


@pytest.mark.parametrize("by_gain", [0.02, 0.05])
def test_a_value_that_is_as_good_is_not_called_better_where_the_margin_is_a_share(by_gain):
    rng, better = np.random.default_rng(2), 0
    for _ in range(DRAWS):
        base, best, candidate = drawn(rng, 0.0, by_gain)
        [found] = compare({0: base, 1: best, 2: candidate}, np.ones(EXAMPLES), reference=1).ranks
        better += found.upper < 0
    assert better <= MOST


def test_of_several_ranks_that_are_better_by_just_the_margin_one_is_named_in_no_more_than_5_percent():
    rng, named = np.random.default_rng(5), 0
    for _ in range(DRAWS):
        base, best, _ = drawn(rng, 0.0, 0.0)
        ranks = {rank: drawn(rng, -0.05, 0.0)[2] for rank in (1, 2, 4, 8, 16)}
        named += bool(compare({0: base, **ranks, 32: best}, np.ones(EXAMPLES), 0.05).better)
    assert named <= MOST


def test_a_poor_reference_is_told_with_bounds_of_the_confidence_that_decides():
    rng = np.random.default_rng(6)
    base, best, better = drawn(rng, -0.1, 0.0)
    losses = {0: base, 1: better, **{rank: drawn(rng, 0.0, 0.0)[2] for rank in (2, 4, 8, 16)}, 32: best}
    found = sweep(of(losses), [1, 2, 4, 8, 16, 32], range(SEEDS), check_rates=False)
    own = estimate(better - best, np.ones(EXAMPLES), 0.99)
    assert f"(98 % interval {-own.upper:.4f} to {-own.lower:.4f})" in verdict(found)


def of(losses):
    """run(rank, seed, factor) that gives rows of these losses [S, N]."""

    def run(rank, seed, factor):
        own = losses[rank][seed]
        return RunResult(own, np.ones(len(own)), 1.0, max(rank, 0))

    return run


def test_a_rank_that_passes_though_its_interval_ends_above_the_margin_is_explained():
    base, best, candidate = drawn(np.random.default_rng(3), 0.047, 0.047)
    found = sweep(of({0: base, 1: candidate, 2: best}), [1, 2], range(SEEDS), check_rates=False)
    [compared] = found.comparisons.ranks
    assert compared.outcome == "passes"
    assert compared.upper > found.comparisons.margin
    assert "at most" not in verdict(found)
    assert f"{compared.lower:+.4f} to {compared.upper:+.4f}" in verdict(found)
    assert any(
        note.startswith("At r = 1 the interval of the difference and the test against δ disagree")
        for note in notes(found)
    )
    assert "but for the error of δ itself" in page(found, {"model": "m"})
    fixed = sweep(of({0: base, 1: candidate, 2: best}), [1, 2], range(SEEDS), margin=0.06, check_rates=False)
    assert not any("disagree" in note for note in notes(fixed))
    assert "but for the error of δ itself" not in page(fixed, {"model": "m"})


def test_a_loss_of_just_the_margin_against_full_fine_tuning_is_ruled_out_in_no_more_than_5_percent():
    rng, ruled_out = np.random.default_rng(4), 0
    for _ in range(DRAWS):
        base, best, full = drawn(rng, -0.05, 0.0, 60)
        near = best + 0.001 * rng.standard_normal(best.shape)
        found = sweep(
            of({0: base, 1: near, 2: best, FULL: full}), [1, 2], range(SEEDS), with_full=True, check_rates=False
        )
        ruled_out += any("is ruled out (95 %)" in note for note in notes(found))
    assert ruled_out <= MOST
