"""The main path: load → inject → data → train → evaluate → save."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rankwise.data.examples import Prompt, asked, examples_for
from rankwise.data.rows import Row, read_rows, split_rows
from rankwise.engine.engine import Engine, engine_for
from rankwise.errors import DataError
from rankwise.lora.config import LoraConfig
from rankwise.lora.inject import inject_
from rankwise.models.adapted import TASK_TYPES
from rankwise.models.load import base_sha256, load_model, load_tokenizer, longest_input, pad_id
from rankwise.train.config import TrainConfig
from rankwise.train.evaluate import Evaluation, evaluate
from rankwise.train.forecast import forecast
from rankwise.train.loop import Step, step_count, training_steps
from rankwise.train.progress import Reporter, peak_memory_bytes
from rankwise.train.report import render_report
from rankwise.train.run_folder import RunFolder


@dataclass(frozen=True)
class Dataset:
    """Everything that a run learns from and is measured on."""

    train: list[Any]
    """TextExamples, or LabelExamples for seq_cls."""
    held_out: list[Any]
    questions: list[Prompt]
    """Held-out prompts to answer, for exact match."""
    labels: list[str]
    """Names of the classes, in the order of the classifier's outputs; empty for causal_lm."""


def finetune(config: TrainConfig, reporter: Reporter | None = None) -> dict[str, Any]:
    """Train an adapter as `config` says and leave it, with what was measured, in the run folder `config.out`.

    Returns the content of result.json. The same configuration on the same machine gives the same adapter, byte for
    byte. Ctrl-C ends the training after the current step and saves the adapter as it is then.
    Raises ConfigError, DataError, ModelError, TargetError or StorageError before any training if an input is wrong.
    """
    reporter = reporter or Reporter()
    run = RunFolder(config.out)
    lora = LoraConfig(
        task_type=TASK_TYPES[config.task],
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.targets,
        base_model_name_or_path=config.model,
    )
    train_rows, held_out_rows = _read(config)
    torch.manual_seed(config.seed)

    with reporter.stage(f"loading {config.model}"):
        tokenizer = load_tokenizer(config.model)
        labels = _labels(train_rows) if config.task == "seq_cls" else []
        model = load_model(config.model, config.task, labels)
    data = _tokenise(config, train_rows, held_out_rows, tokenizer, labels, longest_input(model))
    report = inject_(model, lora)
    engine = engine_for(config.task, model, pad_id(tokenizer), data.train)
    reporter.say(report.summary())
    reporter.say(_describe(data, engine))
    predicted = forecast(data.train, config, lora, len(labels), engine.packs)

    sha_before = base_sha256(model)
    before = _evaluate(engine, tokenizer, data, reporter, "evaluating before")
    run.start(config)
    steps, interrupted = _train(engine, data, config, run, reporter)
    run.save_adapter(model, labels)
    after = None
    try:
        if not interrupted:
            after = _evaluate(engine, tokenizer, data, reporter, "evaluating after")
    except KeyboardInterrupt:
        interrupted = True
    result = {
        **_measured(before, after),
        "trainable_parameters": report.trainable_parameters,
        "total_parameters": report.total_parameters,
        "steps": len(steps),
        "interrupted": interrupted,
        "seconds": steps[-1].seconds if steps else 0.0,
        "useful_tokens": sum(step.tokens for step in steps),
        "useful_tokens_per_second": sum(step.tokens for step in steps) / steps[-1].seconds if steps else None,
        "peak_memory_bytes": peak_memory_bytes(),
        **predicted,
        "packed": engine.packs,
        "base_sha256_before": sha_before,
        "base_sha256_after": base_sha256(model),
    }
    run.finish(result, render_report(config.as_dict(), result, steps, str(report)))
    return result


def _read(config: TrainConfig) -> tuple[list[Row], list[Row]]:
    rows = read_rows(config.data, config.task)
    if config.eval_data is not None:
        return rows, read_rows(config.eval_data, config.task)
    return split_rows(rows, config.eval_fraction, config.seed) if config.eval_fraction else (rows, [])


def _labels(rows: list[Row]) -> list[str]:
    labels = sorted({str(row.fields["label"]) for row in rows})
    if len(labels) < 2:
        raise DataError(f"every row of {rows[0].file} has the label {labels[0]!r}; a classifier needs at least two")
    return labels


def _tokenise(
    config: TrainConfig, train: list[Row], held_out: list[Row], tokenizer: Any, labels: list[str], limit: int
) -> Dataset:
    length = min(config.max_length, limit)
    sides = [examples_for(config.task, rows, tokenizer, labels, length, config.long_rows) for rows in (train, held_out)]
    questions = held_out[: config.eval_answers] if config.task == "causal_lm" else []
    return Dataset(sides[0], sides[1], [asked(row, tokenizer) for row in questions], labels)


def _train(
    engine: Engine[Any], data: Dataset, config: TrainConfig, run: RunFolder, reporter: Reporter
) -> tuple[list[Step], bool]:
    """All steps, and whether the user ended them early. What was learned so far stays in the model either way."""
    steps: list[Step] = []
    total = step_count(len(data.train), config)
    with _first_interrupt(reporter) as interrupted, reporter.training(total) as view:
        try:
            for step in training_steps(engine, data.train, config, stopped=interrupted):
                steps.append(step)
                run.add_step(step)
                view.step(step)
                if step.number % max(1, total // 10) == 0:
                    run.save_checkpoint(engine.model, data.labels, step.number)
        except KeyboardInterrupt:
            return steps, True
        return steps, interrupted() and len(steps) < total


@contextmanager
def _first_interrupt(reporter: Reporter) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C (or SIGTERM) only be noted; a second one interrupts at once, as ever."""
    seen: list[int] = []
    before = {}

    def note(number: int, _frame: Any) -> None:
        seen.append(number)
        reporter.say("stopping after this step; the adapter will be saved (again: stop at once)")
        for name, handler in before.items():
            signal.signal(name, handler)

    try:
        before.update({name: signal.signal(name, note) for name in (signal.SIGINT, signal.SIGTERM)})
    except ValueError:
        # Only the main thread may set handlers; elsewhere the caller decides how to stop.
        before.clear()
    try:
        yield lambda: bool(seen)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _evaluate(engine: Engine[Any], tokenizer: Any, data: Dataset, reporter: Reporter, name: str) -> Evaluation | None:
    if not data.held_out:
        return None
    with reporter.stage(name) as stage:
        return evaluate(engine, tokenizer, data.held_out, data.questions, stage.update)


def _measured(before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
    return {
        "eval_loss_before": before and before.loss,
        "eval_loss_after": after and after.loss,
        "metric_name": before and before.metric_name,
        "metric_before": before and before.metric,
        "metric_after": after and after.metric,
        "eval_rows": before.rows if before else 0,
    }


def _describe(data: Dataset, engine: Engine[Any]) -> str:
    tokens = sum(len(example.ids) for example in data.train)
    path = "packed, no padding" if engine.packs else f"padded, because {engine.padded_because}"
    return f"{len(data.train):,} rows train ({tokens:,} tokens), {len(data.held_out):,} are held out; {path}"
