"""One adapter from several: the exact weighted sum of their ΔW, TIES and DARE, at a rank of choice."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from rankwise.errors import ConfigError, listing
from rankwise.lora.adapters import check_names, check_weights
from rankwise.lora.config import LoraConfig, exact_patterns
from rankwise.lora.inject import inject_, injection
from rankwise.lora.layers import LoraLayer
from rankwise.lora.places import named_lora_layers, named_wrappers

Method = Literal["sum", "ties", "dare", "dare_ties"]


@dataclass(frozen=True)
class CombineReport:
    """How much of the combined ΔW the new adapter holds."""

    ranks: dict[str, int]
    """The rank of the new update of each module."""
    lost: dict[str, float]
    """‖ΔW - s·B·A‖ / ‖ΔW‖ of each module (Frobenius): what its rank was too small for."""

    @property
    def most_lost(self) -> float:
        return max(self.lost.values(), default=0.0)


@torch.no_grad()
def combine_adapters_(
    model: nn.Module,
    weights: Mapping[str, float],
    adapter: str,
    r: int | None = None,
    method: Method = "sum",
    density: float = 0.5,
    generator: torch.Generator | None = None,
) -> CombineReport:
    """Make a new adapter out of the adapters in `weights`, in place, and let it work.

    "sum": Σ weight·ΔW, by QR and SVD of the stacked factors, without a dense ΔW for plain LoRA; without `r` every rank
    is the sum of the sources' and nothing is lost. "ties" (Yadav et al. 2023, arXiv 2306.01708) keeps of each ΔW the
    `density` share that is largest, elects a sign for each entry and averages what agrees. "dare" (Yu et al. 2023,
    arXiv 2311.03099) drops all but a `density` share at random (drawn from `generator`), scales the rest up and sums.
    "dare_ties" drops at random, then elects. These three work on the dense ΔW of one module after the other, and need
    `r`. A DoRA source counts with all that it changes in the weight, so it has full rank and needs `r` too. Where a
    matrix cannot have rank `r`, its update has what it can.
    Raises ConfigError, with every problem at once, for what cannot be combined; the model is then as it was.
    """
    check_weights(weights)
    check_names(model, weights)
    layers = {name: layer for name, layer in named_lora_layers(model) if weights.keys() & layer.shares.keys()}
    _check(model, layers, weights, r, method, density)
    factors, lost = {}, {}
    for name, layer in layers.items():
        own = {source: weight for source, weight in weights.items() if source in layer.shares}
        stacked = _stacked(layer, own) if method == "sum" else None
        if stacked is None:
            A, B, lost[name] = _compress_dense(layer, _dense(layer, own, method, density, generator), r)
        else:
            A, B, lost[name] = _compress(*stacked, None if r is None else _share(layer, r))
        factors[name] = A, B
    ranks = {name: _rank(layer, factors[name][0]) for name, layer in layers.items()}
    configs = injection(model).configs
    inject_(model, _config(layers, ranks, [configs[source] for source in weights]), adapter=adapter)
    for name, layer in layers.items():
        layer.set_row_factors(layer.update(adapter), *factors[name])
    return CombineReport(ranks, lost)


def _check(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    weights: Mapping[str, float],
    r: int | None,
    method: Method,
    density: float,
) -> None:
    problems = [] if weights else ["name at least one"]
    for name, place in named_wrappers(model):
        if not place.lora_layers() and (both := place.adapters() & weights.keys()):
            problems.append(f"{name}: {', '.join(sorted(both))} train it in full or in part, which has no sum")
    updates = [
        (name, layer.update(source)) for name, layer in layers.items() for source in weights if source in layer.shares
    ]
    problems += [f"{name}: a bias of B cannot be combined" for name, update in updates if update.lora_bias is not None]
    if any(bias.adapter in weights for bias in injection(model).biases):
        problems.append("an adapter that trains the model's biases cannot be combined")
    if r is None and (method != "sum" or any(update.magnitude is not None for _, update in updates)):
        problems.append("r is needed: the combined change has full rank (DoRA, TIES, DARE)")
    if r is not None and (not isinstance(r, int) or r < 1):
        problems.append(f"r must be a whole number of at least 1, found {r!r}")
    if method not in ("sum", "ties", "dare", "dare_ties"):
        problems.append(f'method must be "sum", "ties", "dare" or "dare_ties", found {method!r}')
    if not isinstance(density, int | float) or not 0 < density <= 1:
        problems.append(f"density must lie in (0, 1], found {density!r}")
    problems += [
        f"{name}: there are values that are not finite (NaN or infinite)"
        for name, update in updates
        if not all(torch.isfinite(parameter).all() for parameter in update.parameters())
    ]
    if problems:
        raise ConfigError("these adapters cannot be combined:\n" + listing(problems))


def _stacked(layer: LoraLayer, weights: Mapping[str, float]) -> tuple[Tensor, Tensor] | None:
    """A and B of Σ weight·ΔW one below and beside the other, or None if a source changes the weight otherwise."""
    updates = [(layer.update(source), weight) for source, weight in weights.items()]
    if any(update.magnitude is not None for update, _ in updates):
        return None
    pairs = [(layer.row_factors(update), update.scale * weight) for update, weight in updates]
    As = torch.cat([A for (A, _), _ in pairs], dim=-2)
    Bs = torch.cat([B * factor for (_, B), factor in pairs], dim=-1)
    return As, Bs


def _compress(A: Tensor, B: Tensor, r: int | None) -> tuple[Tensor, Tensor, float]:
    """Factors of B·A at rank r (None: all that it has) nearest in the Frobenius norm, and the share of it lost."""
    r = min(A.shape[-1], B.shape[-2]) if r is None else r
    if r >= A.shape[-2]:
        return A, B, 0.0
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    core_A, core_B, lost = _truncate(R_B @ R_A.mT, r)
    return core_A @ Q_A.mT, Q_B @ core_B, lost


def _compress_dense(layer: LoraLayer, delta: Tensor, r: int | None) -> tuple[Tensor, Tensor, float]:
    stacked = delta.view(layer.stacks, -1, delta.shape[1]) if layer.stacks > 1 else delta
    return _truncate(stacked, _share(layer, r or 1))


def _truncate(matrix: Tensor, r: int) -> tuple[Tensor, Tensor, float]:
    """A and B of a matrix (or a stack of them) at rank r, its singular values in equal parts, and the share lost."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    lost = (S[..., r:].square().sum() / S.square().sum().clamp_min(torch.finfo(S.dtype).tiny)).sqrt().item()
    root = S[..., :r].sqrt()
    return root[..., None] * Vh[..., :r, :], U[..., :r] * root[..., None, :], lost


