"""Do the sweep's statistics keep what they promise, over many shapes of noise?

Simulated losses of S seeds × N examples, with noise of the seed, of the example and of both, in several proportions,
each scaled so that a rank as good as the largest passes with a power of 0.9:
    level       a rank that is worse by exactly δ passes (to be at most 5 %)
    family      four such ranks, and any of them passes (to be at most 5 %)
    equivalent  a rank as good as the largest is declared equivalent, with twice the data of the plan (at least 95 %)
    found       a rank that is worse by 2δ is found worse (at least 80 %)
A share that misses its limit by more than chance (99.9 % binomial bound over the draws) is marked.

Rows may also differ with a skew: a few get much worse at a lower rank, most do not. No bound from so few rows keeps its
level then, so these shapes have no limit: the level is shown beside that of a plain t bound.

    python benchmarks/rank_statistics.py --draws 1000

The last line is JSON.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from rankwise.rank.compare import compare
from rankwise.rank.crossed import Array, Components, estimate

CASES = {  # (seeds, examples): shares of the variance of the difference that are the seed's, the example's, the rest's
    (5, 500): [(0.0, 1.0, 0.0), (0.8, 0.1, 0.1), (0.3, 0.4, 0.3), (0.0, 0.2, 0.8)],
    (3, 200): [(0.1, 0.8, 0.1), (0.8, 0.1, 0.1), (0.3, 0.4, 0.3)],
    (8, 100): [(0.3, 0.4, 0.3), (0.8, 0.1, 0.1)],
}
MARGIN = 1.0
POWER = 0.9
SHAPES: dict[str, Callable[[np.random.Generator, int], Array]] = {
    # Of what the rows lose at a lower rank, with a mean of MARGIN and no upper end.
    "normal": lambda rng, rows: MARGIN * rng.normal(1, 1, rows),
    "exponential": lambda rng, rows: MARGIN * rng.standard_exponential(rows),
    "lognormal 1.5": lambda rng, rows: MARGIN * rng.lognormal(-(1.5**2) / 2, 1.5, rows),
    "one row in 20": lambda rng, rows: np.where(rng.random(rows) < 1 / 20, 20 * MARGIN, 0.0),
}
SKEWED_SEEDS, SKEWED_ROWS = (2, 5), (20, 50, 120, 500)


@dataclass(frozen=True)
class Noise:
    """Standard deviations of one rank's own noise; a difference of two ranks has twice the variance."""

    seed: float
    example: float
    rest: float

    @property
    def of_difference(self) -> Components:
        return Components(2 * self.seed**2, 2 * self.example**2, 2 * self.rest**2)


def scaled(shares: tuple[float, float, float], seeds: int, examples: int) -> Noise:
    """Noise whose parts have these shares in the variance of a mean, so large that the power is POWER."""

    def of_size(size: float) -> Noise:
        """Noise whose mean over all has the standard deviation `size`."""
        of_one_mean = size * np.array(shares) ** 0.5
        return Noise(*(of_one_mean * np.array([seeds, examples, seeds * examples]) ** 0.5).tolist())

    def missing(size: float) -> float:
        return of_size(size).of_difference.power(MARGIN, seeds, examples) - POWER

    return of_size(float(optimize.root_scalar(missing, bracket=(1e-3, 10)).root))


def simulate(
    rng: np.random.Generator, noise: Noise, seeds: int, examples: int, true: dict[int, float]
) -> dict[int, Array]:
    common = rng.normal(0, 5, examples) + rng.normal(0, 1, (seeds, 1))
    return {
        rank: common
        + loss
        + rng.normal(0, noise.seed, (seeds, 1))
        + rng.normal(0, noise.example, examples)
        + rng.normal(0, noise.rest, (seeds, examples))
        for rank, loss in true.items()
    }


def measure(seeds: int, examples: int, shares: tuple[float, float, float], draws: int) -> dict[str, float]:
    rng = np.random.default_rng([seeds, examples, *(round(100 * share) for share in shares)])
    noise = scaled(shares, seeds, examples)
    counts = dict.fromkeys(("level", "family", "equivalent", "found"), 0)
    truth = {0: 20 * MARGIN, 1: MARGIN, 2: MARGIN, 4: MARGIN, 8: MARGIN, 16: 0.0}
    for _ in range(draws):
        at_margin = compare(simulate(rng, noise, seeds, examples, truth), np.ones(examples), MARGIN)
        counts["level"] += at_margin.of(8).outcome == "passes"
        counts["family"] += at_margin.sufficient < 16
        larger = 2 * seeds, 2 * examples
        equal = simulate(rng, noise, *larger, {0: 20 * MARGIN, 8: 0.0, 16: 0.0})
        counts["equivalent"] += compare(equal, np.ones(larger[1]), MARGIN).saturates
        double = simulate(rng, noise, seeds, examples, {0: 20 * MARGIN, 8: 2 * MARGIN, 16: 0.0})
        counts["found"] += compare(double, np.ones(examples), MARGIN).of(8).outcome == "worse"
    return {name: count / draws for name, count in counts.items()}


def level_with_skew(shape: str, seeds: int, rows: int, draws: int) -> dict[str, float]:
    """How often a rank that is worse by exactly δ passes, and how often it would by a t bound."""
    rng = np.random.default_rng([seeds, rows, *shape.encode()])
    passes = by_t = 0
    for _ in range(draws):
        noise = rng.normal(0, 0.3 * MARGIN, (seeds, 1)) + rng.normal(0, 0.3 * MARGIN, (seeds, rows))
        found = estimate(SHAPES[shape](rng, rows) + noise - MARGIN, np.ones(rows))
        passes += found.upper < 0
        by_t += found.mean + found.half_width < 0
    return {"level": passes / draws, "level of a t bound": by_t / draws}


def misses(shares: dict[str, float], draws: int) -> list[str]:
    """The promises that a simulation misses by more than chance."""
    most = stats.binom.ppf(0.999, draws, 0.05) / draws
    least = {"equivalent": stats.binom.ppf(0.001, draws, 0.95), "found": stats.binom.ppf(0.001, draws, 0.8)}
    over = [name for name in ("level", "family") if shares[name] > most]
    return over + [name for name, count in least.items() if shares[name] < count / draws]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000)
    draws = parser.parse_args().draws
    rows, missed = [], 0
    for (seeds, examples), proportions in CASES.items():
        for shares in proportions:
            found = measure(seeds, examples, shares, draws)
            bad = misses(found, draws)
            missed += len(bad)
            rows.append({"seeds": seeds, "examples": examples, "noise of seed, example, rest": shares, **found})
            print(json.dumps(rows[-1]), f"MISSED: {', '.join(bad)}" if bad else "", flush=True)
    worst = max(row["level"] for row in rows)
    for shape, seeds, examples in itertools.product(SHAPES, SKEWED_SEEDS, SKEWED_ROWS):
        found = level_with_skew(shape, seeds, examples, draws)
        print(json.dumps({"rows differ as": shape, "seeds": seeds, "examples": examples, **found}), flush=True)
    print(json.dumps({"draws": draws, "cases": len(rows), "missed": missed, "worst level": worst}))


if __name__ == "__main__":
    main()
