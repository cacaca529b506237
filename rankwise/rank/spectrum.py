"""The singular values of ΔW, and its nearest update of a lower rank, from the factors alone."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.errors import ConfigError
from rankwise.lora.convolution import LoraConv
from rankwise.lora.embedding import LoraEmbedding
from rankwise.lora.layers import LoraLayer
from rankwise.lora.low_rank import LowRank

BARS = 16
"""Singular values that an illustration shows."""
_ROUNDING = 1e-7
"""Sizes below this share of a layer's largest are rounding errors of an fp64 eigenvalue."""


def singular_values(update: LowRank) -> Tensor:
    """The singular values of ΔW = scale·B·A, the largest first, in fp64: [min(r, d, k)].

    From two thin QRs, in O((d + k)·r² + r³) and without a dense ΔW: B = Q_B·R_B and Aᵀ = Q_A·R_A give
    ΔW = Q_B·(scale·R_B·R_Aᵀ)·Q_Aᵀ, and the small matrix in the middle has the same singular values.
    """
    R_B = torch.linalg.qr(update.B.double(), mode="r").R
    R_A = torch.linalg.qr(update.A.double().T, mode="r").R
    return torch.linalg.svdvals(R_B @ R_A.T * update.scale)


def effective_rank(sigma: Tensor) -> float:
    """exp of the entropy of the shares in the sum (Roy and Vetterli 2007); 0 for no update. It decides nothing."""
    total = sigma.sum()
    if total == 0:
        return 0.0
    share = sigma / total
    return torch.exp(-torch.xlogy(share, share).sum()).item()


def stable_rank(sigma: Tensor) -> float:
    """‖ΔW‖_F² / ‖ΔW‖₂²; 0 for no update. It decides nothing."""
    return 0.0 if sigma.sum() == 0 else (sigma.square().sum() / sigma.max().square()).item()


@dataclass(frozen=True)
class Directions:
    """ΔW = Σ_i u_i·(u_iᵀ·ΔW): its parts along orthonormal output directions, the one that matters most first."""

    sizes: Tensor
    """[q], q = min(r, d): the root of E‖u_iᵀ·ΔW·x‖², how far the part moves the layer's output; 0 for rounding."""
    outputs: Tensor
    """[d, q], the u_i"""
    inputs: Tensor
    """[q, k], the rows u_iᵀ·ΔW"""

    def truncated(self, rank: int) -> LowRank:
        """The first `rank` parts as an update of scale 1, its singular values in equal shares in A and B, in fp64."""
        Q, R = torch.linalg.qr(self.inputs[:rank].T)
        P, sigma, Wh = torch.linalg.svd(R.T, full_matrices=False)
        root = sigma.sqrt()
        return LowRank(root[:, None] * (Wh @ Q.T), self.outputs[:, :rank] @ P * root, 1.0)


def directions(update: LowRank, hidden: Tensor) -> Directions:
    """Split ΔW by how much each part does to the layer's output, for inputs x with E[(A·x)(A·x)ᵀ] = hidden [r, r].

    The parts are those of the singular value decomposition of ΔW·C^½, C = E[x·xᵀ], so the first n of them are the best
    update of rank n for these inputs: it minimises E‖(ΔW - ΔW_n)·x‖² (Eckart and Young in the metric of C).
    (ΔW·C^½)·(ΔW·C^½)ᵀ = scale²·B·hidden·Bᵀ, so neither C [k, k] nor its root is needed, and its left singular vectors
    alone give ΔW_n = U_n·U_nᵀ·ΔW, so nothing is inverted.
    """
    Q, R = torch.linalg.qr(update.B.double())
    inner = R * update.scale
    energy, vectors = torch.linalg.eigh(inner @ hidden.double() @ inner.T)
    sizes = energy.flip(0).clamp_min(0).sqrt()
    sizes = torch.where(sizes > _ROUNDING * sizes.max(), sizes, 0.0)
    vectors = vectors.flip(1)
    return Directions(sizes, Q @ vectors, vectors.T @ inner @ update.A.double())


