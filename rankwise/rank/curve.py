"""The loss against the rank: what a few ranks say of those between them, and the curve L(r) = L∞ + c·r^-β."""

from collections.abc import Iterator, Mapping
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


def rank_within(losses: Mapping[int, float], margin: float) -> float:
    """The rank from which on the loss is at most `margin` above that at the largest; 1 where it is at all of them.

    Between two of the ranks the loss is taken as linear in log r.
    """
    ranks = sorted(losses)
    most = losses[ranks[-1]] + margin
    for below, above in zip(ranks[-2::-1], ranks[::-1], strict=False):
        if losses[below] > most:
            part = (losses[below] - most) / (losses[below] - losses[above])
            return below * (above / below) ** part
    return 1.0


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


def resampled(
    losses: Mapping[int, Array], counts: Array, seed: int = 0, draws: int = DRAWS
) -> Iterator[dict[int, float]]:
    """Mean losses by rank over resampled held-out examples, of summed `losses` [N] over `counts` [N] predictions."""
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        rows = generator.integers(len(counts), size=len(counts))
        yield {rank: float(own[rows].sum() / counts[rows].sum()) for rank, own in losses.items()}


def interval(values: list[float]) -> tuple[float, float]:
    """The middle 90 % of bootstrap values."""
    low, high = np.quantile(values, [0.05, 0.95])
    return float(low), float(high)
