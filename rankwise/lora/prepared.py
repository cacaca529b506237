"""What is prepared once for training: copies of frozen weights, and layers that compute together."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.lora.frozen_product import prepare, runs_in_onednn
from rankwise.lora.linear import LoraLinear
from rankwise.lora.places import named_lora_layers
from rankwise.lora.shared_input import SharedInput

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


@contextmanager
def shared_inputs(model: nn.Module, run: Callable[[], Any]) -> Iterator[None]:
    """Let layers that get the same input compute together while the block lasts; `run` runs the model once to see."""
    groups = _called_together(model, run)
    for group in groups:
        shared = SharedInput(group)
        for layer in group:
            layer.shared_input = shared
    try:
        yield
    finally:
        for group in groups:
            for layer in group:
                layer.shared_input = None


def _called_together(model: nn.Module, run: Callable[[], Any]) -> list[list[LoraLinear]]:
    """Layers that are called once each, one after the other, with the same input."""
    calls: list[tuple[Any, Tensor]] = []

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls.append((layer, inputs[0]))

    with ExitStack() as hooks:
        for _, layer in named_lora_layers(model):
            if isinstance(layer, LoraLinear):
                hooks.callback(layer.register_forward_pre_hook(note).remove)
        with torch.no_grad():
            run()
    # The calls keep their inputs alive, so no two of them have the same identity.
    groups = [[layer for layer, _ in group] for _, group in groupby(calls, key=lambda call: id(call[1]))]
    often = [layer for layer, _ in calls]
    return [group for group in groups if len(group) > 1 and all(often.count(layer) == 1 for layer in group)]
