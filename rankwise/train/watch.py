"""The held-out loss while a run trains: which adapter was best, and whether to go on."""

from collections.abc import Sequence
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.train.batches import Plan
from rankwise.train.config import TrainConfig

EVALUATIONS = 5
"""By default a run has at most so many: early stopping waits for three, so fewer would never end a run early."""
FEWEST_ROWS = 50
"""By default an evaluation takes at least so many held-out rows, where there are so many."""
EVALUATION_BUDGET = 0.1
"""By default the evaluations of a run may do this share of the work of its training."""
FORWARD_SHARE = 1 / 3
"""A forward pass alone does this share of the work of a training step."""


def evaluations(config: TrainConfig, plan: Plan[Any], held_out: Sequence[Any]) -> tuple[int, Sequence[Any]]:
    """Steps between two evaluations (0: none), and the rows of each. The default counts tokens, so that runs repeat.

    By default as many of the rows, at even distances, as may be evaluated five times; fewer times where these would be
    too few rows. One evaluation would only be that of the end.
    """
    if not held_out or config.eval_steps is not None:
        return config.eval_steps or 0, held_out
    most = EVALUATION_BUDGET / FORWARD_SHARE * plan.tokens
    share = most / EVALUATIONS / sum(len(example.ids) for example in held_out)
    count = min(len(held_out), max(FEWEST_ROWS, int(share * len(held_out))))
    rows = [held_out[number * len(held_out) // count] for number in range(count)]
    times = min(EVALUATIONS, int(most / sum(len(example.ids) for example in rows)))
    return (ceil(len(plan) / times) if times > 1 else 0), rows


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

    def take_best(self) -> None:
        """Give the adapter its best values back."""
        set_values_(self.parameters, self.best)


@torch.no_grad()
def set_values_(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Give each parameter the value of its shape that stands in its place."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
