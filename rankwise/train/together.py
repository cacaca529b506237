"""Several adapters of one base trained at once: each as it would train alone, in one pass over the base."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import ConfigError
from rankwise.lora.adapters import activate_
from rankwise.lora.layers import named_lora_layers
from rankwise.train.loop import Step, Training, steps_of

MOST_TOKENS = 1024
"""TODO"""


def train_together(
    trainings: Sequence[Training], stopped: Callable[[], bool] = lambda: False
) -> Iterator[tuple[Training, Step]]:
    """Train several adapters of one model, each as it would alone, up to rounding; yields the steps of all.

    A step computes the batches of all in one pass over the base. Each training was made while its own adapter was the
    one at work (as `inject_` leaves it), and has its own rows, plan, optimiser and end. One whose loss is no longer
    finite ends with the reason in its `failed`; the others go on.
    Raises ConfigError, before any step, if they cannot share a pass.
    """
    reason = why_not_together(trainings)
    if reason:
        raise ConfigError(f"these adapters cannot train together: {reason}")
    engine, smoothing = trainings[0].engine, trainings[0].label_smoothing

    def losses(batches: Mapping[Training, Sequence[Any]]) -> list[Tensor]:
        return engine.losses({_adapter(training): batch for training, batch in batches.items()}, smoothing)

    activate_(engine.model, _adapter(trainings[0]))
    yield from steps_of(trainings, losses, stopped)


def why_not_together(trainings: Sequence[Training]) -> str | None:
    """Why these trainings cannot share a pass over the base; None if they can. A short pass is tried."""
    problems = list(_problems(trainings))
    if problems:
        return "; ".join(problems)
    short = {_adapter(training): [training.plan[0][0][0].short()] for training in trainings}
    try:
        with torch.no_grad():
            trainings[0].engine.losses(short)
    except ConfigError as error:
        return str(error)
    return None


def at_once(tokens: float) -> int:
    """How many trainings should share a pass, each with so many tokens a batch, to be fastest."""
    return max(1, round(MOST_TOKENS / tokens))


def _adapter(training: Training) -> str:
    return next(iter(training.adapters))


def _problems(trainings: Sequence[Training]) -> Iterator[str]:
    if any(list(training.adapters.values()) != [1.0] for training in trainings):
        yield "each must train one adapter by itself, no sum of several and not the whole model"
        return
    adapters = [_adapter(training) for training in trainings]
    if len(set(adapters)) < len(adapters):
        yield f"each must train an adapter of its own, found {', '.join(adapters)}"
    if any(training.engine is not trainings[0].engine for training in trainings):
        yield "all must be of one model and its engine"
    if len({training.label_smoothing for training in trainings}) > 1:
        yield "all must have the same label_smoothing"
    layers = named_lora_layers(trainings[0].engine.model)
    if any(layer.update(name).dropout for _, layer in layers for name in adapters if name in layer.shares):
        yield "lora_dropout would draw other masks than in a run by itself"
