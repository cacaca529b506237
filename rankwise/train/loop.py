"""The training loop. It yields what happened and prints nothing."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rankwise.data.examples import TextExample
from rankwise.engine.engine import Engine
from rankwise.errors import RankwiseError
from rankwise.lora.inject import set_adapter_training, trainable_parameters
from rankwise.train.config import TrainConfig

T = TypeVar("T")

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""
LARGEST_GRADIENT = 1.0
"""A longer gradient (2-norm over all trained numbers) is shortened to this."""


@dataclass(frozen=True)
class Step:
    """One optimiser step."""

    number: int
    """From 1."""
    of: int
    loss: float
    """Mean over the batch's trained tokens (texts for classification), in nats, before the step."""
    learning_rate: float
    gradient_norm: float
    tokens: int
    """Useful tokens of the batch: all that are not padding."""
    seconds: float
    """Since training began."""


def training_steps(
    engine: Engine[Any],
    examples: Sequence[Any],
    config: TrainConfig,
    stopped: Callable[[], bool] = lambda: False,
    parameters: Sequence[nn.Parameter] | None = None,
) -> Iterator[Step]:
    """Train the adapter in the engine's model and yield each step; ends early, between two steps, once `stopped()`.

    `parameters` are trained instead of the adapter's, if given (full fine-tuning).

    AdamW without weight decay, gradients of at most norm 1, a warm-up of 5 % and a linear fall to zero.
    Raises RankwiseError when the loss is no longer finite; the adapter then keeps its values from before that step.
    """
    parameters = trainable_parameters(engine.model) if parameters is None else parameters
    optimizer = AdamW(parameters, lr=config.lr, weight_decay=0.0, fused=True)
    total = step_count(len(examples), config)
    schedule = _warm_up_then_fall(optimizer, total)
    set_adapter_training(engine.model, True)
    begin = time.perf_counter()
    for number, batch in enumerate(_batches(examples, config, total), start=1):
        loss = engine.loss(batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        if not _is_finite(loss, norm):
            raise RankwiseError(
                f"the loss or its gradient is not finite at step {number} (loss {loss.item()}); "
                f"try a lower --lr than {config.lr:g}. The adapter of the step before is kept"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rate = float(schedule.get_last_lr()[0])
        schedule.step()
        tokens = sum(len(example.ids) for example in batch)
        yield Step(number, total, loss.item(), rate, norm.item(), tokens, time.perf_counter() - begin)
        if stopped():
            break
    set_adapter_training(engine.model, False)


def step_count(rows: int, config: TrainConfig) -> int:
    """Optimiser steps of a run over so many rows: those of its epochs, or max_steps where that is given."""
    return config.max_steps or max(1, ceil(config.epochs * ceil(rows / config.batch_size)))


def _batches(examples: Sequence[Any], config: TrainConfig, count: int) -> Iterator[list[Any]]:
    alike = config.batches == "alike"
    groups = families(examples, config.batch_size // 2) if alike else [[example] for example in examples]
    return shuffled_batches(groups, config.batch_size, count, config.seed)


def families(examples: Sequence[TextExample], most: int) -> list[list[TextExample]]:
    """Groups of at most `most` rows whose prompts share at least half of their tokens, from the beginning.

    The engine computes what rows of a batch share once.
    """
    groups: list[list[TextExample]] = []
    for example in sorted(examples, key=lambda example: example.ids):
        if groups and len(groups[-1]) < most and _begins_alike(groups[-1][0], example):
            groups[-1].append(example)
        else:
            groups.append([example])
    return groups


def _begins_alike(one: TextExample, other: TextExample) -> bool:
    half = max(one.prompt_length, other.prompt_length) // 2
    return one.ids[:half] == other.ids[:half]


def shuffled_batches(groups: Sequence[Sequence[T]], batch_size: int, count: int, seed: int) -> Iterator[list[T]]:
    """`count` batches; every epoch sees every item once, the groups in another order drawn from `seed`."""
    generator = random.Random(seed)
    made = 0
    while True:
        order = list(groups)
        generator.shuffle(order)
        items = [item for group in order for item in group]
        for start in range(0, len(items), batch_size):
            if made == count:
                return
            yield items[start : start + batch_size]
            made += 1


def _warm_up_then_fall(optimizer: Optimizer, total: int) -> LambdaLR:
    warm_up = max(1, round(WARM_UP * total))
    return LambdaLR(optimizer, lambda step: min((step + 1) / warm_up, (total - step) / max(1, total - warm_up + 1)))


def _is_finite(*values: Tensor) -> bool:
    return all(bool(torch.isfinite(value)) for value in values)
