"""The learning rate: its default, and its course over a run."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

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


def schedule_for(optimizer: Optimizer, config: TrainConfig, steps: int) -> LRScheduler:
    """An even rise to the highest rate, then `config.lr_schedule`; step it after each optimiser step.

    The first rate of w steps of warm-up is a w-th of the highest, so that no step trains at a rate of zero.
    """
    warm_up = max(1, round(config.warmup * steps))
    rise = LinearLR(optimizer, 1 / warm_up, total_iters=warm_up - 1)
    decay = steps - warm_up + 1
    match config.lr_schedule:
        case "linear":
            after = LinearLR(optimizer, 1.0, 0.0, decay)
        case "cosine":
            after = CosineAnnealingLR(optimizer, decay)
        case "constant":
            after = ConstantLR(optimizer, 1.0)
    return SequentialLR(optimizer, [rise, after], milestones=[warm_up - 1])
