"""Before training: how many directions of each layer's gradient are the same on other data?

A whole gradient G [d, k] is never made. While B·A = 0 the gradients of an adapter are sketches of it (s: its scale):
    first pass    A random, N(0, 1)    ∂B = s·G·Aᵀ     of half a: Q, an orthonormal basis of where G_a's columns lie
    second pass   A = 0, B = Q         ∂A = s·Qᵀ·G     the gradients of both halves inside that basis
Both leave ΔW = 0, so the model computes as the base throughout. The batches are two independent halves a and b. What is
noise in one half is not in the other, so with Q·Qᵀ·G_a = U·S·Vᵀ the signal in its first n directions is the sum over
i ≤ n of S_i·u_iᵀ·G_b·v_i. Nothing of b may enter the basis: its noise would then be found in b again, as signal. The
randomised decomposition is that of Halko, Martinsson and Tropp 2011, arXiv 0909.4061.

This is one gradient, that of the base. It says which ranks are worth trying and never which one is enough.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rankwise.engine.engine import Engine
from rankwise.errors import ConfigError
from rankwise.lora.inject import DEFAULT_ADAPTER
from rankwise.lora.layers import LoraLayer
from rankwise.lora.linear import LoraLinear
from rankwise.lora.places import named_lora_layers
from rankwise.rank.nested import up_to_power_of_two

SIGNAL = 0.9
"""The share of the reproducible gradient inside the basis that a layer's rank must hold."""
LEAST_SHARE = 0.2
"""A layer whose halves agree less than this (as a cosine) has a gradient of mostly noise; its rank is not counted."""
BITS_PER_NUMBER = (1.7, 2.75)
"""What a trained number of a LoRA adapter was found to store (2026, arXiv 2607.21351)."""


@dataclass(frozen=True)
class LayerSignal:
    """The reproducible part of one layer's gradient."""

    name: str
    share: float
    """Cosine of the two halves' gradients: 1 is all signal, 0 all noise; what is not above 0 cannot be measured."""
    rank: int | None
    """Directions that hold 90 % of the signal; None if there is no signal, or more directions than were sketched."""
    sketched: int

    @property
    def counts(self) -> bool:
        return self.share >= LEAST_SHARE


