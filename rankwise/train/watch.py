"""The held-out loss while a run trains: which adapter was best, and whether to go on."""

from collections.abc import Sequence
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.train.batches import Plan
from rankwise.train.config import TrainConfig

EVALUATIONS = 5
"""Most in a run, by default."""
MOST = 0.1
"""Of the training's work may go into them, by default."""
FORWARD = 1 / 3
"""The work of a forward pass alone, as a share of a training step's."""


def evaluation_interval(config: TrainConfig, plan: Plan[Any], held_out: Sequence[Any]) -> int:
    """Steps between two evaluations, 0 for none. The default counts tokens, not time, so that runs repeat.

    With a tenth of one file held out, the default evaluates a run of one epoch twice and one of two epochs five times.
    One evaluation would only be that of the end.
    """
    if not held_out:
        return 0
    if config.eval_steps is not None:
        return config.eval_steps
    one = FORWARD * sum(len(example.ids) for example in held_out)
    count = min(EVALUATIONS, int(MOST * plan.tokens / one))
    return ceil(len(plan) / count) if count > 1 else 0


class Watch:
    """Keeps a copy of the adapter that had the lowest held-out loss."""

    def __init__(self, parameters: Sequence[nn.Parameter], patience: int) -> None:
        self.parameters = parameters
        self.patience = patience
        self.best: list[Tensor] = []
        """A copy of the parameters."""
        self.best_loss, self.best_step, self.waited = inf, 0, 0
        """`waited`: evaluations since the best one."""

    def note(self, step: int, loss: float) -> None:
        """Take the adapter as it is now for the best if no other had so low a loss."""
        if loss < self.best_loss:
            self.best = [parameter.detach().clone() for parameter in self.parameters]
            self.best_loss, self.best_step, self.waited = loss, step, 0
        else:
            self.waited += 1

    @property
    def gave_up(self) -> bool:
        """Whether the last `patience` evaluations brought nothing better."""
        return 0 < self.patience <= self.waited

    @torch.no_grad()
    def take_best(self) -> None:
        """Give the adapter its best values back."""
        for parameter, value in zip(self.parameters, self.best, strict=True):
            parameter.copy_(value)
