"""One training whose adapter, cut after its first k directions, is an adapter of rank k for every k.

Each step draws a rank k of 1, 2, 4, … r_max and trains the adapter cut to its first k directions (DyLoRA, Valipour et
al. 2022, arXiv 2210.07558). So the loss of every cut adapter is what is trained, in the mean; a fixed diagonal between
A and B (MatryoshkaLoRA, 2026, arXiv 2605.07850) costs as little but trains the sum of all cut adapters at once, and
none of the losses that are then read off. Steps with small k do less work than ordinary ones, so all costs one
training and a few evaluations.

Adam moves every direction equally far, and an ordinary adapter's scale lora_alpha / r keeps the sum over the directions
the same for every r. Here it has to be nearly the same for every k: direction j counts 1/2^⌈log₂ j⌉, so that each
doubling of k adds half of what the first direction counts, and the sum is half of an ordinary adapter's at k = 1 and
twice at k = 64. The estimate errs high: the directions of a cut adapter also had to serve the other ranks.
"""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from rankwise.engine.engine import Engine
from rankwise.errors import ConfigError
from rankwise.lora.inject import DEFAULT_ADAPTER, adapters_off
from rankwise.lora.linear import LoraLinear
from rankwise.lora.places import named_lora_layers
from rankwise.rank.compare import MARGIN_SHARE_OF_GAIN
from rankwise.rank.crossed import Array
from rankwise.rank.curve import DRAWS, Curve, fit_curve, interval, rank_within, resampled
from rankwise.rank.paired import ExampleLosses, measure, units

L = TypeVar("L", float, Array)

ASTRAY = 0.5
"""Of what the best rank gains, the share that the largest may lose again: noise is less, a diverged run is more."""


