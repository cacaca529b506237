"""The training runs of the rank instruments: one loaded model and data, all the same but rank, seed, learning rate."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import nn

from rankwise.data.labelled import problem_type
from rankwise.data.rows import Row
from rankwise.data.tasks import examples_for
from rankwise.data.transcripts import on_day
from rankwise.engine.engine import Engine
from rankwise.engine.held_out import per_example
from rankwise.engine.tasks import engine_for
from rankwise.errors import ConfigError, DataError, RankwiseError
from rankwise.finetune import ROWS_OF_CUT, labels_of, read_data
from rankwise.lora.adapters import activate_, adapter_names
from rankwise.lora.checkpoint import load_adapter_, save_adapter
from rankwise.lora.config import LoraConfig
from rankwise.lora.inject import DEFAULT_ADAPTER, eject_, inject_, injection, largest_ranks, trainable_parameters
from rankwise.lora.report import InjectReport
from rankwise.models.adapted import renew_head_, write_labels
from rankwise.models.load import base_sha256, load_model, load_tokenizer, longest_input, pad_id
from rankwise.models.pooling import unread_layers
from rankwise.plan.memory import FLOAT
from rankwise.plan.plan import adapter_file_bytes
from rankwise.rank.crossed import Array
from rankwise.rank.nested import Nested, NestedEngine, nested
from rankwise.rank.paired import measure, units
from rankwise.rank.predict import Prediction, predict
from rankwise.rank.runs import Key, RunResult
from rankwise.rank.shrink import how_many_differ, shrink_, split_examples
from rankwise.rank.start import freeze_updates_, inject_nested_
from rankwise.rank.sweep import BASE, FULL
from rankwise.train.batches import batches_of_an_epoch, different, planned_steps
from rankwise.train.config import TrainConfig
from rankwise.train.forecast import forecast
from rankwise.train.learning_rate import default_rate
from rankwise.train.loop import Training
from rankwise.train.peak_memory import forget_peak_memory, peak_memory_bytes
from rankwise.train.progress import Reporter
from rankwise.train.together import runs_per_pass, train_together, why_not_together

NOT_PLAIN = ("init_lora_weights", "use_rslora", "use_dora")
"""Settings with which two ranks would differ by more than the rank: by their start, or by their scale."""
KEPT_SEEDS = 2
"""Seeds whose adapters are kept: enough to compare what two of them learned."""
HEAD_BATCHES = 32
"""A classifier's head trains on a sample of so many batches before a prediction: all rows would take a third of a
training of one epoch."""
FULL_RATE = 0.1
"""Full fine-tuning's learning rate, in units of an adapter's: the best ones were found to differ by about ten (Schulman
2025, "LoRA Without Regret"). The sweep checks it as it checks the others."""


@dataclass(frozen=True)
class Cost:
    """What a training took."""

    seconds: float
    peak_bytes: int
    """0 where the system cannot tell it from that of the training before."""
    diverged: bool = False


class PairedRuns:
    """run(rank, seed, factor) for rankwise.rank.sweep, by the settings of `rankwise train`."""

    def __init__(
        self, config: TrainConfig, largest: int, adapters: Path | None = None, least_rows: int = 1, day: str = ""
    ) -> None:
        """`largest`: the rank from whose start all others begin. `adapters`: where those of two seeds are kept. `day`:
        what a chat template writes that asks for today's date; "": today's.

        Raises ConfigError, also for fewer than `least_rows` held-out rows that ask different things, DataError or
        ModelError."""
        self.config = config
        self.largest = largest
        self.adapters = adapters
        problems = [
            f"--{name.replace('_', '-')}" for name in NOT_PLAIN if getattr(config, name) not in (False, "default")
        ]
        if problems:
            raise ConfigError(f"ranks are compared with plain LoRA; leave out {' and '.join(problems)}")
        train, held_out = read_data(config)
        if (found := how_many_differ(held_out)) < least_rows:
            raise ConfigError(
                f"ranks are compared on at least {least_rows} different held-out rows, found {found} among "
                f"{len(held_out)}; give more in --eval-data, or a larger --eval-fraction"
            )
        self._tokenizer = on_day(load_tokenizer(config.model), day or date.today().isoformat())
        self.labels = labels_of(train, config.model)
        self._problem_type = problem_type(train)
        self._loaded: tuple[int, Engine[Any]] | None = None
        model = self._load_model(config.seed)
        self._length = min(config.max_length, longest_input(model))
        self.held_out_rows = held_out
        self._left_out = unread_layers(model) if config.task == "embedding" else None
        self.train, self.held_out = self.examples(train), self.examples(held_out)
        self._units = units(self.held_out)
        if config.lr == "auto":
            raise ConfigError("a sweep checks learning rates itself; give --lr a number, or leave it out")
        self._loaded = config.seed, self._engine(model)
        self.rate = config.lr or default_rate(len(planned_steps(self.train, config)))

    def __call__(self, rank: int, seed: int, factor: float) -> RunResult:
        """Train at one rank (0: a classifier's head alone, -1: everything) and measure on the held-out rows."""
        if rank == FULL:
            return self._full(seed, factor)
        engine = self.engine(seed)
        with _taken_out_again(engine.model):
            key = Key(rank, seed, factor)
            report = self._inject(engine.model, key, DEFAULT_ADAPTER)
            trains = bool(trainable_parameters(engine.model))
            return self._result(engine, key, report, self.fit(engine, seed, factor) if trains else Cost(0.0, 0))

    def examples(self, rows: Sequence[Row]) -> list[Any]:
        """The rows as the model reads them."""
        config, labels = self.config, self.labels
        return examples_for(config.task, rows, self._tokenizer, labels, self._length, config.long_rows, config.train_on)

    def how_many_at_once(self, wanted: int | None) -> tuple[int, str]:
        """How many runs should share passes over the base (`wanted`, if it is given), and a sentence on the reason.

        Raises ConfigError if several are wanted that cannot share a pass.
        """
        if wanted == 1:
            return 1, "runs train one after the other"
        engine = self.engine(self.config.seed)
        with _taken_out_again(engine.model):
            key, names = Key(1, self.config.seed), ("one", "other")
            for name in names:
                self._inject(engine.model, key, name)
            pair = [self._training(engine, key, name) for name in names]
            reason = why_not_together(pair)
        if reason and wanted:
            raise ConfigError(f"--at-once {wanted} is not possible: {reason}")
        if reason:
            return 1, f"runs train one after the other: {reason}"
        plan = pair[0].plan
        tokens = plan.tokens / sum(map(len, plan.places))
        count = wanted or runs_per_pass(tokens)
        how = f"up to {count} runs share a pass over the base" if count > 1 else "runs train one after the other"
        return count, f"{how}: a batch has {tokens:.0f} tokens"

    def together(self, keys: Sequence[Key], at_once: int) -> Iterator[tuple[Key, RunResult]]:
        """The results of these runs, each once it has ended; up to `at_once` share passes over the base."""
        alike: dict[Any, list[Key]] = {}
        for key in keys:
            # A classifier's head is drawn with the model; in the base's runs it trains alone.
            if key.rank == FULL or (key.rank == BASE and not self.labels):
                alike[key] = [key]
            else:
                alike.setdefault((key.seed if self.labels else None, key.rank == BASE), []).append(key)
        for group in alike.values():
            passes = math.ceil(len(group) / at_once)
            for number in range(passes):
                yield from self._in_one_pass(group[number::passes])

    def _in_one_pass(self, keys: Sequence[Key]) -> Iterator[tuple[Key, RunResult]]:
        if len(keys) == 1:
            yield keys[0], self(keys[0].rank, keys[0].seed, keys[0].factor)
            return
        engine = self.engine(keys[0].seed)
        with _taken_out_again(engine.model):
            reports = [self._inject(engine.model, key, f"run{index}") for index, key in enumerate(keys)]
            trainings = [self._training(engine, key, f"run{index}") for index, key in enumerate(keys)]
            runs = dict(zip(trainings, zip(keys, reports, strict=True), strict=True))
            shared_by = tuple(sorted({key.rank for key in keys}))
            is_own_peak = forget_peak_memory()
            for training, step in train_together(trainings):
                if step.number == step.of:
                    peak = peak_memory_bytes() if is_own_peak else 0
                    yield runs[training][0], self._shared_result(training, *runs[training], shared_by, peak)
            for training, (key, report) in runs.items():
                if training.failed:
                    yield key, self._shared_result(training, key, report, shared_by, 0)

    def _inject(self, model: nn.Module, key: Key, adapter: str) -> InjectReport:
        """Put in the adapter of a run."""
        report = inject_nested_(model, self.lora(max(key.rank, 1)), self.largest, key.seed, adapter)
        if key.rank == BASE:
            freeze_updates_(model, adapter)
        return report

    def _training(self, engine: Engine[Any], key: Key, adapter: str) -> Training:
        activate_(engine.model, adapter)
        return Training(engine, self.train, self._config(key.seed, self.rate * key.factor))

    def _shared_result(
        self, training: Training, key: Key, report: InjectReport, shared_by: tuple[int, ...], peak_bytes: int
    ) -> RunResult:
        activate_(training.engine.model, training.adapters)
        cost = Cost(training.seconds, peak_bytes, diverged=training.failed is not None)
        return replace(self._result(training.engine, key, report, cost), shared_by=shared_by)

    def _result(self, engine: Engine[Any], key: Key, report: InjectReport, cost: Cost) -> RunResult:
        """What the run left whose adapter is at work."""
        parameters = sum(p.numel() for p in trainable_parameters(engine.model))
        losses, counts = self.measure(engine)
        if self.adapters and key.rank and key.seed - self.config.seed < KEPT_SEEDS and not cost.diverged:
            adapter = next(iter(injection(engine.model).active))
            folder = save_adapter(engine.model, self.adapters / key.name, adapter)
            write_labels(engine.model, self.config.task, folder)
        return _result(losses, counts, cost, parameters, adapter_file_bytes(report) if key.rank else 0)

    def _full(self, seed: int, factor: float) -> RunResult:
        engine = self.engine(seed)
        self._loaded = None  # The base will not be the base afterwards.
        trained = list(engine.model.requires_grad_(True).parameters())
        cost = self.fit(engine, seed, factor, trained)
        losses, counts = self.measure(engine)
        parameters = sum(p.numel() for p in trained)
        return _result(losses, counts, cost, parameters, FLOAT * parameters)

    def cut_ranks(self, adapter: Path, margin: float) -> dict[str, int] | None:
        """The ranks to which `rankwise shrink` cuts an adapter; None where the held-out rows show none."""
        engine = self.engine(self.config.seed)
        load_adapter_(engine.model, adapter)
        try:
            held_out = split_examples(self.held_out_rows, self.held_out, self.config.seed, ROWS_OF_CUT)
            return shrink_(engine, held_out, margin).ranks_after
        except (ConfigError, DataError):
            return None
        finally:
            eject_(engine.model)

    def nested_run(self, reporter: Reporter) -> Nested:
        """Train all ranks up to the largest at once, and measure each; the base as a sweep does, with a trained head.

        Raises RankwiseError if a training diverged.
        """
        seed = self.config.seed
        # The adapter's start is drawn as if the base had not been trained before.
        with torch.random.fork_rng(devices=[]), reporter.stage("measuring the base"):
            base = self(BASE, seed, 1.0)
        if not np.isfinite(base.losses).all():
            raise RankwiseError("the training of the base's head diverged; give a lower --lr")
        engine = self.engine(seed)
        inject_(engine.model, self.lora(self.largest))

        def train(engine: NestedEngine) -> None:
            if self.fit(engine, seed, 1.0).diverged:
                raise RankwiseError("the training of all ranks at once diverged; give a lower --lr")

        return nested(engine, train, self.held_out, self.largest, seed, reporter.stage, base.losses)

    def prediction(self, reporter: Reporter, signal_batches: int = 16) -> Prediction:
        """Look for as many directions as the largest rank; a classifier's head is trained first.

        Raises ConfigError for fewer than two batches of different training rows.
        """
        config = self.config
        # A row in both halves would make its noise look like a signal.
        rows = different(self.train)
        batches = batches_of_an_epoch(rows, config)
        count = min(signal_batches, len(batches)) // 2 * 2
        if not count:
            size = config.batch_size if config.batch_tokens is None else f"{config.batch_tokens} tokens"
            smaller = f"--batch-size {len(rows) // 2}" if config.batch_tokens is None else "a lower --batch-tokens"
            raise ConfigError(
                f"the gradient is compared between two halves of at least one batch of {size}, and the training data "
                f"hold {len(rows)} different rows; give more rows" + (f", or {smaller}" if len(rows) > 1 else "")
            )
        batches = batches[:count]
        engine = self.engine(config.seed)
        lora = self.lora(self.largest)
        report = inject_(engine.model, lora.lowered_to(largest_ranks(engine.model, lora)))
        if self.labels:
            with reporter.stage("training the head"):
                self.fit_head(engine, HEAD_BATCHES)
        with reporter.stage(f"{2 * len(batches)} backward passes"):
            layers = predict(engine, (batches[::2], batches[1::2]), config.seed)
        losses, _ = per_example(engine, [row for batch in batches[::2] for row in batch])
        bits = float(losses.mean() * len(rows) / math.log(2))
        per_rank = sum(matrix.count * (matrix.d + matrix.k) for matrix in report.matrices)
        return Prediction(tuple(layers), bits, per_rank)

    def base_sha256(self) -> str:
        """Of the base's weights, a classifier's head as the first seed draws it among them."""
        return base_sha256(self.engine(self.config.seed).model)

    def check_settings(self, setting: str, values: Sequence[Any]) -> None:
        """Raise ConfigError or TargetError for a value with which no run can begin."""
        engine = self.engine(self.config.seed)
        for value in values:
            with self.with_setting(setting, value), _taken_out_again(engine.model):
                self._inject(engine.model, Key(self.largest, self.config.seed), DEFAULT_ADAPTER)

    @contextmanager
    def with_setting(self, name: str, value: Any) -> Iterator[None]:
        """Let the runs inside have another value of a setting. Raises ConfigError for an invalid one."""
        before = self.config, self.rate
        self.config = replace(self.config, **{name: value})
        self.rate = value if name == "lr" else self.rate
        try:
            yield
        finally:
            self.config, self.rate = before

    def measure(self, engine: Engine[Any]) -> tuple[Array, Array]:
        """([N] summed losses, [N] counts) of the held-out examples, those that ask the same as one."""
        losses = measure(engine, self.held_out).by_unit(self._units)
        return losses.sums, losses.counts

    def engine(self, seed: int) -> Engine[Any]:
        """The engine of the base model as `rankwise train --seed` loads it, a new classifier head drawn by the seed."""
        if self._loaded is None or (self.labels and self._loaded[0] != seed):
            self._loaded = None  # Two models at once need not fit into memory.
            self._loaded = seed, self._engine(self._load_model(seed))
        return self._loaded[1]

    def _engine(self, model: Any) -> Engine[Any]:
        engine = engine_for(self.config.task, model, pad_id(self._tokenizer), self.train)
        plan = planned_steps(self.train, self.config)
        predicted = forecast(plan, self.config, self.lora(self.largest), len(self.labels), engine.packs)
        engine.recomputes = predicted.recompute
        return engine

    def lora(self, rank: int) -> LoraConfig:
        """The settings of an adapter of this rank."""
        return self.config.lora(rank, self._left_out)

    def fit(self, engine: Any, seed: int, factor: float, parameters: Sequence[nn.Parameter] | None = None) -> Cost:
        """Train the adapter of the engine's model, or `parameters`; of a training that diverged the cost says so."""
        torch.manual_seed(seed)
        rate = self.rate * (1 if parameters is None else FULL_RATE)
        config = self._config(seed, rate * factor)
        seconds, is_own_peak = 0.0, forget_peak_memory()
        training = Training(engine, self.train, config, parameters)
        try:
            for step in training.steps():
                seconds = step.seconds
        except RankwiseError:
            if not training.failed:
                raise
            return Cost(seconds, 0, diverged=True)
        return Cost(seconds, peak_memory_bytes() if is_own_peak else 0)

    def fit_head(self, engine: Engine[Any], batches: int) -> None:
        """Train a classifier's head alone on a sample of so many batches of rows, for as many steps as a run has."""
        freeze_updates_(engine.model)
        torch.manual_seed(self.config.seed)
        count = min(batches * self.config.batch_size, len(self.train))
        rows = Random(self.config.seed).sample(self.train, count)
        steps = len(planned_steps(self.train, self.config))
        for _ in Training(engine, rows, replace(self._config(self.config.seed, self.rate), max_steps=steps)).steps():
            pass

    def _config(self, seed: int, rate: float) -> TrainConfig:
        # Other ranks and seeds run the same rows.
        cache_gb = self.config.state_bytes(rows_run_again=True) / 1e9
        return replace(self.config, seed=seed, lr=rate, cache_gb=cache_gb)

    def _load_model(self, seed: int) -> Any:
        torch.manual_seed(seed)
        base, labels = self.config.model, self.labels
        model = load_model(base, self.config.task, labels, self._problem_type, self.config.base_dtype)
        renew_head_(model, base)
        return model


class SettingRuns:
    """run(number, seed, factor) for rankwise.rank.sweep.sweep_setting, at the largest rank of `runs`."""

    def __init__(self, runs: PairedRuns, setting: str, values: Sequence[Any]) -> None:
        """Raises ConfigError or TargetError, before any run, for a value with which none can begin."""
        self._runs, self._setting, self._values = runs, setting, values
        runs.check_settings(setting, values)

    def __call__(self, number: int, seed: int, factor: float) -> RunResult:
        if number == BASE:
            return self._runs(BASE, seed, factor)
        with self._runs.with_setting(self._setting, self._values[number - 1]):
            return self._runs(self._runs.largest, seed, factor)


@contextmanager
def _taken_out_again(model: nn.Module) -> Iterator[None]:
    """Whatever adapters the block puts into the model."""
    try:
        yield
    finally:
        if adapter_names(model):
            eject_(model)


def _result(losses: Array, counts: Array, cost: Cost, parameters: int, size: int) -> RunResult:
    """What a run left."""
    losses = np.full_like(losses, np.inf) if cost.diverged else losses
    return RunResult(losses, counts, cost.seconds, parameters, cost.peak_bytes, size)
