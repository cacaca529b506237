"""The training runs of a sweep: one loaded model, one set of examples, and everything the same but rank, seed, rate."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from rankwise.data.tasks import examples_for
from rankwise.engine.engine import Engine
from rankwise.engine.tasks import engine_for
from rankwise.errors import ConfigError, RankwiseError
from rankwise.finetune import labels_of, read_data
from rankwise.lora.config import LoraConfig
from rankwise.lora.inject import eject_, trainable_parameters
from rankwise.models.adapted import TASK_TYPES
from rankwise.models.load import load_model, load_tokenizer, longest_input, pad_id
from rankwise.models.pooling import unread_layers
from rankwise.rank.crossed import Array
from rankwise.rank.measure import per_example
from rankwise.rank.runs import RunResult
from rankwise.rank.start import freeze_updates_, inject_nested_
from rankwise.rank.sweep import FULL
from rankwise.train.batches import planned_steps
from rankwise.train.config import TrainConfig
from rankwise.train.learning_rate import default_rate
from rankwise.train.loop import training_steps

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
        self._left_out = unread_layers(model) if config.task == "embedding" else None
        self._loaded = config.seed, engine_for(config.task, model, pad_id(self._tokenizer), self.train)
        if config.lr == "auto":
            raise ConfigError("a sweep checks learning rates itself; give --lr a number, or leave it out")
        self.rate = config.lr or default_rate(len(planned_steps(self.train, config)))

    def __call__(self, rank: int, seed: int, factor: float) -> RunResult:
        """Train at one rank (0: a classifier's head alone, -1: everything) and measure on the held-out rows."""
        if rank == FULL:
            return self._full(seed, factor)
        engine = self.engine(seed)
        inject_nested_(engine.model, self.lora(max(rank, 1)), self.largest, seed)
        try:
            if rank == 0:
                freeze_updates_(engine.model)
            parameters = sum(p.numel() for p in trainable_parameters(engine.model))
            seconds = self.fit(engine, seed, factor) if parameters else 0.0
            losses, counts = per_example(engine, self.held_out)
        finally:
            eject_(engine.model)
        return _result(losses, counts, seconds, parameters)

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
            exclude_modules=self._left_out,
        )

    def fit(
        self, engine: Any, seed: int, factor: float, parameters: Sequence[nn.Parameter] | None = None
    ) -> float | None:
        """Train the adapter of the engine's model, or `parameters`; returns the seconds, None if training diverged."""
        torch.manual_seed(seed)
        rate = self.rate * (1 if parameters is None else FULL_RATE)
        config = replace(self.config, seed=seed, lr=rate * factor)
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

    def _load_model(self, seed: int) -> Any:
        torch.manual_seed(seed)
        return load_model(self.config.model, self.config.task, self.labels)


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
