"""Every rank against the largest one, by held-out losses of paired runs: which ranks do as well, within a margin?

Settings that have no order (modules, lora_alpha, learning rates) are compared in the same way with one of them. Then no
row of tests can be fixed beforehand, and each of K comparisons has the confidence 1 - 5 %/K, so that all together have
95 % (Bonferroni).

The margin δ is either a number of nats or a share of the gain that the largest rank brings over the base. A share is
not put in as a known number: d[s, i] = loss of rank r - loss of r_max - δ[s, i] is tested against 0 as one mean, so
that the error of the measured gain is part of the test. The interval of the difference itself does not know δ; so with
a share a rank may pass although its interval ends above δ, and the other way round.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rankwise.rank.crossed import CONFIDENCE, Array, Estimate, estimate

MARGIN_SHARE_OF_GAIN = 0.05
"""Of the gain over the base of the largest rank, or of the adapter that is cut: the default margin δ."""

Outcome = Literal["passes", "cannot tell", "worse"]


@dataclass(frozen=True)
class Comparison:
    """One rank against the reference. Bounds are one-sided, 95 % for ranks and more for settings without an order."""

    rank: int
    loss: float
    """Mean over all trained tokens (texts for classification), in nats."""
    difference: float
    """Its loss minus that of the reference."""
    lower: float
    """Bound of the difference, whatever δ is."""
    upper: float
    """Bound of the difference; with lower, a 90 % interval where bounds are of 95 %."""
    outcome: Outcome
    """passes: worse by less than δ, with 95 % confidence. worse: by more than δ, as sure. Else the data cannot tell."""
    equivalent: bool
    """Neither worse nor better by δ, both with 95 % confidence (two one-sided tests, Schuirmann 1987)."""
    better: bool
    """Better by more than δ, with 95 % confidence for all ranks together: then the reference is a poor one."""
    jointly: Estimate
    """Of the difference, with bounds of that joint confidence."""
    beyond_margin: Estimate
    """Of the difference minus δ, which decides."""


@dataclass(frozen=True)
class Comparisons:
    """All ranks below the largest (all settings but one), which is the reference, fixed beforehand."""

    reference: int
    reference_loss: float
    base_loss: float
    margin: float
    """δ, in nats."""
    gain: Estimate
    """Of the reference over the base."""
    ranks: tuple[Comparison, ...]
    """In ascending order, without the reference."""

    @property
    def sufficient(self) -> int:
        """The smallest rank of the unbroken row of passes from the largest rank downwards.

        The order of the tests is fixed, and the first that fails ends them; so all claims together have the level of
        one, 5 %, without a correction (Westfall and Krishen 2001). The reference itself where no other rank passes.
        """
        passed = self.reference
        for comparison in reversed(self.ranks):
            if comparison.outcome != "passes":
                break
            passed = comparison.rank
        return passed

    @property
    def better(self) -> list[Comparison]:
        """Those that are better than the reference by more than δ."""
        return [comparison for comparison in self.ranks if comparison.better]

    def of(self, rank: int) -> Comparison:
        return next(comparison for comparison in self.ranks if comparison.rank == rank)

    @property
    def below(self) -> Comparison | None:
        """The rank at which the row of passes ended; None if it never did."""
        smaller = [comparison for comparison in self.ranks if comparison.rank < self.sufficient]
        return smaller[-1] if smaller else None

    @property
    def saturates(self) -> bool:
        """Whether every rank from the sufficient one on is equivalent to the largest."""
        above = [comparison for comparison in self.ranks if comparison.rank >= self.sufficient]
        return bool(above) and all(comparison.equivalent for comparison in above)


def compare(
    losses: Mapping[int, Array], counts: Array, margin: float | None = None, reference: int | None = None
) -> Comparisons:
    """Compare every rank with the largest, or, with a `reference`, every setting (by number) with that one.

    `losses`: by rank (0: the base) the summed losses [S, N] of S seeds on N examples, the same seeds and examples for
    all ranks. `counts` [N]: how many predictions each sum holds. `margin`: δ in nats; None: 5 % of the gain over the
    base. S and N must be at least 2.
    """
    joint = joint_confidence(len(losses.keys() - {0}) - 1)
    confidence = CONFIDENCE if reference is None else joint
    reference = max(losses) if reference is None else reference
    best, base = losses[reference], losses[0]
    allowed = allowed_loss(base, best, counts, margin)
    compared = []
    for rank in sorted(losses.keys() - {0, reference}):
        difference = losses[rank] - best
        own, over, under = (estimate(difference + limit, counts, confidence) for limit in (0.0, -allowed, allowed))
        # Whether any is better asks all ranks in no order, which their fixed order does not cover.
        own_jointly, under_jointly = (estimate(difference + limit, counts, joint) for limit in (0.0, allowed))
        passes = over.upper < 0
        outcome: Outcome = "passes" if passes else "worse" if over.lower > 0 else "cannot tell"
        compared.append(
            Comparison(
                rank,
                _mean(losses[rank], counts),
                own.mean,
                own.lower,
                own.upper,
                outcome,
                passes and under.lower > 0,
                under_jointly.upper < 0,
                own_jointly,
                over,
            )
        )
    gain, delta = estimate(base - best, counts), _mean(allowed, counts)
    return Comparisons(reference, _mean(best, counts), _mean(base, counts), delta, gain, tuple(compared))


def allowed_loss(base: Array, best: Array, counts: Array, margin: float | None) -> Array:
    """δ of each example [S, N], summed as the losses [S, N] of the base and of the reference are."""
    return MARGIN_SHARE_OF_GAIN * (base - best) if margin is None else np.broadcast_to(margin * counts, best.shape)


def joint_confidence(comparisons: int) -> float:
    """Of each of so many, with which all together have 95 % (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / comparisons


def _mean(sums: Array, counts: Array) -> float:
    return float(sums.sum() / (len(sums) * counts.sum()))
