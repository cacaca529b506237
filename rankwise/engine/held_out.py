"""Held-out losses example by example."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rankwise.engine.engine import Engine
from rankwise.lora.inject import set_adapter_training


@torch.no_grad()
def per_example(
    engine: Engine[Any], examples: Sequence[Any], on_progress: Callable[[str], None] = lambda text: None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """([N] losses in nats, summed over an example's trained tokens, [N] how many those are), in the given order."""
    set_adapter_training(engine.model, False)
    losses, counts, done = np.empty(len(examples)), np.empty(len(examples)), 0
    for part in engine.evaluation_batches(examples):
        on_progress(f"{done}/{len(examples)}")
        done += len(part)
        summed, counted = engine.example_losses([examples[index] for index in part])
        losses[part], counts[part] = summed.double().cpu(), counted.cpu()
    return losses, counts
