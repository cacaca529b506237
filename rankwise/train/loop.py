"""The training loop. It yields what happened and prints nothing."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from rankwise.engine.engine import Engine
from rankwise.engine.heap import keep_freed_memory
from rankwise.engine.state_cache import states_kept
from rankwise.errors import ConfigError, RankwiseError
from rankwise.lora.inject import set_adapter_training, trainable_parameters
from rankwise.lora.prepared import prepared_weights, shared_inputs
from rankwise.plan.memory import most_bytes_of_copies
from rankwise.train.batches import planned_steps
from rankwise.train.config import TrainConfig
from rankwise.train.learning_rate import default_rate, schedule_for
from rankwise.train.optimizer import lora_optimizer

LARGEST_GRADIENT = 1.0
"""A longer gradient (2-norm over all trained numbers) is shortened to this."""


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
        """`parameters` are trained instead of the adapter's, if given (full fine-tuning).

        Raises ConfigError if the plan cannot be, or if the learning rate is yet to be found ("auto")."""
        self.engine = engine
        self.label_smoothing = config.label_smoothing
        self.cache_bytes = config.cache_gb * 1e9
        self.plan = planned_steps(examples, config)
        rate = default_rate(len(self.plan)) if config.lr is None else config.lr
        if isinstance(rate, str):
            raise ConfigError(f"a learning rate of {rate!r} must be found first; see train/rate_check.py")
        self.rate = rate
        if parameters is None:
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
        """Spent in them."""

    def steps(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[Step]:
        """Train from where the run is; ends early, between two steps, once `stopped()`.

        Raises RankwiseError when the loss is no longer finite; the adapter then keeps its values from before that step.
        """
        begin = time.perf_counter()
        keep_freed_memory()
        model = self.engine.model
        # What runs before the first step must draw no random numbers for dropout, which a resumed run would draw again.
        set_adapter_training(model, False)
        rows = [example for step in self.plan for batch in step for example in batch]
        with (
            states_kept(self.engine, rows, self.cache_bytes),
            prepared_weights(model, most_bytes_of_copies()),
            shared_inputs(model, self._run_once),
        ):
            yield from self._steps(begin, stopped)
        set_adapter_training(model, False)

    def _run_once(self) -> None:
        self.engine.logits([self.plan[0][0][0].short()])

    def _steps(self, begin: float, stopped: Callable[[], bool]) -> Iterator[Step]:
        for batches in self.plan[self.done :]:
            set_adapter_training(self.engine.model, True)
            loss = self._backward(batches)
            norm = nn.utils.clip_grad_norm_(self.parameters, LARGEST_GRADIENT)
            if not _is_finite(loss, norm):
                raise RankwiseError(
                    f"the loss or its gradient is not finite at step {self.done + 1} (loss {loss.item()}); "
                    f"try a lower --lr than {self.rate:g}. The adapter of the step before is kept"
                )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            rate = float(self.schedule.get_last_lr()[0])
            self.schedule.step()
            tokens = sum(len(example.ids) for batch in batches for example in batch)
            self.done += 1
            self.seconds += time.perf_counter() - begin
            yield Step(self.done, len(self.plan), loss.item(), rate, norm.item(), tokens, self.seconds)
            if stopped():
                return
            begin = time.perf_counter()

    def _backward(self, batches: Sequence[Sequence[Any]]) -> Tensor:
        """The mean loss over all trained tokens of a step; its gradient is added up batch by batch."""
        counts = [sum(example.counted for example in batch) for batch in batches]
        parts = []
        for batch, count in zip(batches, counts, strict=True):
            part = self.engine.loss(batch, self.label_smoothing) * (count / sum(counts))
            part.backward()
            parts.append(part.detach())
        return torch.stack(parts).sum()


def training_steps(
    engine: Engine[Any],
    examples: Sequence[Any],
    config: TrainConfig,
    stopped: Callable[[], bool] = lambda: False,
    parameters: Sequence[nn.Parameter] | None = None,
) -> Iterator[Step]:
    """Train from the beginning and yield each step; see `Training`."""
    return Training(engine, examples, config, parameters).steps(stopped)


def _is_finite(*values: Tensor) -> bool:
    return all(bool(torch.isfinite(value)) for value in values)
