"""`rankwise plan`"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rankwise.cli.arguments import parse
from rankwise.data.examples import TextExample
from rankwise.data.shapes import LABELLED
from rankwise.errors import ConfigError
from rankwise.plan.architectures import read_shape
from rankwise.plan.machine import Machine, read_machine
from rankwise.plan.plan import make_plan
from rankwise.plan.report import plan_text
from rankwise.plan.settings import PUBLISHED
from rankwise.plan.shape import ModelShape
from rankwise.plan.workload import Batch, seq2seq_batch, unshared_batch
from rankwise.train.batches import planned_steps
from rankwise.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """Say what `rankwise train` with the same flags would train, hold and take, before any weight is loaded."""

    needs_data: ClassVar[bool] = False

    model: str
    """As in train; or a config.json (also as --config FILE.json), or a published shape: gpt3-175b, llama-2-7b,
    roberta-base."""
    data: tuple[Path, ...] = ()
    """As in train; its rows are tokenised. Without it --rows and --tokens-per-row say how much there is."""
    out: Path | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Taken, as a flag of train; nothing is written there."""
    rows: int | None = None
    """Rows to train on, where there is no --data."""
    tokens_per_row: int | None = None
    """Tokens of each of them; of its two texts together (embedding, seq2seq_lm)."""
    trained_per_row: int | None = None
    """How many of them the loss counts (causal_lm, token_cls, seq2seq_lm); without it, all but the first, or
    half of them (seq2seq_lm)."""
    labels: int = 2
    """Classes (seq_cls, token_cls), where there is no --data."""
    time: bool = True
    """--no-time leaves the time out. Otherwise this machine is measured once, in about ten seconds."""
    recalibrate: bool = False
    """Measure this machine again."""
    json: bool = False
    """Print one JSON object."""

    def _problems(self):
        yield from super()._problems()
        if (self.rows is None) != (self.tokens_per_row is None):
            yield "--rows and --tokens-per-row go together"
        if self.data and self.rows is not None:
            yield "give --data, or --rows and --tokens-per-row, not both"
        for name, least in (("rows", 1), ("tokens_per_row", 2), ("trained_per_row", 1), ("labels", 2)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                yield f"--{name.replace('_', '-')} must be at least {least}, found {getattr(self, name)}"
        if max(self.texts_per_row, default=0) > self.max_length:
            yield f"--tokens-per-row {self.tokens_per_row} is above --max-length {self.max_length}"
        if self.trained_per_row and self.trained_per_row >= (self.tokens_per_row or 0):
            yield "--trained-per-row must be below --tokens-per-row: the first token of a row has no prediction"
        if self.labels != type(self).labels and self.task not in LABELLED:
            yield f"--labels needs --task {' or '.join(LABELLED)}; other tasks have no labels"
        if self.trained_per_row and self.task in ("seq_cls", "embedding"):
            yield f"--trained-per-row does not go with --task {self.task}, whose loss counts rows"
        if self.recalibrate and not self.time:
            yield "--recalibrate measures this machine and --no-time leaves that out; give one of them"

    @property
    def texts_per_row(self) -> list[int]:
        """Tokens of each text that the model reads of a row, where there is no data; a target comes last."""
        tokens = self.tokens_per_row or 0
        # The two texts of a pair go through the model as two rows.
        last = {"embedding": tokens - tokens // 2, "seq2seq_lm": self.trained_per_row or tokens // 2}.get(self.task, 0)
        return [tokens - last, last] if last else [tokens]


def main(options: list[str]) -> int:
    config = parse(PlanConfig, _with_model(options), "plan")
    examples, labels, held_out = _examples(config) if config.data else ([], config.labels, None)
    shape = read_shape(_source(config.model), config.task, labels)
    batches, steps = _work(config, shape, examples)
    lora = config.lora(config.trained_rank(held_out))
    if config.r == "auto":
        print(config.rank_rule(held_out), file=sys.stderr)
        lora = lora.lowered_to(shape.largest_ranks(lora))
    machine = _machine(config) if config.time and batches else None
    plan = make_plan(shape, lora, batches, steps, machine, config.memory_options)
    print(json.dumps(plan.as_dict()) if config.json else plan_text(plan))
    return 0


def _with_model(options: list[str]) -> list[str]:
    """--config with a .json file or a published name stands for --model; a YAML file stays.

    Raises ConfigError for more than one model.
    """
    result, models = list(options), []
    for place, (option, value) in enumerate(zip(options, [*options[1:], ""], strict=True)):
        name, equals, joined = option.partition("=")
        value = joined if equals else value
        stands_for_it = name == "--config" and (value.endswith(".json") or value in PUBLISHED)
        if stands_for_it:
            result[place] = f"--model={joined}" if equals else "--model"
        if stands_for_it or name == "--model":
            models.append(f"{name} {value}")
    if len(models) > 1:
        raise ConfigError(f"a plan is of one model, found {' and '.join(models)}; give one of them")
    return result


def _source(model: str) -> Path | str:
    """Where the config.json lies."""
    if model in PUBLISHED or Path(model).suffix == ".json":
        return model
    if (Path(model) / "config.json").is_file():
        return Path(model)
    from rankwise.models.locate import config_file

    return config_file(model)


def _examples(config: PlanConfig) -> tuple[list[Any], int, int]:
    """The rows that would train, tokenised; the number of labels, and of held-out rows that can choose ranks."""
    from rankwise.data.tasks import examples_for
    from rankwise.finetune import labels_of, read_data
    from rankwise.models.load import load_tokenizer
    from rankwise.rank.shrink import different_left

    rows, held_out = read_data(config)
    source = config.model
    if source in PUBLISHED or Path(source).suffix == ".json":
        raise ConfigError(f"{source} has no tokenizer for --data; give --rows and --tokens-per-row instead")
    labels = labels_of(rows, source)
    tokenizer = load_tokenizer(source)
    limit = read_shape(_source(source), config.task, len(labels)).positions
    length = min(config.max_length, limit)
    how = tokenizer, labels, length, config.long_rows, config.train_on
    choosing = different_left(held_out, examples_for(config.task, held_out, *how))
    return examples_for(config.task, rows, *how), len(labels), choosing


def _work(config: PlanConfig, shape: ModelShape, examples: list[Any]) -> tuple[list[Batch], int]:
    """The run's batches, and how many optimiser steps they make; none where nothing says how much data there is.

    Raises ConfigError for rows that the model or a batch cannot hold.
    """
    packs = shape.attention == "packed"
    if examples:
        from rankwise.train.forecast import counted_batches

        steps = planned_steps(examples, config)
        return counted_batches(steps, packs), len(steps)
    tokens = config.tokens_per_row
    if config.rows is None or tokens is None:
        return [], 0
    texts = config.texts_per_row
    most = sum(min(text, shape.positions) for text in texts)
    if tokens > most:
        raise ConfigError(
            f"{config.model} has positions for rows of at most {most:,} tokens (max_position_embeddings), "
            f"found --tokens-per-row {tokens}; give at most {most}, to which train cuts longer rows with "
            "--long-rows cut, or choose another model"
        )
    row = TextExample((0,) * tokens, (True,) * tokens, place="--tokens-per-row")
    steps = planned_steps([row] * config.rows, config)
    counted = 1 if shape.of_texts else config.trained_per_row or tokens - 1
    sizes = [len(batch) for step in steps.places for batch in step]
    if config.task == "seq2seq_lm":
        return [seq2seq_batch(texts[:1] * size, texts[1:] * size) for size in sizes], len(steps)
    return [unshared_batch(texts * size, size * counted, packs) for size in sizes], len(steps)


def _machine(config: PlanConfig) -> Machine | None:
    machine = None if config.recalibrate else read_machine()
    if machine is None:
        from rankwise.plan.calibrate import calibrate

        print("measuring this machine once, about ten seconds …", file=sys.stderr)
        machine = calibrate()
    return machine
