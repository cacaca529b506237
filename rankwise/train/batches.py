"""Which rows go into which optimiser step. Settings and seed alone decide, so that a resumed run goes on in order."""

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import count
from math import ceil
from typing import Any

from rankwise.data.examples import E, TextExample
from rankwise.data.stored import Chosen, Items
from rankwise.data.tasks import why_too_few
from rankwise.errors import ConfigError, DataError
from rankwise.train.config import MOST_STEPS, TrainConfig

Places = Sequence[int]
"""Of rows, among all that may train."""
ROWS_AT_FIRST = 10_000
"""Rows of a run's beginning: all that is tokenised and counted before it."""


class Plan(Items[list[list[E]]]):
    """The batches of every optimiser step of a run; a step's examples are fetched when it is asked for."""

    def __init__(self, examples: Sequence[E], places: Sequence[Sequence[Places]]) -> None:
        """`places`: for each step, of the examples in each of its batches."""
        self.examples, self.places = examples, places

    def __len__(self) -> int:
        return len(self.places)

    def _item(self, index: int) -> list[list[E]]:
        return [[self.examples[place] for place in batch] for batch in self.places[index]]

    @cached_property
    def distinct(self) -> "array[int]":
        """The place of every example that runs, once, in the order of the steps."""
        return array("q", dict.fromkeys(place for step in self.places for batch in step for place in batch))

    @property
    def rows(self) -> Sequence[E]:
        """Every example that runs, once."""
        return Chosen(self.examples, self.distinct)

    @property
    def runs_rows_again(self) -> bool:
        """Does an example come twice?"""
        return len(self.distinct) < sum(len(batch) for step in self.places for batch in step)

    @cached_property
    def beginning(self) -> "Plan[E]":
        """The first steps, of at most ROWS_AT_FIRST rows; at least one step."""
        rows = 0
        for number, step in enumerate(self.places):
            rows += sum(map(len, step))
            if rows > ROWS_AT_FIRST:
                return Plan(self.examples, self.places[: max(1, number)])
        return self

    @property
    def tokens(self) -> float:
        """Useful tokens of all steps, if the rest is as the beginning."""
        begun = self.beginning
        return sum(len(row.ids) for step in begun for batch in step for row in batch) * len(self) / len(begun)


def planned_steps(examples: Sequence[E], config: TrainConfig) -> Plan[E]:
    """The batches of every optimiser step of a run: one each, or up to `accumulate` of them.

    Every epoch sees every row once. A step does not reach over the end of an epoch; its last one may be smaller.
    Raises ConfigError for a row of more tokens than a batch may hold and for more steps than a run can have, DataError
    for no row, or a single one to be told apart from others.
    """
    if not examples:
        raise DataError("there is no row to train on")
    if reason := why_too_few(config.task, len(examples)):
        raise DataError(reason)
    steps: list[Sequence[Places]] = []
    orders = _epochs(_groups(examples, config), config.seed)
    for epoch in count():
        left = config.epochs - epoch
        if config.max_steps is None and left <= 0:
            break
        batches = _cut(next(orders), examples, config)
        own = [batches[start : start + config.accumulate] for start in range(0, len(batches), config.accumulate)]
        if config.max_steps is None and config.epochs * len(own) > MOST_STEPS:
            raise ConfigError(
                f"--epochs {config.epochs:g} makes {config.epochs * len(own):,.0f} steps, of {len(own):,} in an epoch; "
                f"a run can have at most {MOST_STEPS:,}: lower --epochs, or give --max-steps"
            )
        if config.max_steps is not None:
            steps += own
            if len(steps) >= config.max_steps:
                break
        else:
            # Rounded, because 2.1 epochs of ten steps are 21 steps whatever 2.1 - 2 is in floating point.
            steps += own[: max(0 if steps else 1, ceil(round(left * len(own), 6)))]
    return Plan(examples, steps[: config.max_steps])


def different(examples: Sequence[E]) -> list[E]:
    """The examples, in their order, without those that teach what another one teaches."""
    return list({(example.ids, example.taught): example for example in examples}.values())


def batches_of_an_epoch(examples: Sequence[E], config: TrainConfig) -> Sequence[list[E]]:
    """The batches of a run's first epoch, in which every example comes once, but for a last one of too few rows.

    Raises what `planned_steps` raises.
    """
    plan = planned_steps(examples, replace(config, epochs=1, max_steps=None, accumulate=1))
    whole = 0 if config.batch_tokens is not None else config.batch_size
    return [batch for step in plan for batch in step if len(batch) >= whole]


def _groups(examples: Sequence[Any], config: TrainConfig) -> Sequence[Places]:
    """Places of examples that go together."""
    if config.batches == "random":
        return [range(place, place + 1) for place in range(len(examples))]
    batch_size = config.batch_size
    if config.batch_tokens is not None:
        batch_size = config.batch_tokens * len(examples) // sum(len(example.ids) for example in examples)
    return families(examples, batch_size // 2)


def families(examples: Sequence[TextExample], most: int) -> list[list[int]]:
    """Places of at most `most` rows whose prompts share at least half of their tokens, from the beginning.

    The engine computes what rows of a batch share once.
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(examples)), key=lambda place: examples[place].ids):
        if groups and len(groups[-1]) < most and _begins_alike(examples[groups[-1][0]], examples[place]):
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _begins_alike(one: TextExample, other: TextExample) -> bool:
    half = max(one.prompt_length, other.prompt_length) // 2
    return one.ids[:half] == other.ids[:half]


def _epochs(groups: Sequence[Places], seed: int) -> Iterator["array[int]"]:
    """Without end: every place once, the groups each time in another order drawn from `seed`."""
    generator = random.Random(seed)
    while True:
        order = list(groups)
        generator.shuffle(order)
        yield array("q", (place for group in order for place in group))


def _cut(places: "array[int]", examples: Sequence[E], config: TrainConfig) -> Sequence[Places]:
    """Rows, in their order, as batches of so many rows, or of as many as fit into so many tokens."""
    if config.batch_tokens is None:
        return [places[start : start + config.batch_size] for start in range(0, len(places), config.batch_size)]
    batches: list[list[int]] = []
    room = 0
    for place in places:
        row = examples[place]
        if len(row.ids) > config.batch_tokens:
            raise ConfigError(
                f"--batch-tokens {config.batch_tokens} cannot hold the row at {row.place}, which has {len(row.ids)} "
                "tokens; raise it, or shorten long rows (--max-length with --long-rows cut or drop)"
            )
        if len(row.ids) > room:
            batches.append([])
            room = config.batch_tokens
        batches[-1].append(place)
        room -= len(row.ids)
    return batches
