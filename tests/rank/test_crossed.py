"""The statistics of a sweep, on simulated losses whose truth is known."""

import numpy as np
import pytest
from scipy import stats

from rankwise.rank.compare import MARGIN_SHARE_OF_GAIN, compare
from rankwise.rank.crossed import POWER, Components, estimate, largest_deviation, most_seeds_needed, needed

SEEDS, EXAMPLES = 5, 120
COUNTS = np.ones(EXAMPLES)
DRAWS = 300


def most_by_chance(draws: int, level: float = 0.05) -> int:
    """The count that a test of this level exceeds in one of 10,000 simulations."""
    return int(stats.binom.ppf(1 - 1e-4, draws, level))


def least_by_chance(draws: int, level: float) -> int:
    return int(stats.binom.ppf(1e-4, draws, level))


def losses(rng, true: dict[int, float], seed_noise=0.01, example_noise=0.1, noise=0.15, seeds=SEEDS, examples=EXAMPLES):
    """By rank [S, N]: how hard the example and the seed are, for all ranks alike, and each rank's own noise."""
    common = rng.normal(3, 0.7, examples) + rng.normal(0, 0.1, (seeds, 1))
    return {
        rank: common
        + loss
        + rng.normal(0, seed_noise, (seeds, 1))
        + rng.normal(0, example_noise, examples)
        + rng.normal(0, noise, (seeds, examples))
        for rank, loss in true.items()
    }


def paired_components(seed_noise=0.01, example_noise=0.1, noise=0.15) -> Components:
    return Components(2 * seed_noise**2, 2 * example_noise**2, 2 * noise**2)


def test_the_mean_is_that_over_all_counted_predictions():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 30, 40).astype(float)
    sums = rng.normal(2, 1, (3, 40)) * counts
    assert estimate(sums, counts).mean == pytest.approx(sums.sum() / (3 * counts.sum()))


def test_components_are_recovered_without_bias_and_give_the_variance_of_the_mean():
    rng = np.random.default_rng(1)
    found, means = [], []
    for _ in range(2000):
        values = rng.normal(0, 0.5, (6, 1)) + rng.normal(0, 1.5, (1, 20)) + rng.normal(0, 1, (6, 20))
        drawn = estimate(values, np.ones(20))
        found.append([drawn.components.seed, drawn.components.example, drawn.components.rest])
        means.append(drawn.mean)
    assert np.mean(found, axis=0) == pytest.approx([0.25, 2.25, 1], rel=0.06)
    expected = Components(0.25, 2.25, 1).standard_error(6, 20)
    assert np.std(means) == pytest.approx(expected, rel=0.06)


def test_without_a_second_source_of_noise_or_skew_the_bounds_are_those_of_a_t_test_over_examples():
    rng = np.random.default_rng(2)
    half = rng.normal(0, 1, 200)
    row = 0.3 + np.concatenate([half, -half])
    drawn = estimate(np.tile(row, (4, 1)), np.ones(400))
    low, high = stats.ttest_1samp(row, 0).confidence_interval(0.9)
    # Never nearer, and no further than the bootstrap's own chance, a few percent of the distance.
    assert low - 0.1 * (high - 0.3) <= drawn.lower <= low + 1e-9
    assert high - 1e-9 <= drawn.upper <= high + 0.1 * (high - 0.3)


@pytest.mark.parametrize(("examples", "before"), [(40, 0.09), (100, 0.07)])
def test_few_rows_that_get_much_worse_do_not_pass_much_more_often_than_stated(examples, before):
    rng = np.random.default_rng(examples)
    draws, with_t, passes = 600, 0, 0
    for _ in range(draws):
        rows = rng.standard_exponential(examples) ** 1.5
        true = 1.3293403881791368  # Γ(2.5)
        drawn = estimate(
            rows - true + rng.normal(0, 0.1, (3, 1)) + rng.normal(0, 0.3, (3, examples)), np.ones(examples)
        )
        passes += drawn.upper < 0
        with_t += drawn.mean + drawn.half_width < 0
    assert with_t > before * draws
    assert passes <= 0.75 * with_t


@pytest.mark.parametrize("size", [0.0, 1e-17, 1e-6])
def test_differences_that_hardly_vary_give_a_power_of_one_or_nought(size):
    parts = Components(size**2, size**2, size**2)
    assert parts.power(0.05, 2, 60) == pytest.approx(1)
    assert parts.power(-0.05, 2, 60) == pytest.approx(0)


def test_the_power_far_away_goes_on_where_that_of_the_noncentral_t_ends():
    for seeds in (2, 3, 6):
        near, far = (Components(1, 0, 0).power(d * seeds**-0.5, seeds, 100, 0.99) for d in (29.9, 30.1))
        assert far == pytest.approx(near, abs=0.01)


def test_the_seeds_called_for_reach_to_a_bound_that_covers_what_is_needed():
    rng = np.random.default_rng(10)
    examples, seeds = 200, 2
    true = Components(0.7, 4.0, 9.0)
    needs = next(n for n in range(2, 100) if true.power(1.0, n, examples) >= POWER)
    covered, draws = 0, 200
    for _ in range(draws):
        parts = rng.normal(0, 0.7**0.5, (seeds, 1)) + rng.normal(0, 2, examples) + rng.normal(0, 3, (seeds, examples))
        most = most_seeds_needed(estimate(parts, np.ones(examples)), 1.0)
        covered += most is None or most >= needs
    assert covered >= least_by_chance(draws, 0.75)


