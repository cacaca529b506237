"""Several adapters of one base trained at once: each as it would train alone, in one pass over the base."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import ConfigError
from rankwise.lora.adapters import activate_
from rankwise.lora.inject import set_adapter_training
from rankwise.lora.places import named_lora_layers
from rankwise.train.loop import Step, Training, steps_of

MOST_TOKENS = 800
"""Of a pass that several trainings share by default. Two of 488 tokens each ran no faster than one after the other
(1.01 times, SmolLM2-135M), two of 350 hardly (1.04, MiniLM), four of about 100 clearly (1.15 and 1.34); and a pass
holds the activations of all its tokens at once."""


def train_together(
    trainings: Sequence[Training], stopped: Callable[[], bool] = lambda: False
) -> Iterator[tuple[Training, Step]]:
    """Train several adapters of one model, each as it would alone, up to rounding; yields the steps of all.

    A step computes the batches of all in one pass over the base. Each training was made while its own adapter was the
    one at work (as `inject_` leaves it), and has its own rows, plan, optimiser and end. One whose loss is no longer
    finite ends with the reason in its `failed`; the others go on. Dropout draws the masks that a training by itself
    draws after torch.manual_seed(seed), on a CPU.
    Raises ConfigError, before any step, if they cannot share a pass.
    """
    reason = why_not_together(trainings)
    if reason:
        raise ConfigError(f"these adapters cannot train together: {reason}")
    engine, smoothing = trainings[0].engine, trainings[0].label_smoothing

    def losses(batches: Mapping[Training, Sequence[Any]]) -> list[Tensor]:
        return engine.losses_by_adapter({_adapter(training): batch for training, batch in batches.items()}, smoothing)

    activate_(engine.model, _adapter(trainings[0]))
    with _own_masks(trainings):
        yield from steps_of(trainings, losses, stopped)


def why_not_together(trainings: Sequence[Training]) -> str | None:
    """Why these trainings cannot share a pass over the base; None if they can. A short pass is tried."""
    problems = list(_problems(trainings))
    if problems:
        return "; ".join(problems)
    set_adapter_training(trainings[0].engine.model, False)
    short = {_adapter(training): [training.plan[0][0][0].short()] for training in trainings}
    try:
        with torch.no_grad():
            trainings[0].engine.losses_by_adapter(short)
    except ConfigError as error:
        return str(error)
    return None


def runs_per_pass(tokens: float) -> int:
    """How many trainings with so many tokens a batch should share a pass."""
    return max(1, int(MOST_TOKENS / tokens))


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


@contextmanager
def _own_masks(trainings: Sequence[Training]) -> Iterator[None]:
    """Let each adapter's dropout draw as it would alone after torch.manual_seed(its seed)."""
    updates = []
    for training in trainings:
        adapter, generator = _adapter(training), None
        for _, layer in named_lora_layers(training.engine.model):
            if adapter in layer.shares and (update := layer.update(adapter)).dropout:
                generator = generator or torch.Generator(update.lora_A.device).manual_seed(training.seed)
                update.dropout_generator = generator
                updates.append(update)
    try:
        yield
    finally:
        for update in updates:
            update.dropout_generator = None
