"""The training runs of a sweep: one loaded model, one set of examples, and everything the same but rank, seed, rate."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import nn

from rankwise.data.examples import examples_for
from rankwise.engine.engine import Engine, engine_for
from rankwise.errors import ConfigError, RankwiseError
from rankwise.finetune import labels_of, read_data
from rankwise.lora.adapters import activate_, adapter_names
from rankwise.lora.config import LoraConfig
from rankwise.lora.inject import DEFAULT, eject_, trainable_parameters
from rankwise.models.adapted import TASK_TYPES
from rankwise.models.load import load_model, load_tokenizer, longest_input, pad_id
from rankwise.rank.crossed import Array
from rankwise.rank.measure import per_example
from rankwise.rank.runs import Key, RunResult
from rankwise.rank.start import freeze_updates_, inject_nested_
from rankwise.rank.sweep import BASE, FULL
from rankwise.train.batches import planned_steps
from rankwise.train.config import TrainConfig
from rankwise.train.learning_rate import default_rate
from rankwise.train.loop import Training, training_steps
from rankwise.train.together import at_once, train_together, why_not_together

FULL_RATE = 0.1
"""Full fine-tuning's learning rate, in units of an adapter's: the best ones were found to differ by about ten (Schulman
2025, "LoRA Without Regret"). The sweep checks it as it checks the others."""


class PairedRuns:
    """run(rank, seed, factor) for rankwise.rank.sweep, by the settings of `rankwise train`."""

    def __init__(self, config: TrainConfig, largest: int) -> None:
        """`largest`: the rank from whose start all others begin. Raises ConfigError, DataError or ModelError."""
        self.config = config
        self.largest = largest
        train, held_out = read_data(config)
        if not held_out:
            raise ConfigError("ranks are compared on held-out rows; give --eval-data, or an --eval-fraction above 0")
        self._tokenizer = load_tokenizer(config.model)
        self.labels = labels_of(train) if config.task == "seq_cls" else []
        self._loaded: tuple[int, Engine[Any]] | None = None
        model = self._load_model(config.seed)
        length = min(config.max_length, longest_input(model))
        self.train, self.held_out = (
            examples_for(config.task, rows, self._tokenizer, self.labels, length, config.long_rows, config.train_on)
            for rows in (train, held_out)
        )
        self._loaded = config.seed, engine_for(config.task, model, pad_id(self._tokenizer), self.train)
        if config.lr == "auto":
            raise ConfigError("a sweep checks learning rates itself; give --lr a number, or leave it out")
        self.rate = config.lr or default_rate(len(planned_steps(self.train, config)))

    def __call__(self, rank: int, seed: int, factor: float) -> RunResult:
        """Train at one rank (0: a classifier's head alone, -1: everything) and measure on the held-out rows."""
        if rank == FULL:
            return self._full(seed, factor)
        engine = self.engine(seed)
        with _taken_out_again(engine.model):
            parameters = self._inject(engine.model, Key(rank, seed), DEFAULT)
            seconds = self.fit(engine, seed, factor) if parameters else 0.0
            losses, counts = per_example(engine, self.held_out)
        return _result(losses, counts, seconds, parameters)

    def at_once(self, wanted: int | None) -> tuple[int, str]:
        """How many runs should share passes over the base (`wanted`, if it is given), and a sentence on the reason.

        Raises ConfigError if several are wanted that cannot share a pass.
        """
        if wanted == 1:
            return 1, "runs train one after the other"
        engine = self.engine(self.config.seed)
        with _taken_out_again(engine.model):
            pair = [self._training(engine, Key(1, self.config.seed), f"run{index}") for index in range(2)]
            reason = why_not_together(pair)
        if reason and wanted:
            raise ConfigError(f"--at-once {wanted} cannot be: {reason}")
        if reason:
            return 1, f"runs train one after the other: {reason}"
        batches = [batch for step in pair[0].plan for batch in step]
        tokens = sum(len(example.ids) for batch in batches for example in batch) / len(batches)
        count = wanted or at_once(tokens)
        how = f"up to {count} runs share a pass over the base" if count > 1 else "runs train one after the other"
        return count, f"{how}: a batch has {tokens:.0f} tokens"

    def together(self, keys: Sequence[Key], at_once: int) -> Iterator[tuple[Key, RunResult]]:
        """The results of these runs, each once it has ended; up to `at_once` share passes over the base."""
        by_model: dict[Any, list[Key]] = {}
        for key in keys:
            has_adapter = key.rank > 0 or (key.rank == BASE and self.labels)
            model = (key.seed if self.labels else None) if has_adapter else key
            by_model.setdefault(model, []).append(key)
        for of_model in by_model.values():
            passes = ceil(len(of_model) / at_once)
            for number in range(passes):
                yield from self._in_one_pass(of_model[number::passes])

    def _in_one_pass(self, keys: Sequence[Key]) -> Iterator[tuple[Key, RunResult]]:
        if len(keys) == 1:
            yield keys[0], self(keys[0].rank, keys[0].seed, keys[0].factor)
            return
        engine = self.engine(keys[0].seed)
        with _taken_out_again(engine.model):
            runs = {self._training(engine, key, f"run{index}"): key for index, key in enumerate(keys)}
            for training, step in train_together(list(runs)):
                if step.number == step.of:
                    yield runs[training], self._measured(training)
            for training, key in runs.items():
                # At another rate nothing but the rate can be wrong: with that of the settings the run went through.
                if training.failed and key.factor == 1:
                    raise training.failed
                if training.failed:
                    yield key, self._measured(training)

    def _training(self, engine: Engine[Any], key: Key, adapter: str) -> Training:
        self._inject(engine.model, key, adapter)
        return Training(engine, self.train, self._config(key.seed, self.rate * key.factor))

    def _inject(self, model: nn.Module, key: Key, adapter: str) -> int:
        """Put in the adapter of a run; returns how many numbers it trains."""
        inject_nested_(model, self.lora(max(key.rank, 1)), self.largest, key.seed, adapter)
        if key.rank == BASE:
            freeze_updates_(model, adapter)
        return sum(parameter.numel() for parameter in trainable_parameters(model))

    def _measured(self, training: Training) -> RunResult:
        """What a training left that shared its passes with others."""
        activate_(training.engine.model, training.adapters)
        losses, counts = per_example(training.engine, self.held_out)
        parameters = sum(parameter.numel() for parameter in training.parameters)
        return _result(losses, counts, None if training.failed else training.seconds, parameters)

    def _full(self, seed: int, factor: float) -> RunResult:
        engine = self.engine(seed)
        self._loaded = None  # The base will not be the base afterwards.
        trained = list(engine.model.requires_grad_(True).parameters())
        seconds = self.fit(engine, seed, factor, trained)
        losses, counts = per_example(engine, self.held_out)
        return _result(losses, counts, seconds, sum(p.numel() for p in trained))

    def engine(self, seed: int) -> Engine[Any]:
        """The engine of the base model as `rankwise train --seed` loads it, a new classifier head drawn by the seed."""
        if self._loaded is None or (self.labels and self._loaded[0] != seed):
            self._loaded = None  # Two models at once need not fit into memory.
            engine = engine_for(self.config.task, self._load_model(seed), pad_id(self._tokenizer), self.train)
            self._loaded = seed, engine
        return self._loaded[1]

    def lora(self, rank: int) -> LoraConfig:
        """The settings of an adapter of this rank."""
        return LoraConfig(
            task_type=TASK_TYPES[self.config.task],
            r=rank,
            lora_alpha=self.config.lora_alpha,
            lora_dropout=self.config.lora_dropout,
            target_modules=self.config.targets,
        )

    def fit(
        self, engine: Any, seed: int, factor: float, parameters: Sequence[nn.Parameter] | None = None
    ) -> float | None:
        """Train the adapter of the engine's model, or `parameters`; returns the seconds, None if training diverged."""
        torch.manual_seed(seed)
        rate = self.rate * (1 if parameters is None else FULL_RATE)
        config = self._config(seed, rate * factor)
        seconds = 0.0
        try:
            for step in training_steps(engine, self.train, config, parameters=parameters):
                seconds = step.seconds
        except RankwiseError:
            # At another rate nothing but the rate can be wrong: with that of the settings the run went through before.
            if factor == 1:
                raise
            return None
        return seconds

    def _config(self, seed: int, rate: float) -> TrainConfig:
        return replace(self.config, seed=seed, lr=rate)

    def _load_model(self, seed: int) -> Any:
        torch.manual_seed(seed)
        return load_model(self.config.model, self.config.task, self.labels)


@contextmanager
def _taken_out_again(model: nn.Module) -> Iterator[None]:
    """Whatever adapters the block puts into the model."""
    try:
        yield
    finally:
        if adapter_names(model):
            eject_(model)


def rows_sha256(config: TrainConfig) -> str:
    """SHA-256 of all rows of a run, on either side. Raises DataError."""
    digest = hashlib.sha256()
    for rows in read_data(config):
        digest.update(f"{len(rows)} rows\n".encode())
        for row in rows:
            digest.update(json.dumps(row.fields, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _result(losses: Array, counts: Array, seconds: float | None, parameters: int) -> RunResult:
    """What a run left; without seconds it diverged."""
    if seconds is None:
        return RunResult(np.full_like(losses, np.inf), counts, 0.0, parameters)
    return RunResult(losses, counts, seconds, parameters)
