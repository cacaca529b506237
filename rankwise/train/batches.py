"""Which rows go into which optimiser step. Settings and seed alone decide, so that a resumed run goes on in order."""

import random
from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any, TypeVar

from rankwise.data.examples import E, TextExample
from rankwise.errors import ConfigError
from rankwise.train.config import TrainConfig

T = TypeVar("T")


def planned_steps(examples: Sequence[E], config: TrainConfig) -> list[list[list[E]]]:
    """The batches of every optimiser step of a run: one each, or up to `accumulate` of them.

    Every epoch sees every row once. A step does not reach over the end of an epoch; its last one may be smaller.
    Raises ConfigError for a row of more tokens than a batch may hold.
    """
    steps: list[list[list[E]]] = []
    whole_epochs, rest = divmod(config.epochs, 1)
    for epoch, rows in enumerate(_epochs(_groups(examples, config), config.seed)):
        batches = _cut(rows, config)
        own = [batches[start : start + config.accumulate] for start in range(0, len(batches), config.accumulate)]
        if config.max_steps is not None:
            steps += own
            if len(steps) >= config.max_steps:
                return steps[: config.max_steps]
        elif epoch < whole_epochs:
            steps += own
        else:
            # Rounded, because 2.1 epochs of ten steps are 21 steps whatever 2.1 - 2 is in floating point.
            steps += own[: ceil(round(rest * len(own), 6))]
            return steps or own[:1]
    raise AssertionError("the epochs never end")


def rows_run_again(steps: Sequence[Sequence[Sequence[object]]]) -> bool:
    """Does a row come twice?"""
    rows = [id(row) for step in steps for batch in step for row in batch]
    return len(set(rows)) < len(rows)


def _groups(examples: Sequence[Any], config: TrainConfig) -> Sequence[Sequence[Any]]:
    if config.batches == "random":
        return [[example] for example in examples]
    batch_size = config.batch_size
    if config.batch_tokens is not None:
        batch_size = config.batch_tokens * len(examples) // sum(len(example.ids) for example in examples)
    return families(examples, batch_size // 2)


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


def _epochs(groups: Sequence[Sequence[T]], seed: int) -> Iterator[list[T]]:
    """Without end: every row once, the groups each time in another order drawn from `seed`."""
    generator = random.Random(seed)
    while True:
        order = list(groups)
        generator.shuffle(order)
        yield [row for group in order for row in group]


def _cut(rows: Sequence[E], config: TrainConfig) -> list[list[E]]:
    """Rows, in their order, as batches of so many rows, or of as many as fit into so many tokens."""
    if config.batch_tokens is None:
        return [list(rows[start : start + config.batch_size]) for start in range(0, len(rows), config.batch_size)]
    batches: list[list[E]] = []
    room = 0
    for row in rows:
        if len(row.ids) > config.batch_tokens:
            raise ConfigError(
                f"--batch-tokens {config.batch_tokens} cannot hold the row at {row.place}, which has {len(row.ids)} "
                "tokens; raise it, or shorten long rows (--max-length with --long-rows cut or drop)"
            )
        if len(row.ids) > room:
            batches.append([])
            room = config.batch_tokens
        batches[-1].append(row)
        room -= len(row.ids)
    return batches