def test_a_loss_of_exactly_the_margin_passes_in_no_more_than_5_percent_of_sweeps():
    rng = np.random.default_rng(3)
    passes = share_passes = 0
    for _ in range(DRAWS):
        drawn = losses(rng, {0: 1.0, 4: 0.05, 8: 0.0})
        passes += compare(drawn, COUNTS, margin=0.05).ranks[0].outcome == "passes"
        # Five hundredths of a gain of one, measured on the same data.
        share_passes += compare(drawn, COUNTS).ranks[0].outcome == "passes"
    assert passes <= most_by_chance(DRAWS)
    assert share_passes <= most_by_chance(DRAWS)


def test_all_claims_of_a_sweep_together_keep_the_level_of_one():
    rng = np.random.default_rng(4)
    truth = {0: 1.0, 1: 0.05, 2: 0.05, 4: 0.05, 8: 0.05, 16: 0.0}
    wrong = sum(compare(losses(rng, truth), COUNTS, margin=0.05).sufficient < 16 for _ in range(DRAWS))
    assert wrong <= most_by_chance(DRAWS)


def test_equal_ranks_are_equivalent_in_95_percent_of_sweeps_that_are_large_enough_for_it():
    rng = np.random.default_rng(5)
    seeds, examples, margin = 8, 250, 0.06
    assert paired_components().power(margin, seeds, examples) > 0.98
    found = 0
    for _ in range(DRAWS):
        drawn = losses(rng, {0: 1.0, 4: 0.0, 8: 0.0}, seeds=seeds, examples=examples)
        found += compare(drawn, np.ones(examples), margin).saturates
    assert found >= least_by_chance(DRAWS, 0.95)


def test_a_loss_of_twice_the_margin_is_found_at_least_as_often_as_the_stated_power():
    rng = np.random.default_rng(6)
    margin = 0.06
    stated = paired_components().power(margin, SEEDS, EXAMPLES)
    assert stated > POWER
    found = wrongly_passed = 0
    for _ in range(DRAWS):
        drawn = compare(losses(rng, {0: 1.0, 4: 2 * margin, 8: 0.0}), COUNTS, margin).ranks[0]
        found += drawn.outcome == "worse"
        wrongly_passed += drawn.outcome == "passes"
    assert found >= least_by_chance(DRAWS, POWER)
    assert abs(found / DRAWS - stated) < 0.1
    assert wrongly_passed == 0


def test_the_numbers_of_seeds_and_of_examples_that_are_called_for_give_the_power_and_one_less_does_not():
    drawn = estimate(losses(np.random.default_rng(7), {0: 0.02})[0], COUNTS)
    for distance in (0.02, 0.05, 0.2):
        enough_seeds, enough_examples = needed(drawn, distance)
        for count, power in (
            (enough_seeds, lambda n, d=distance: drawn.components.power(d, n, EXAMPLES)),
            (enough_examples, lambda n, d=distance: drawn.components.power(d, SEEDS, n)),
        ):
            assert count is None or power(count) >= POWER
            assert count in (None, SEEDS, EXAMPLES) or power(count - 1) < POWER


def test_the_planned_deviation_gives_the_power_that_is_stated():
    for seeds in (2, 3, 5, 10):
        deviation = largest_deviation(seeds)
        assert Components(deviation**2, 0, 0).power(1.0, seeds, 1000) == pytest.approx(POWER, abs=1e-6)
        deviation = largest_deviation(seeds, 0.99)
        assert Components(deviation**2, 0, 0).power(1.0, seeds, 1000, 0.99) == pytest.approx(POWER, abs=1e-3)


def test_the_default_margin_is_a_share_of_the_gain_and_its_error_is_part_of_the_test():
    drawn = losses(np.random.default_rng(8), {0: 1.0, 4: 0.02, 8: 0.0})
    found = compare(drawn, COUNTS)
    assert found.margin == pytest.approx(MARGIN_SHARE_OF_GAIN * (found.base_loss - found.reference_loss))
    contrast = estimate(drawn[4] - drawn[8] - MARGIN_SHARE_OF_GAIN * (drawn[0] - drawn[8]), COUNTS)
    assert found.ranks[0].upper == pytest.approx(estimate(drawn[4] - drawn[8], COUNTS).upper)
    assert (found.ranks[0].outcome == "passes") == (contrast.upper < 0)


def test_the_row_of_passes_ends_at_the_first_rank_that_fails_even_if_a_smaller_one_would_pass():
    drawn = losses(np.random.default_rng(9), {0: 1.0, 1: 0.0, 2: 0.3, 4: 0.0, 8: 0.0})
    found = compare(drawn, COUNTS, margin=0.08)
    assert [r.outcome for r in found.ranks] == ["passes", "worse", "passes"]
    assert found.sufficient == 4
    assert found.below is found.of(2)
