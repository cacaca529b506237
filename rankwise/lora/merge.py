"""Adding adapters into the weights (no extra work at inference) and going back to the very base."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.errors import ConfigError, MergeError, listing
from rankwise.lora.base_weight import is_offloaded, rounded
from rankwise.lora.inject import check_outside_blocks, injection, let_train
from rankwise.lora.layers import LoraLayer
from rankwise.lora.places import ATTRIBUTE, merged_adapters, named_lora_layers, named_wrappers, replace_
from rankwise.lora.tied import storage_counts, storage_of
from rankwise.lora.trained import TokenRows


@dataclass(frozen=True)
class MergeReport:
    """What rounding to the weights' own type did to the update."""

    changed_by_update: int
    """Entries of all adapted matrices where ΔW is not zero."""
    lost_to_rounding: int
    """Those of them that the sum W0 + ΔW left unchanged."""
    untied: tuple[str, ...]
    """Merged weights that another module shared; that module keeps the base values."""

    @property
    def lost_share(self) -> float:
        return self.lost_to_rounding / max(self.changed_by_update, 1)


@torch.no_grad()
def merge_(
    model: nn.Module, adapters: str | Sequence[str] | None = None, dtype: torch.dtype | None = None
) -> MergeReport:
    """Let every adapted layer compute with W0 + Σ weight·ΔW, in place; the base tensors stay as they are and are kept.

    `adapters`: which of those at work to merge (None: all); the others go on working beside the weight.
    The sum is taken out of place in fp64 (`dtype` for another type) and rounded once. A weight that another
    module shares is given to the adapted layer alone: the other module never changes.
    Raises MergeError, before anything is changed, if already merged, if a weight cannot be read as a dense matrix, if a
    sum is not finite, or if a DoRA adapter would be left beside; ConfigError for an adapter that is not at work, or in
    a block of `adapters_off`.
    """
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise MergeError("the weights are spread over processes (FSDP); merge into a model that is in one place")
    active = injection(model).active
    check_outside_blocks(model)
    names = list(active) if adapters is None else [adapters] if isinstance(adapters, str) else list(adapters)
    if idle := [name for name in names if name not in active]:
        raise ConfigError(f"{', '.join(idle)}: not at work; activate it first: rankwise.activate_")
    chosen = {name: active[name] for name in names}
    layers = [(name, layer) for name, layer in named_lora_layers(model) if chosen.keys() & layer.shares.keys()]
    if merged_adapters(model):
        raise MergeError("this model already holds merged adapters; go back first: rankwise.unmerge_(model)")
    for _, layer in layers:
        refuse_dora_beside_merged(layer, active, chosen)
    sharers = storage_counts(model)
    sums, problems, untied, changed, lost = {}, [], [], 0, 0
    for name, layer in layers:
        try:
            _check_parameters(layer, chosen)
            weight = layer.base_matrix()
            matrix, bias, moved = _merged(layer, weight, chosen, dtype or torch.float64)
        except MergeError as error:
            problems.append(f"{name}: {error}")
            continue
        if not torch.isfinite(matrix).all():
            problems.append(f"{name}: W0 + ΔW is not finite")
        changed += int(moved.sum())
        lost += int((moved & (matrix == weight)).sum())
        if sharers[storage_of(layer.own(layer.weight_name))] > 1:
            untied.append(name)
        sums[name] = matrix, bias
    if problems:
        raise MergeError("the adapter cannot be merged; use it beside the unchanged base:\n" + listing(problems))
    for name, layer in layers:
        matrix, bias = sums.pop(name)
        layer.merge(matrix, bias, chosen)
    let_train(model)
    return MergeReport(changed, lost, tuple(untied))


def _check_parameters(layer: LoraLayer, adapters: Iterable[str]) -> None:
    """Raise MergeError if a sum cannot take the place of the layer's weight, or of its bias where that is needed."""
    own = layer.base._parameters
    if is_offloaded(layer.base):
        raise MergeError("its weight is offloaded (accelerate); merge into a model that is in memory")
    if layer.weight_name not in own:
        raise MergeError(
            f"its {layer.weight_name} is no parameter but computed from others (torch's parametrizations, weight_norm, "
            "pruning), so a sum would not stay; make it one first (remove_parametrizations, remove_weight_norm, "
            "prune.remove)"
        )
    updates = [layer.update(name) for name in adapters if name in layer.shares]
    if layer.bias_name not in own and any(update.lora_bias is not None for update in updates):
        raise MergeError(f"lora_bias needs a bias to be merged into, and its {layer.bias_name} is no parameter")


def _merged(
    layer: LoraLayer, weight: Tensor, adapters: dict[str, float], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The merged matrix and bias of a layer, rounded to the base's types, and where ΔW is not zero."""
    delta, bias = torch.zeros((), dtype=dtype, device=weight.device), None
    for name, factor in adapters.items():
        if name in layer.shares:
            delta = delta + layer.delta(name, dtype) * factor
            if (own := layer.bias_delta(name, dtype)) is not None:
                bias = own * factor if bias is None else bias + own * factor
    base_bias = layer.own(layer.bias_name)
    if bias is not None and base_bias is not None:
        bias = rounded(base_bias.detach().to(dtype) + bias, base_bias.dtype)
    elif bias is not None:
        bias = rounded(bias, weight.dtype)
    return rounded(weight.to(dtype) + delta, weight.dtype), bias, delta != 0


def refuse_dora_beside_merged(layer: LoraLayer, active: Iterable[str], merged: Container[str]) -> None:
    """Raise MergeError if, with these adapters merged, a DoRA one among the active would work beside them.

    DoRA needs what the base itself computes, which a merged base no longer does.
    """
    beside = [name for name in active if name in layer.shares and name not in merged]
    if any(layer.update(name).magnitude is not None for name in beside):
        raise MergeError(
            f"{', '.join(beside)}: a DoRA adapter cannot work beside a merged one; merge both, or unmerge first"
        )


def unmerge_(model: nn.Module) -> None:
    """Put back the very base tensors, bit for bit, and compute with the adapters beside them again.

    Raises ConfigError in a block of `adapters_off`.
    """
    injection(model)
    check_outside_blocks(model)
    for _, layer in named_lora_layers(model):
        layer.unmerge()
    let_train(model)


def merge_and_remove_(model: nn.Module) -> MergeReport:
    """Make `model` a plain one that computes what base and adapters at work did together, in place; no way back.

    Raises what `merge_` raises.
    """
    report = merge_(model)
    tables: dict[TokenRows, nn.Parameter] = {}
    for _, layer in named_wrappers(model):
        if isinstance(layer, TokenRows) and layer.active:
            if layer.owner not in tables:
                tables[layer.owner] = nn.Parameter(layer.trained_table().detach(), requires_grad=False)
            layer.base.weight = tables[layer.owner]
    replace_(model, {layer: layer.chosen() for _, layer in named_wrappers(model)})
    delattr(model, ATTRIBUTE)
    return report
