"""How much two adapters have in common: the share of one's main directions that lie among the other's.

For matrices V1, V2 [k, n] of orthonormal columns, φ = ‖V1ᵀ·V2‖_F² / n (Hu et al. 2021, section 7.2): 1 if both span the
same subspace, n/k in the mean for subspaces drawn at random. With the distance of projections d² = n - ‖V1ᵀ·V2‖_F² it
is φ = 1 - d²/n; where the paper prints (1 - d²)/n, that is a slip of the pen. The directions are the right singular
vectors of ΔW, those of the layer's input that the update answers to, the strongest first. All of it illustrates and
decides nothing.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.lora.low_rank import LowRank


def input_directions(update: LowRank) -> Tensor:
    """[k, q], q = min(r, d, k): the right singular vectors of ΔW with the largest singular values first, in fp64."""
    R_B = torch.linalg.qr(update.B.double(), mode="r").R
    Q_A, R_A = torch.linalg.qr(update.A.double().T)
    return Q_A @ torch.linalg.svd(R_B @ R_A.T, full_matrices=False).Vh.T


def similarities(one: Tensor, other: Tensor) -> Tensor:
    """[q]: φ of the first 1, 2, … q columns of both [k, ·], q the number of columns of the narrower."""
    q = min(one.shape[1], other.shape[1])
    squares = (one[:, :q].T @ other[:, :q]).square()
    return squares.cumsum(0).cumsum(1).diagonal() / torch.arange(1, q + 1)


@dataclass(frozen=True)
class Similarity:
    """Two adapters, compared module by module."""

    title: str
    """Which two."""
    sizes: tuple[int, ...]
    """n, how many of the strongest directions are compared."""
    kinds: dict[str, tuple[float, ...]]
    """Mean φ over the layers, by module type (the last part of the name)."""
    random: dict[str, tuple[float, ...]]
    """n/k, what subspaces drawn at random have in the mean."""


def compare_adapters(
    title: str, one: Mapping[str, LowRank], other: Mapping[str, LowRank], sizes: Sequence[int]
) -> Similarity:
    """Compare the updates of the modules that both adapt, at each of the `sizes` that both reach."""
    found: dict[str, list[Tensor]] = {}
    widths: dict[str, int] = {}
    for name, (kind, _) in types_and_layers(one.keys() & other.keys()).items():
        found.setdefault(kind, []).append(similarities(input_directions(one[name]), input_directions(other[name])))
        widths[kind] = one[name].shape[1]
    least = min((len(own) for values in found.values() for own in values), default=0)
    reached = tuple(size for size in sizes if size <= least)
    kinds = {
        kind: tuple(float(torch.stack([own[size - 1] for own in values]).mean()) for size in reached)
        for kind, values in found.items()
    }
    return Similarity(
        title, reached, kinds, {kind: tuple(n / width for n in reached) for kind, width in widths.items()}
    )


@dataclass(frozen=True)
class LayerMap:
    """A number for each adapted matrix, in rows of module types and columns of layers."""

    title: str
    """What the numbers are."""
    layers: tuple[str, ...]
    kinds: dict[str, tuple[float | None, ...]]
    """By module type, a number for each layer; None where the layer has no such module."""

    @property
    def values(self) -> list[float | None]:
        """All numbers."""
        return [value for row in self.kinds.values() for value in row]


def layer_map(title: str, values: Mapping[str, float]) -> LayerMap:
    """Sort the values of modules by what the modules are and where."""
    placed: dict[str, dict[str, float]] = {}
    for name, (kind, layer) in types_and_layers(values).items():
        placed.setdefault(kind, {})[layer] = values[name]
    layers = sorted({layer for own in placed.values() for layer in own}, key=lambda layer: int(layer or -1))
    kinds = {kind: tuple(own.get(layer) for layer in layers) for kind, own in placed.items()}
    return LayerMap(title, tuple(layers), kinds)


def types_and_layers(names: Collection[str]) -> dict[str, tuple[str, str]]:
    """(module type, layer) of each module, sorted by name.

    The layer is the first number in the name, "" where there is none; the type is what follows it, as many of its last
    parts as tell it from all other types. Where that is the same in two stacks of layers, as an encoder's and a
    decoder's, what precedes the number stands before it.
    """
    split, stacks = {}, {}
    for name in sorted(names):
        parts = name.split(".")
        layer = next((part for part in parts if part.isdigit()), "")
        place = parts.index(layer) if layer else 0
        split[name] = (".".join(parts[place + 1 :]) if layer else name), layer
        stacks[name] = ".".join(parts[:place])
    types = {kind for kind, _ in split.values()}
    twice = {kind for (kind, _), count in Counter(split.values()).items() if count > 1}

    def short(kind: str) -> str:
        parts = kind.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        return next((end for end in endings if sum(f".{other}".endswith(f".{end}") for other in types) == 1), kind)

    def told_apart(name: str, kind: str) -> str:
        return f"{stacks[name]}.{short(kind)}" if kind in twice else short(kind)

    return {name: (told_apart(name, kind), layer) for name, (kind, layer) in split.items()}