class NestedEngine:
    """An engine for the training loop: each step's loss is that of the adapter cut to a rank drawn anew."""

    def __init__(self, engine: Engine[Any], ranks: Sequence[int], seed: int) -> None:
        """Raises ConfigError if the model's adapter is on other than linear layers."""
        others = [name for name, layer in named_lora_layers(engine.model) if not isinstance(layer, LoraLinear)]
        if others:
            raise ConfigError(f"the nested run goes with linear layers alone, found {', '.join(others[:5])}")
        self.model, self.inner, self._ranks = engine.model, engine, list(ranks)
        self._draw, self._has_begun = random.Random(seed), False

    def begin_step(self) -> None:
        """Draw the rank that all batches of the step train."""
        self._has_begun = True
        cut_(self.model, self._draw.choice(self._ranks))

    def loss(self, examples: Sequence[Any], label_smoothing: float = 0.0) -> Tensor:
        """That of the adapter as it is cut. Raises RuntimeError where no step has begun."""
        if not self._has_begun:
            raise RuntimeError("a loop that trains a nested run calls begin_step() before the batches of each step")
        return self.inner.loss(examples, label_smoothing)

    def logits(self, examples: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Those of the adapter as it is cut."""
        return self.inner.logits(examples)


def cut_(model: nn.Module, rank: int | None) -> None:
    """Let only the first `rank` directions of the adapter work, each with its weight; None: all, equally."""
    for _, layer in named_lora_layers(model):
        update = layer.update(DEFAULT_ADAPTER)
        update.directions = None if rank is None else update.lora_B.new_tensor(direction_weights(rank)) * update.r


def direction_weights(rank: int) -> list[float]:
    """What each of so many directions counts, as a share of lora_alpha."""
    return [0.5 / 2 ** (j - 1).bit_length() for j in range(1, rank + 1)]


def nested_ranks(largest: int) -> list[int]:
    """1, 2, 4, … and the largest itself."""
    return sorted({*(2**n for n in range(largest.bit_length()) if 2**n <= largest), largest})


def losses_by_rank(
    engine: Engine[Any], examples: Sequence[Any], ranks: Sequence[int], base: Array | None = None
) -> tuple[dict[int, Array], Array]:
    """Summed held-out losses [N] of the base (0) and of the adapter cut to each rank, and what they count [N].

    Examples that ask the same are one of N, as intervals may not take them for independent. `base`: the base's losses,
    where they are known; else those without the adapter, a head that it trains included.
    """
    same = units(examples)
    losses: dict[int, ExampleLosses] = {}
    try:
        for rank in ranks:
            cut_(engine.model, rank)
            losses[rank] = measure(engine, examples).by_unit(same)
    finally:
        cut_(engine.model, None)
    if base is None:
        with adapters_off(engine.model):
            base = measure(engine, examples).by_unit(same).sums
    return {0: base} | {rank: own.sums for rank, own in losses.items()}, losses[ranks[0]].counts


@dataclass(frozen=True)
class Nested:
    """The estimate from one nested run. Its intervals know of the held-out examples alone: one run has one seed."""

    losses: dict[int, float]
    """Mean held-out loss by rank, 0: the base."""
    curve: Curve
    limit: tuple[float, float]
    """90 % interval of the curve's limit L∞."""
    exponent: tuple[float, float]
    margin: float
    """5 % of the gain of the largest rank over the base."""
    rank: float
    """Where the measured losses come within the margin of that of the largest rank."""
    rank_interval: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = "\n".join(f"{rank or 'base':>6}  {loss:.4f}" for rank, loss in self.losses.items())
        largest = max(self.losses)
        low, high = (min(up_to_power_of_two(value), largest) for value in self.rank_interval)
        between = f"r = {high}" if low == high else f"r = {low} to {high}"
        return (
            f"  rank  held-out loss of the nested run\n{rows}\n\n"
            f"L(r) = {self.curve.limit:.4f} + {self.curve.excess:.4f}·r^-{self.curve.exponent:.2f}; 90 % intervals: "
            f"limit {self.limit[0]:.4f} to {self.limit[1]:.4f}, exponent {self.exponent[0]:.2f} to "
            f"{self.exponent[1]:.2f}.\n"
            f"The loss comes within δ = {self.margin:.4f} nats of r = {largest} at {between}.\n"
            "This errs high: an adapter trained for one rank alone is usually better than the nested one cut to it "
            "(ranks planted in a small model were read up to 1.6 times too high). "
            f"{self._rise()}It is one run with one seed; confirm the rank with rankwise rank sweep."
        )

    def _rise(self) -> str:
        """A warning where the largest ranks, against which all are measured, are not the best."""
        largest = max(self.losses)
        best = min(self.losses, key=self.losses.__getitem__)
        if self.losses[largest] - self.losses[best] <= self.margin / 2:
            return ""
        return (
            f"But here the loss rises again above r = {best}: the larger ranks trained worse than they would alone, "
            "and the rank may be read too low; a lower --lr or --r tells. "
        )


def nested(
    engine: Engine[Any],
    train: Callable[[NestedEngine], object],
    held_out: Sequence[Any],
    largest: int,
    seed: int = 0,
    stage: Callable[[str], AbstractContextManager[object]] = nullcontext,
    base: Array | None = None,
) -> Nested:
    """Train the adapter of rank `largest` that the engine's model carries at all ranks at once, and measure each.

    `train(engine)` does the training. A loop of its own calls engine.begin_step() before the batches of each step: then
    their loss is that of a rank drawn anew. The adapter's scale should be lora_alpha / r; afterwards it is of no use.
    `stage(name)` is entered around each of the two parts.
    `base`: [N] summed losses of the base by `rankwise.rank.paired.units`; without them the base is measured without the
    adapter, and then a head that the adapter trains counts as a gain of the ranks.
    Raises ConfigError for an adapter on other than linear layers, or for losses that say nothing (`nested_estimate`).
    """
    ranks = nested_ranks(largest)
    _check_number(ranks)
    with stage(f"training the ranks {', '.join(map(str, ranks))} at once"):
        train(NestedEngine(engine, ranks, seed))
    with stage("measuring every rank"):
        losses, counts = losses_by_rank(engine, held_out, ranks, base)
    return nested_estimate(losses, counts, seed)


def nested_estimate(losses: Mapping[int, Array], counts: Array, seed: int = 0, draws: int = DRAWS) -> Nested:
    """The curve through the nested run's losses [N] by rank.

    The margin is measured too, so it is drawn anew with the rest. Raises ConfigError with fewer than three ranks, if
    the examples do not show that the largest rank gained anything over the base, or if it lost most of it again.
    """
    _check_number(_without_base(losses))
    means = {rank: float(own.sum() / counts.sum()) for rank, own in sorted(losses.items())}
    by_rank = _without_base(means)
    largest = max(by_rank)
    samples = list(resampled(losses, counts, seed, draws))
    least, _ = interval([sample[0] - sample[largest] for sample in samples])
    if least <= 0:
        raise ConfigError(
            f"the nested run did not lower the held-out loss as far as {len(counts)} examples can tell (base "
            f"{means[0]:.4f}, r = {largest} {means[largest]:.4f}; 95 % lower bound of the gain {least:+.4f}), so it "
            "says nothing on ranks; train longer or with another --lr, or hold out more rows"
        )
    best = min(by_rank, key=by_rank.__getitem__)
    if means[largest] - means[best] > ASTRAY * (means[0] - means[best]):
        raise ConfigError(
            f"the nested run went astray at its larger ranks: held-out loss {means[best]:.4f} at r = {best}, but "
            f"{means[largest]:.4f} at r = {largest}, which holds the same directions and more; lower --lr or --r"
        )
    curves = [fit_curve(_without_base(sample)) for sample in samples]
    margin = _margin(means)
    return Nested(
        means,
        fit_curve(by_rank),
        interval([drawn.limit for drawn in curves]),
        interval([drawn.exponent for drawn in curves]),
        margin,
        rank_within(by_rank, margin),
        interval([rank_within(_without_base(sample), _margin(sample)) for sample in samples]),
    )


def _without_base(by_rank: Mapping[int, L]) -> dict[int, L]:
    return {rank: own for rank, own in by_rank.items() if rank > 0}


def _margin(means: Mapping[int, float]) -> float:
    """A share of the gain; 0 in a sample where there is none."""
    return max(0.0, MARGIN_SHARE_OF_GAIN * (means[0] - means[max(means)]))


def _check_number(ranks: Collection[int]) -> None:
    if len(ranks) < 3:
        found = ", ".join(map(str, ranks))
        raise ConfigError(f"the curve needs three ranks, so --r of at least 3; found the ranks {found}")


def up_to_power_of_two(rank: float) -> int:
    return 2 ** max(0, int(np.ceil(np.log2(rank) - 1e-9)))
