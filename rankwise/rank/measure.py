"""Held-out losses example by example."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from rankwise.engine.engine import Engine
from rankwise.lora.inject import set_adapter_training
from rankwise.rank.crossed import Array

BATCH = 16
"""Rows in one forward pass."""


@torch.no_grad()
def per_example(
    engine: Engine[Any], examples: Sequence[Any], on_progress: Callable[[str], None] = lambda text: None
) -> tuple[Array, Array]:
    """([N] losses in nats, summed over an example's trained tokens, [N] how many those are), in the given order."""
    set_adapter_training(engine.model, False)
    # Packed rows share what they begin with; padded ones should be equally long.
    order = sorted(range(len(examples)), key=lambda i: examples[i].ids if engine.packs else (len(examples[i].ids),))
    losses, counts = np.empty(len(examples)), np.empty(len(examples))
    for start in range(0, len(order), BATCH):
        on_progress(f"{start}/{len(order)}")
        part = order[start : start + BATCH]
        summed, counted = engine.example_losses([examples[index] for index in part])
        losses[part], counts[part] = summed.double().cpu(), counted.cpu()
    return losses, counts
