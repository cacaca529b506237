"""The learning rate: its default, and its course over a run."""

from collections.abc import Callable
from functools import partial
from math import cos, pi

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rankwise.train.config import TrainConfig

FULL_FINE_TUNING = 1e-4
"""A usual highest rate for training all weights of a small model."""
SHORT_RUN = 100
"""Steps."""


def default_rate(steps: int) -> float:
    """Ten times full fine-tuning's rate, and fifteen times for a run of fewer than 100 steps, whatever the rank.

    Source: Schulman et al., LoRA Without Regret, 2025: the best rate was 9.8 times full fine-tuning's over 14 models,
    about 15 times in short runs, and moved by less than a factor of two between the ranks 4 and 512.
    """
    return FULL_FINE_TUNING * (10 if steps >= SHORT_RUN else 15)


def schedule_for(optimizer: Optimizer, config: TrainConfig, steps: int) -> LambdaLR:
    """Multiplies the optimiser's rates by `factor`; step it after each optimiser step."""
    warm_up = max(1, round(config.warmup * steps))
    return LambdaLR(optimizer, partial(factor, steps=steps, warm_up=warm_up, shape=SHAPES[config.lr_schedule]))


def factor(step: int, steps: int, warm_up: int, shape: Callable[[float], float]) -> float:
    """The share of the highest rate at a step (from 0): it rises evenly for `warm_up` steps, then follows `shape`."""
    if step < warm_up:
        return (step + 1) / warm_up
    return shape((steps - step) / max(1, steps - warm_up + 1))


SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: (1 - cos(pi * left)) / 2,
    "constant": lambda left: 1.0,
}
"""The share of the highest rate by the share of the steps after the warm-up that is left."""