def _dense(
    layer: LoraLayer, weights: Mapping[str, float], method: Method, density: float, generator: torch.Generator | None
) -> Tensor:
    """The combined ΔW [d, k] of one layer in fp64."""
    deltas = torch.stack([layer.delta(source, torch.float64) for source in weights])
    factors = torch.tensor([*weights.values()], dtype=torch.float64, device=deltas.device)[:, None, None]
    if method.startswith("dare"):
        kept = torch.rand(deltas.shape, generator=generator, dtype=torch.float64).to(deltas.device) < density
        deltas = deltas * kept / density
    if method == "ties":
        count = max(1, round(density * deltas[0].numel()))
        least = deltas.abs().flatten(1).kthvalue(deltas[0].numel() - count + 1, dim=1).values
        deltas = deltas * (deltas.abs() >= least[:, None, None])
    weighted = deltas * factors
    if method in ("sum", "dare"):
        return weighted.sum(0)
    agrees = (weighted.sign() == weighted.sum(0).sign()) & (weighted != 0)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def _share(layer: LoraLayer, r: int) -> int:
    """The rank of one of a layer's independent blocks: a convolution's groups divide r, experts have r each.

    It is at most what the layer can have.
    """
    A, B = layer.factor_shapes(layer.groups)
    return max(1, min(r, prod(A[1:]), B[0]) // layer.groups)


def _rank(layer: LoraLayer, A: Tensor) -> int:
    return A.shape[-2] * layer.groups


def _config(layers: Mapping[str, LoraLayer], ranks: Mapping[str, int], sources: Sequence[LoraConfig]) -> LoraConfig:
    """A configuration in which every update has its own rank and the scale 1; base and task are those of the sources
    that name one, where these agree; a task whose head would train is none, as no source trains one here."""
    tasks = {source.task_type for source in sources if not source.task_heads} - {None}
    bases = {source.base_model_name_or_path for source in sources} - {None}
    modules = [name for name, layer in layers.items() if layer.is_module and not layer.inside_attention]
    r = max(ranks.values())
    # An attention's output projection has the settings of the attention, whose ranks are the same.
    ranks = {name: rank for name, rank in ranks.items() if not layers[name].inside_attention}
    own = exact_patterns({name: rank for name, rank in ranks.items() if rank != r}, ranks)
    return LoraConfig(
        task_type=tasks.pop() if len(tasks) == 1 else None,
        base_model_name_or_path=bases.pop() if len(bases) == 1 else None,
        r=r,
        lora_alpha=r,
        target_modules="|".join(map(re.escape, modules)) if modules else (),
        target_parameters=[name for name, layer in layers.items() if not layer.is_module] or None,
        rank_pattern=own,
        alpha_pattern=own,
    )
