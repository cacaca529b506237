"""Frozen weights prepared once for training: copies that make its products faster and cost their memory."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from rankwise.lora.frozen_product import prepare, runs_in_onednn
from rankwise.lora.layers import named_lora_layers
from rankwise.lora.linear import LoraLinear

COPIES = 2
"""Copies of each weight: one for the forward pass, one for the backward pass."""


def preparable(model: nn.Module) -> list[LoraLinear]:
    """The adapted layers whose products prepared copies of the weight make faster."""
    layers = [layer for _, layer in named_lora_layers(model) if isinstance(layer, LoraLinear)]
    return [x for x in layers if x.has_own_backward(x.base.weight.dtype) and runs_in_onednn(x.base.weight)]


@contextmanager
def prepared_weights(model: nn.Module, most_bytes: float) -> Iterator[None]:
    """Keep such copies while the block lasts, if all of them together take at most `most_bytes`.

    A weight that is replaced meanwhile is used as it is.
    """
    layers = preparable(model)
    if COPIES * sum(layer.base.weight.nbytes for layer in layers) > most_bytes:
        layers = []
    for layer in layers:
        layer.prepared = prepare(layer.base.weight)
    try:
        yield
    finally:
        for layer in layers:
            layer.prepared = None
