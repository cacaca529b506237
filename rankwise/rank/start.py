"""The starts that make runs at different ranks pairs: a smaller adapter begins as the first rows of the largest one."""

from dataclasses import replace

import torch
from torch import nn

from rankwise.lora.adapters import delete_adapter_
from rankwise.lora.config import LoraConfig
from rankwise.lora.inject import DEFAULT_ADAPTER, inject_
from rankwise.lora.places import named_lora_layers
from rankwise.lora.report import InjectReport


@torch.no_grad()
def inject_nested_(
    model: nn.Module, config: LoraConfig, largest: int, seed: int, adapter: str = DEFAULT_ADAPTER
) -> InjectReport:
    """`inject_`, but A (and B) begin as the first rows (columns) of the adapter of rank `largest` drawn by `seed`.

    So the run at rank r starts from the same values for every larger rank that it is compared with.
    """
    whole = f"{adapter}-whole"
    inject_(model, replace(config, r=largest), torch.Generator().manual_seed(seed), whole)
    drawn = {name: layer.update(whole) for name, layer in named_lora_layers(model) if whole in layer.shares}
    delete_adapter_(model, whole)
    report = inject_(model, config, adapter=adapter)
    for name, layer in named_lora_layers(model):
        if adapter in layer.shares:
            update = layer.update(adapter)
            A, B = drawn[name].lora_A, drawn[name].lora_B
            update.set(A[: update.lora_A.shape[0]], B[:, : update.lora_B.shape[1]])
    return report


def freeze_updates_(model: nn.Module, adapter: str = DEFAULT_ADAPTER) -> None:
    """Let the low-rank updates stay as they are, so that a task head alone trains."""
    for _, layer in named_lora_layers(model):
        if adapter in layer.shares:
            layer.update(adapter).requires_grad_(False)
