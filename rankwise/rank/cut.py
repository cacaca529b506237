"""An adapter's updates exchanged for ones of other ranks, in place."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from torch import nn

from rankwise.errors import ConfigError, listing
from rankwise.lora.config import LoraConfig, exact_patterns
from rankwise.lora.convolution import LoraConv
from rankwise.lora.embedding import LoraEmbedding
from rankwise.lora.inject import injection, set_active
from rankwise.lora.layers import LoraLayer
from rankwise.lora.linear import LoraLinear
from rankwise.lora.low_rank import LowRank
from rankwise.lora.places import named_lora_layers

Reader = Literal["vllm", "llama.cpp"]
"""What will read an adapter beside PEFT. vLLM applies one factor to all modules, llama.cpp divides lora_alpha by each
module's own rank; where ranks differ, a file suits one of them."""


def cuttable_layers(model: nn.Module, adapter: str) -> dict[str, LoraLayer]:
    """The layers with an update of this adapter. Raises ConfigError, with all reasons, if one cannot be cut."""
    layers = {name: layer for name, layer in named_lora_layers(model) if adapter in layer.shares}
    problems = []
    for name, layer in layers.items():
        update = layer.update(adapter)
        if update.magnitude is not None:
            problems.append(f"{name}: DoRA's magnitudes belong to the full ΔW; merge it, or train plain LoRA")
        if update.lora_bias is not None:
            problems.append(f"{name}: B has a bias (lora_bias), which is no part of a rank")
        if not isinstance(layer, LoraLinear | LoraEmbedding | LoraConv):
            kind = type(layer).__name__
            problems.append(f"{name}: a {kind} cannot be cut; linear layers, embeddings and convolutions can")
        elif layer.groups > 1:
            problems.append(f"{name}: a convolution with {layer.groups} groups shares its rank among them")
    if not layers:
        problems.append("it has no low-rank update")
    if problems:
        raise ConfigError("this adapter cannot be shrunk:\n" + listing(problems))
    return layers


def set_updates_(
    model: nn.Module, layers: Mapping[str, LoraLayer], updates: Mapping[str, LowRank], adapter: str, reader: Reader
) -> None:
    """Let these be the low-rank updates of an adapter, in place; layers without one lose theirs."""
    injected = injection(model)
    active = dict(injected.active)
    r = max(update.rank for update in updates.values())
    own = exact_patterns({name: update.rank for name, update in updates.items() if update.rank != r}, updates)
    config: LoraConfig = replace(
        injected.configs[adapter],
        r=r,
        lora_alpha=r,
        rank_pattern=own,
        alpha_pattern=own if reader == "vllm" else {},
        use_rslora=False,
        init_lora_weights=True,
    )
    for name, layer in layers.items():
        layer.remove(adapter)
        if name in updates:
            layer.add(adapter, config, name, draw=False)
            update, low_rank = layer.update(adapter), updates[name]
            root = math.sqrt(low_rank.scale / update.scale)
            layer.set_row_factors(update, low_rank.A * root, low_rank.B * root)
    injected.configs[adapter] = config
    set_active(model, active)


@contextmanager
def put_back_on_error(model: nn.Module, layers: Mapping[str, LoraLayer], adapter: str) -> Iterator[None]:
    """Give the adapter its own updates again if the block raises."""
    injected = injection(model)
    config, active = injected.configs[adapter], dict(injected.active)
    shares = {name: layer.shares[adapter] for name, layer in layers.items()}
    try:
        yield
    except BaseException:
        for name, layer in layers.items():
            layer.remove(adapter)
            layer.shares[adapter] = shares[name]
        injected.configs[adapter] = config
        set_active(model, active)
        raise
