"""`--lr auto`: a short check of three learning rates from the same start, on the rows of the run's first steps."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil, inf, isfinite
from typing import Any

from rankwise.engine.engine import Engine
from rankwise.errors import ConfigError, RankwiseError
from rankwise.lora.inject import trainable_parameters
from rankwise.train.batches import planned_steps
from rankwise.train.config import TrainConfig
from rankwise.train.evaluate import held_out_loss
from rankwise.train.learning_rate import default_rate
from rankwise.train.loop import Training
from rankwise.train.random_state import random_state, set_random_state
from rankwise.train.watch import set_values_

CHECK_SHARE, MIN_CHECK_STEPS = 0.05, 5
"""Each of the three rates is tried for this share of the run's steps, but for at least so many."""


def best_rate(
    engine: Engine[Any],
    examples: Sequence[Any],
    held_out: Sequence[Any],
    config: TrainConfig,
    say: Callable[[str], None] = lambda text: None,
) -> float:
    """A third of the default rate, the rate itself or three times it: whichever ends with the lowest loss.

    That is the loss on held-out rows (of no more tokens than the check trains on), or, where there are none, the mean
    training loss of the last third of the check. Each rate gets its whole warm-up and fall within the check.
    The adapter and the random states are afterwards what they were before, bit for bit.
    Raises RankwiseError if no rate gives a finite loss, ConfigError for a run too short to tell them apart.
    """
    total = len(planned_steps(examples, config))
    steps = min(total, max(MIN_CHECK_STEPS, ceil(CHECK_SHARE * total)))
    if steps == 1 and not held_out:
        raise ConfigError(
            "--lr auto compares what steps have done, and a run of a single step without held-out rows shows none of "
            "it; give --lr a number, or more steps"
        )
    rates = [default_rate(total) * multiple for multiple in (1 / 3, 1, 3)]
    parameters = trainable_parameters(engine.model)
    start, random_start = [parameter.detach().clone() for parameter in parameters], random_state()
    losses = []
    for rate in rates:
        training = Training(engine, examples, replace(config, lr=rate, max_steps=steps))
        losses.append(_loss(training, _part(held_out, training, config.seed)))
        set_values_(parameters, start)
        training.optimizer.zero_grad()
        set_random_state(random_start)
        say(f"learning rate {rate:.2g}: {'held-out' if held_out else 'training'} loss {losses[-1]:.4f} at step {steps}")
    if not isfinite(min(losses)):
        raise RankwiseError(f"no learning rate of {', '.join(f'{r:.2g}' for r in rates)} gives a finite loss")
    return rates[losses.index(min(losses))]


def _loss(training: Training, held_out: Sequence[Any]) -> float:
    try:
        losses = [step.loss for step in training.steps()]
        if held_out:
            return held_out_loss(training.engine, held_out)
    except RankwiseError:
        # The loss was no longer finite: a rate that is too high.
        return inf
    last = losses[-ceil(len(losses) / 3) :]
    return sum(last) / len(last)


def _part(held_out: Sequence[Any], training: Training, seed: int) -> list[Any]:
    """Some of the held-out rows, of no more tokens than the check trains on; at least one where there is one."""
    room = training.plan.tokens
    part: list[Any] = []
    for example in random.Random(seed).sample(list(held_out), len(held_out)):
        room -= len(example.ids)
        if part and room < 0:
            break
        part.append(example)
    return part
