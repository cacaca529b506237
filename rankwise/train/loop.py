"""The training loop. It yields what happened and prints nothing."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from rankwise.engine.elementwise import elementwise_by_hand
from rankwise.engine.engine import Engine
from rankwise.engine.heap import keep_freed_memory
from rankwise.engine.state_cache import states_kept
from rankwise.errors import ConfigError, RankwiseError
from rankwise.lora.inject import injection, set_adapter_training, trainable_parameters
from rankwise.lora.places import named_wrappers
from rankwise.lora.prepared import prepared_weights, shared_inputs
from rankwise.lora.wrapper import Wrapper
from rankwise.plan.memory import most_bytes_of_copies
from rankwise.train.batches import planned_steps
from rankwise.train.config import TrainConfig
from rankwise.train.learning_rate import default_rate, schedule_for
from rankwise.train.optimizer import lora_optimizer


@dataclass(frozen=True)
class Step:
    """One optimiser step."""

    number: int
    """From 1."""
    of: int
    loss: float
    """What is trained: the mean over the step's trained tokens (texts for classification), in nats, before the step."""
    learning_rate: float
    gradient_norm: float
    tokens: int
    """Useful tokens of the step: all that are not padding."""
    seconds: float
    """Spent in training steps since training began, whatever was saved or evaluated between them."""
    eval_loss: float | None = None
    """Held-out loss after the step, where it was measured."""