@dataclass(frozen=True)
class Observed:
    """What passes through an adapted layer on calibration data."""

    hidden: Tensor
    """E[(A·x)(A·x)ᵀ] [r, r] over all places where the layer was applied, in fp64."""
    sensitivity: float
    """Σ‖g‖² / d over the places, g [d] the gradient of the loss by the layer's output there.

    A small change c of the outputs raises the loss by about ½·Σ(g·c)² (Fisher information in the place of the Hessian),
    which is ½·sensitivity·E‖c‖² if gradients point in all directions alike.
    """


def observe(layers: Mapping[str, LoraLayer], adapter: str, losses: Iterable[Tensor]) -> dict[str, Observed]:
    """Watch the layers while `losses` runs the model, batch by batch, each loss a sum over all that is counted.

    No parameter's gradient is touched. Raises ConfigError for layers that the model does not call, and where what it
    computes is not finite.
    """
    hidden = {name: torch.zeros((), dtype=torch.float64) for name in layers}
    sensitivity, places = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0)
    outputs: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[..., None]:
        def after_forward(layer: LoraLayer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            h = _hidden(layer, adapter, inputs[0]).detach().flatten(0, -2).double()
            hidden[name] = hidden[name].to(h.device) + h.T @ h
            places[name] += len(h)
            # In a frozen model nothing else would let gradients flow.
            outputs.append((name, output if output.requires_grad else output.requires_grad_()))

        return after_forward

    with ExitStack() as stack, torch.enable_grad():
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(note(name)).remove)
        for loss in losses:
            gradients = torch.autograd.grad(loss, [output for _, output in outputs], allow_unused=True)
            for (name, output), gradient in zip(outputs, gradients, strict=True):
                if gradient is not None:
                    d = output.shape[layers[name].output_dim]
                    sensitivity[name] += gradient.double().square().sum().item() / d
            outputs.clear()
    if unreached := [name for name, count in places.items() if not count]:
        raise ConfigError(
            "the model computes without calling these layers, so what their updates do cannot be observed: "
            + ", ".join(unreached[:5])
        )
    if wrong := [name for name in layers if not (hidden[name].isfinite().all() and math.isfinite(sensitivity[name]))]:
        raise ConfigError(
            f"what the model computes with this adapter is not finite (at {wrong[0]}): its updates are too large; look "
            "at their singular values with rankwise inspect"
        )
    return {name: Observed(hidden[name] / places[name], sensitivity[name]) for name in layers}


def _hidden(layer: LoraLayer, adapter: str, x: Tensor) -> Tensor:
    """A·x, [..., r] at every place where the layer is applied."""
    A, _ = layer.update(adapter).factors()
    if isinstance(layer, LoraEmbedding):
        return F.embedding(x, A.T) * getattr(layer.base, "embed_scale", 1.0)
    if isinstance(layer, LoraConv):
        return layer.base._conv_forward(x.to(A.dtype), A, None).movedim(layer.output_dim, -1)
    return F.linear(x.to(A.dtype), A)


def spread(worth: Mapping[str, Tensor], budget: int, least: int = 0) -> dict[str, int]:
    """The rank of each layer if the `budget` most worthy directions of all layers are kept, and `least` of each.

    worth: for each layer the worth of its directions, falling; 0 is never kept beyond `least`.
    """
    ranks = {name: min(least, len(own)) for name, own in worth.items()}
    rest = [(value, name) for name, own in worth.items() for value in own[ranks[name] :].tolist() if value > 0]
    for _, name in sorted(rest, key=lambda pair: -pair[0])[: max(0, budget - sum(ranks.values()))]:
        ranks[name] += 1
    return ranks


def sparkline(sigma: Tensor) -> str:
    """The first singular values as bars, the largest the highest; an illustration."""
    if len(sigma) == 0 or sigma.max() == 0:
        return ""
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * value))] for value in (sigma[:BARS] / sigma.max()).tolist())
