"""The loss against the rank as a curve: L(r) = L∞ + c·r^-β, fitted to a few ranks."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from rankwise.rank.crossed import Array

DRAWS = 300
"""Bootstrap samples of the held-out examples."""
FLATTEST, STEEPEST = 0.05, 6.0
"""Bounds of β: less is a straight line over all ranks that one could try, more is flat from rank 2 on."""


@dataclass(frozen=True)
class Curve:
    """L(r) = limit + excess·r^-exponent, in nats."""

    limit: float
    excess: float
    exponent: float

    def loss(self, rank: float) -> float:
        return self.limit + self.excess * rank**-self.exponent

    def rank_within(self, margin: float, reference: float) -> float:
        """The rank at which the loss is `margin` above that at the rank `reference`; 1 where all ranks are nearer."""
        wanted = self.loss(reference) + margin - self.limit
        return max(1.0, (self.excess / wanted) ** (1 / self.exponent)) if self.excess > 0 else 1.0


def fit_curve(losses: Mapping[int, float]) -> Curve:
    """The curve of least squares through the losses by rank, with excess ≥ 0; at least three ranks.

    For a fixed exponent the other two follow in closed form, so one number is searched for.
    """
    if len(losses) < 3:
        raise ValueError(f"a curve with three unknowns needs the losses at three ranks, found {len(losses)}")
    ranks, values = np.array(list(losses), dtype=float), np.array(list(losses.values()))

    def at(exponent: float) -> tuple[float, Curve]:
        powers = ranks**-exponent
        centred = powers - powers.mean()
        excess = max(0.0, float(centred @ values / (centred @ centred)))
        curve = Curve(float(values.mean() - excess * powers.mean()), excess, exponent)
        return float(np.square(values - curve.limit - excess * powers).sum()), curve

    grid = np.geomspace(FLATTEST, STEEPEST, 16)
    best = int(np.argmin([at(exponent)[0] for exponent in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = optimize.minimize_scalar(lambda exponent: at(exponent)[0], bounds=bounds, method="bounded")
    return at(float(found.x))[1]


def bootstrap_curves(losses: Mapping[int, Array], counts: Array, seed: int = 0, draws: int = DRAWS) -> list[Curve]:
    """Curves fitted to resampled held-out examples: by rank the summed `losses` [N], over `counts` [N] predictions."""
    generator = np.random.default_rng(seed)
    curves = []
    for _ in range(draws):
        rows = generator.integers(len(counts), size=len(counts))
        curves.append(fit_curve({rank: float(own[rows].sum() / counts[rows].sum()) for rank, own in losses.items()}))
    return curves


def interval(values: list[float]) -> tuple[float, float]:
    """The middle 90 % of bootstrap values."""
    low, high = np.quantile(values, [0.05, 0.95])
    return float(low), float(high)