class Training:
    """A run of training: its plan, its optimiser, and how far it is. The adapter's values are in the model."""

    def __init__(
        self,
        engine: Engine[Any],
        examples: Sequence[Any],
        config: TrainConfig,
        parameters: Sequence[nn.Parameter] | None = None,
    ) -> None:
        """It trains what is at work in the model, or `parameters` instead, if given (full fine-tuning).

        Raises ConfigError if the plan cannot be, or if the learning rate is yet to be found ("auto")."""
        self.engine = engine
        self.label_smoothing = config.label_smoothing
        self.max_grad_norm = config.max_grad_norm or inf
        self.seed = config.seed
        self.plan = planned_steps(examples, config)
        self.state_bytes = config.state_bytes(self.plan.runs_rows_again)
        rate = default_rate(len(self.plan)) if config.lr is None else config.lr
        if isinstance(rate, str):
            raise ConfigError(f"a learning rate of {rate!r} must be found first; see train/rate_check.py")
        self.rate = rate
        self.adapters: dict[str, float] = {}
        """The adapters that train, and the weight of each in the sum."""
        if parameters is None:
            self.adapters = dict(injection(engine.model).active)
            self.parameters = trainable_parameters(engine.model)
            self.optimizer = lora_optimizer(
                engine.model, rate, config.lora_plus_ratio, config.weight_decay, config.preconditioned
            )
        else:
            self.parameters = list(parameters)
            self.optimizer = AdamW(self.parameters, lr=rate, weight_decay=config.weight_decay, fused=True)
        self.schedule = schedule_for(self.optimizer, config, len(self.plan))
        self.done = 0
        """Steps."""
        self.seconds = 0.0
        """Spent in them; of a step that several trainings share, its part by its tokens."""
        self.failed: RankwiseError | None = None
        """Why it cannot go on."""

    def steps(self, stopped: Callable[[], bool] = lambda: False) -> Generator[Step, None, None]:
        """Train from where the run is; ends early, between two steps, once `stopped()`.

        Raises RankwiseError when the loss is no longer finite; the adapter then keeps its values from before that step.
        """

        def losses(batches: Mapping[Training, Sequence[Any]]) -> list[Tensor]:
            return [self.engine.loss(batch, self.label_smoothing) for batch in batches.values()]

        for _, step in steps_of([self], losses, stopped):
            yield step
        if self.failed:
            raise self.failed

    @property
    def trained_modules(self) -> frozenset[str]:
        """The names of the modules in which an adapter trains."""
        wrappers = named_wrappers(self.engine.model)
        return frozenset(name for name, layer in wrappers if _trains(layer, self.adapters))

    @property
    def batches(self) -> list[list[Any]]:
        """Those of the next step; none after the last one, or once it failed."""
        return [] if self.failed or self.done == len(self.plan) else self.plan[self.done]

    @torch.no_grad()
    def went_well(self) -> bool:
        """Whether the rows of the step before have a finite loss now. The step after would tell; the last has none."""
        set_adapter_training(self.engine.model, False)
        return _is_finite(*(self.engine.loss(batch) for batch in self.plan[self.done - 1]))

    def move(self, loss: Tensor) -> Step | None:
        """Take the optimiser's step by the gradients that are there.

        If they or the `loss` are not finite, nothing moves, and `failed` says so.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        if not _is_finite(loss, norm):
            self.failed = RankwiseError(
                f"the loss or its gradient is not finite at step {self.done + 1} (loss {loss.item()}); "
                f"try a lower --lr than {self.rate:g}"
            )
            return None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        rate = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        tokens = sum(len(example.ids) for batch in self.batches for example in batch)
        self.done += 1
        return Step(self.done, len(self.plan), loss.item(), rate, norm.item(), tokens, self.seconds)


Losses = Callable[[Mapping[Training, Sequence[Any]]], list[Tensor]]
"""From a batch for each training to its mean loss."""


def steps_of(
    trainings: Sequence[Training], losses: Losses, stopped: Callable[[], bool]
) -> Iterator[tuple[Training, Step]]:
    """The steps of trainings of one model that go on side by side, each to its own end."""
    begin = time.perf_counter()
    keep_freed_memory()
    model = trainings[0].engine.model
    # What runs before the first step must draw no random numbers for dropout, which a resumed run would draw again.
    set_adapter_training(model, False)
    with (
        _states_kept(trainings),
        elementwise_by_hand(model),
        prepared_weights(model, most_bytes_of_copies()),
        shared_inputs(model, lambda: _run_once(trainings[0])),
    ):
        shares = [layer.shares for _, layer in named_wrappers(model)]
        while going := [training for training in trainings if training.batches]:
            # Evaluations between the steps switch it off; to switch it on takes a walk through the model.
            if not all(share.training for share in shares):
                set_adapter_training(model, True)
            for training in going:
                training.engine.begin_step()
            found = _backward(going, losses)
            moved = [
                (training, step) for training, loss in zip(going, found, strict=True) if (step := training.move(loss))
            ]
            seconds = time.perf_counter() - begin
            for training, step in moved:
                training.seconds += seconds * step.tokens / sum(step.tokens for _, step in moved)
                yield training, replace(step, seconds=training.seconds)
            if stopped():
                break
            begin = time.perf_counter()
    set_adapter_training(model, False)


def _states_kept(trainings: Sequence[Training]) -> AbstractContextManager[None]:
    """What enters the lowest block that trains, kept on the disk; where not all train in the same places, nothing."""
    most_bytes = min(training.state_bytes for training in trainings)
    if len({training.trained_modules for training in trainings}) > 1:
        most_bytes = 0.0
    one, *others = (training.plan.rows for training in trainings)
    rows = [*one, *chain.from_iterable(others)] if others else one
    return states_kept(trainings[0].engine.inner, rows, most_bytes)


def _run_once(training: Training) -> None:
    training.engine.logits([training.plan[0][0][0].short()])


def _backward(trainings: Sequence[Training], losses: Losses) -> list[Tensor]:
    """For each training the mean loss over all that its step counts; the gradients are added up batch by batch."""
    parts: dict[Training, list[Tensor]] = {training: [] for training in trainings}
    for batches in zip_longest(*(training.batches for training in trainings)):
        own = {training: batch for training, batch in zip(trainings, batches, strict=True) if batch}
        shares = [_counted([batch]) / _counted(training.batches) for training, batch in own.items()]
        weighted = [loss * share for loss, share in zip(losses(own), shares, strict=True)]
        torch.stack(weighted).sum().backward()
        for training, part in zip(own, weighted, strict=True):
            parts[training].append(part.detach())
    return [torch.stack(own).sum() for own in parts.values()]


def _trains(layer: Wrapper, adapters: Iterable[str]) -> bool:
    return any(parameter.requires_grad for name in adapters for parameter in layer.parameters_of(name))


def _counted(batches: Sequence[Sequence[Any]]) -> int:
    return sum(example.counted for batch in batches for example in batch)


def _is_finite(*values: Tensor) -> bool:
    return all(bool(torch.isfinite(value)) for value in values)
