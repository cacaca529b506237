"""Adding an adapter into the weights (no extra work at inference) and going back to the very base."""

from dataclasses import dataclass

import torch
from torch import nn

from rankwise.errors import MergeError, listing
from rankwise.lora.base_weight import read_weight, working_dtype
from rankwise.lora.inject import ATTRIBUTE, injection, named_lora_layers, named_wrappers
from rankwise.lora.layers import TrainedCopy
from rankwise.lora.tied import sharing_names


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


def merge_(model: nn.Module, dtype: torch.dtype | None = None) -> MergeReport:
    """Let every adapted layer compute with W0 + ΔW, in place; the base tensors stay as they are and are kept.

    The sum is taken out of place in fp32 (fp64 over an fp64 base, or `dtype`) and rounded once. A weight that another
    module shares is given to the adapted layer alone: the other module never changes.
    Raises MergeError, before anything is changed, if already merged, if a weight cannot be read as a dense matrix or
    if a sum is not finite.
    """
    injection(model)
    layers = named_lora_layers(model)
    if any(layer.merged for _, layer in layers):
        raise MergeError("this adapter is already merged; go back first: rankwise.unmerge_(model)")
    sums, problems, untied, changed, lost = {}, [], [], 0, 0
    for name, layer in layers:
        weight = read_weight(layer.base)
        precision = dtype or working_dtype(weight)
        delta = layer.low_rank.delta(precision)
        merged = (weight.to(precision) + delta).to(weight.dtype)
        if not torch.isfinite(merged).all():
            problems.append(f"{name}: W0 + ΔW is not finite")
        moved = delta != 0
        changed += int(moved.sum())
        lost += int((moved & (merged == weight)).sum())
        if len(sharing_names(model, layer.base.weight)) > 1:
            untied.append(name)
        sums[name] = merged
    if problems:
        raise MergeError("the adapter cannot be merged; nothing was changed:\n" + listing(problems))
    for name, layer in layers:
        layer.merge(sums.pop(name))
    return MergeReport(changed, lost, tuple(untied))


def unmerge_(model: nn.Module) -> None:
    """Put back the very base tensors, bit for bit, and compute with the adapter beside them again."""
    injection(model)
    for _, layer in named_lora_layers(model):
        layer.unmerge()


def merge_and_remove_(model: nn.Module) -> MergeReport:
    """Make `model` a plain one that computes what base and adapter did together, in place; there is no way back.

    Raises what `merge_` raises.
    """
    report = merge_(model)
    for name, layer in named_wrappers(model):
        model.set_submodule(name, layer.trained if isinstance(layer, TrainedCopy) else layer.base, strict=True)
    delattr(model, ATTRIBUTE)
    return report