@dataclass(frozen=True)
class Prediction:
    """A range of ranks worth trying. It is no result: only held-out loss at those ranks is."""

    layers: tuple[LayerSignal, ...]
    bits: float
    """What the training data hold at most: the base's loss on all of them."""
    numbers_per_rank: int
    """Σ(d + k)"""

    @property
    def range(self) -> tuple[float, float] | None:
        """From the (lower) median to the 90th percentile over the layers with a signal, as powers of two.

        None without a signal. An end is infinite where it falls on a layer that needs more directions than sketched.
        """
        ranks = sorted(math.inf if layer.rank is None else layer.rank for layer in self.layers if layer.counts)
        if not ranks:
            return None
        last = len(ranks) - 1
        low, high = (
            rank if rank == math.inf else up_to_power_of_two(rank)
            for rank in (ranks[last // 2], ranks[math.ceil(0.9 * last)])
        )
        return low, high

    @property
    def capacity(self) -> tuple[float, float]:
        """The ranks that could store all of the training data word for word, by what a trained number can hold."""
        least, most = BITS_PER_NUMBER
        return self.bits / (most * self.numbers_per_rank), self.bits / (least * self.numbers_per_rank)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an end of the range that is not known, because it is above what was sketched: None."""
        ends = self.range and [None if end == math.inf else end for end in self.range]
        return asdict(self) | {"range": ends, "capacity": self.capacity}

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        rows = [f"{'layer'.ljust(width)}  signal  rank of 90 % of it"]
        for layer in self.layers:
            found = f"more than {layer.sketched}" if layer.rank is None else str(layer.rank)
            rank = "no signal" if layer.share <= 0 else found
            weak = "" if layer.counts or layer.share <= 0 else "  (not counted)"
            rows.append(f"{layer.name.ljust(width)}  {layer.share:6.2f}  {rank}{weak}")
        low, high = (max(1, math.ceil(rank)) for rank in self.capacity)
        room = f"r = {low}" if low == high else f"r = {low} to {high}"
        return "\n".join(rows) + (
            f"\n\n{self._worth()}\nSecond opinion: the training data hold at most {self.bits:,.0f} bits; {room} could "
            "store all of them word for word.\nThis is a range to try and no result: whether a rank suffices shows in "
            "held-out loss alone (rankwise rank sweep)."
        )

    def _worth(self) -> str:
        if self.range is None:
            return "No layer's gradient is the same on both halves of the data; give more --signal-batches."
        low, high = self.range
        most = min((layer.sketched for layer in self.layers if layer.counts and layer.rank is None), default=0)
        ends = [f"more than {most}" if end == math.inf else f"{end:g}" for end in (low, high)]
        between = f"r = {' to '.join(dict.fromkeys(ends))}" if low < math.inf else f"more than r = {most}"
        more = "" if high < math.inf else " More --directions tell how much more."
        return f"Worth trying: {between} (median and 90th percentile over the layers with a signal).{more}"


def predict(
    engine: Engine[Any], halves: tuple[Sequence[Sequence[Any]], Sequence[Sequence[Any]]], seed: int
) -> list[LayerSignal]:
    """The reproducible rank of each layer's gradient, by two backward passes over the batches of both halves.

    The engine's model carries an adapter on linear layers; its rank is how many directions are looked for, and its
    values are overwritten. Raises ConfigError for other layers or an empty half.
    """
    layers = dict(named_lora_layers(engine.model))
    others = [name for name, layer in layers.items() if not isinstance(layer, LoraLinear)]
    if others:
        raise ConfigError(f"the prediction goes with linear layers alone, found {', '.join(others[:5])}")
    if not all(halves):
        raise ConfigError("the prediction needs at least one batch in each half of the data")
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        A = layer.update(DEFAULT_ADAPTER).lora_A
        _set(layer, torch.randn(A.shape, generator=generator, dtype=A.dtype), None)
    sketches = [_gradients(engine, layers, half, "lora_B") for half in halves]
    for name, layer in layers.items():
        _set(layer, None, torch.linalg.qr(sketches[0][name]).Q)
    inside = [_gradients(engine, layers, half, "lora_A") for half in halves]
    return [
        layer_signal(name, (sketches[0][name], sketches[1][name]), (inside[0][name], inside[1][name]))
        for name in layers
    ]


def layer_signal(name: str, sketches: tuple[Tensor, Tensor], inside: tuple[Tensor, Tensor]) -> LayerSignal:
    """Of one layer: sketches G·Aᵀ [d, w] and gradients Qᵀ·G [q, k] of both halves (any common scale), Q of the first.

    Noise turns every direction of the basis away from the signal, so 90 % are meant of what lies inside it. That less
    than 90 % of all signal lies there tells of directions beyond the sketch only where more than half of it is needed.
    """
    d, width = sketches[0].shape
    signal = float((sketches[0] * sketches[1]).sum()) / width
    size = float(sketches[0].norm() * sketches[1].norm()) / width
    share = signal / size if size > 0 else 0.0
    held = _held(*inside)
    most = float(held.max())
    if signal <= 0 or most <= 0:
        return LayerSignal(name, min(share, 0.0), None, width)
    rank = int((held >= SIGNAL * most).nonzero()[0]) + 1
    beyond = width < min(d, inside[0].shape[1]) and most < SIGNAL * signal and 2 * rank > width
    return LayerSignal(name, share, None if beyond else rank, width)


def _held(own: Tensor, other: Tensor) -> Tensor:
    """Signal that the first 1, 2, … directions of one half find in the other half."""
    U, sigma, Vh = torch.linalg.svd(own.double(), full_matrices=False)
    return (sigma * ((U.T @ other.double()) * Vh).sum(1)).cumsum(0)


def _set(layer: LoraLayer, A: Tensor | None, B: Tensor | None) -> None:
    """Set the factors, None: to zero; B goes into as many columns as it has."""
    update = layer.update(DEFAULT_ADAPTER)
    with torch.no_grad():
        update.lora_A.zero_() if A is None else update.lora_A.copy_(A)
        update.lora_B.zero_() if B is None else update.lora_B[:, : B.shape[1]].copy_(B)


def _gradients(
    engine: Engine[Any], layers: dict[str, LoraLayer], batches: Iterable[Sequence[Any]], factor: str
) -> dict[str, Tensor]:
    """The sum of the gradients of one factor of every layer, without its scale."""
    for layer in layers.values():
        update = layer.update(DEFAULT_ADAPTER)
        for name in ("lora_A", "lora_B"):
            getattr(update, name).requires_grad_(name == factor).grad = None
    for batch in batches:
        engine.loss(batch).backward()
    found = {}
    for name, layer in layers.items():
        update = layer.update(DEFAULT_ADAPTER)
        parameter = getattr(update, factor)
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / update.scale
        parameter.grad = None
    return found
