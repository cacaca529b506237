"""The learning rate: its default, and its course over a run."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

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
    """transformers' schedule of the name; step it after each optimiser step.

    transformers begins a warm-up with a rate of zero, by which the first step would train nothing. Here a run begins at
    transformers' second step and has as many: its first rate is the highest one divided by the warm-up's steps.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    warm_up = max(1, round(config.warmup * steps))
    if config.lr_schedule == "constant":
        return get_constant_schedule_with_warmup(optimizer, warm_up, last_epoch=0)
    decay = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
    return decay[config.lr_schedule](optimizer, warm_up, steps + 1, last_epoch=0)
