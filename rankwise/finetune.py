"""The main path: read data → load → inject → train → save → cut ranks → evaluate → report."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from rankwise.data.examples import Prompt, questions_of
from rankwise.data.labelled import in_order, label_counts, problem_type, why_no_classifier
from rankwise.data.lazy import LazyExamples
from rankwise.data.report import measure
from rankwise.data.rows import Row, divide
from rankwise.data.shapes import ASKING, Layout
from rankwise.data.tasks import examples_for
from rankwise.data.transcripts import on_day
from rankwise.engine.engine import Engine
from rankwise.engine.explain import explain
from rankwise.engine.heap import return_freed_memory
from rankwise.engine.tasks import engine_for
from rankwise.errors import ConfigError, DataError
from rankwise.lora.config import LoraConfig
from rankwise.lora.inject import adapters_off, inject_, largest_ranks
from rankwise.lora.start import FROM_DATA, start_from_data_
from rankwise.models.adapted import label_names, renew_head_
from rankwise.models.load import base_config, base_sha256, load_model, load_tokenizer, longest_input_of, pad_id
from rankwise.models.pooling import unread_layers
from rankwise.rank.inspect import inspect_adapter
from rankwise.rank.shrink import ShrinkReport, different_left, shrink_, split_examples
from rankwise.train import text_metrics, trackers
from rankwise.train.batches import ROWS_AT_FIRST, Plan, planned_steps
from rankwise.train.config import TrainConfig
from rankwise.train.evaluate import Evaluation, evaluate
from rankwise.train.forecast import forecast
from rankwise.train.interrupt import sigterm_as_ctrl_c
from rankwise.train.loop import Training
from rankwise.train.peak_memory import peak_memory_bytes
from rankwise.train.progress import Reporter
from rankwise.train.rate_check import best_rate
from rankwise.train.report import render_report
from rankwise.train.run import run_training
from rankwise.train.run_folder import RunFolder
from rankwise.train.start import Start, data_sha256, settings_of

START_STEPS = 8
"""Steps whose batches an adapter that starts from data looks at."""


ROWS_OF_CUT = 600
"""At most so many held-out rows choose and confirm ranks, so that the cut is a small part of a long run."""

SHARE_OF_CUT = 0.01
"""Of what the updates gain, the most that a run's adapter may lose by the cut; nobody asked for a smaller one."""


@dataclass(frozen=True)
class Dataset:
    """Everything that a run learns from and is measured on."""

    train: Sequence[Any]
    """Examples of the task."""
    first: Sequence[Any]
    """Those that were looked at; all of them, but for a large file's."""
    held_out_rows: Sequence[Row]
    held_out: list[Any]
    questions: list[Prompt]
    """Held-out prompts to answer, for exact match."""
    sha256: str
    choosing: int
    """Held-out rows that ask different things, of those that became examples: so many can choose ranks."""


def finetune(config: TrainConfig, reporter: Reporter | None = None, resume: bool = False) -> dict[str, Any]:
    """Train an adapter as `config` says and leave it, with what was measured, in the run folder `config.out`.

    With `resume` the run that was interrupted there goes on, and ends with the very bytes that it would have had.
    Returns the content of result.json. The same configuration on the same machine gives the same adapter, byte for
    byte. Ctrl-C or SIGTERM ends the training after the current step and saves a checkpoint and the adapter.
    Raises ConfigError, DataError, ModelError, TargetError or StorageError before any training if an input is wrong, or
    if settings, data or base are not those of the run to resume; MissingDependency if a setting needs a package;
    RankwiseError if a loss is no longer finite.
    """
    trackers.check_installed(config.tracker)
    if config.metrics:
        text_metrics.check_installed()
    with RunFolder(config, resume) as run, run.where_it_began():
        return _finetune(config, run, reporter or Reporter())


def _finetune(config: TrainConfig, run: RunFolder, reporter: Reporter) -> dict[str, Any]:
    train_rows, held_out_rows = read_data(config, reporter.say)
    labels = labels_of(train_rows, config.model)
    with reporter.stage("tokenising"):
        tokenizer = on_day(load_tokenizer(config.model), run.day)
        data = _tokenise(config, train_rows, held_out_rows, tokenizer, labels, reporter.say)
    # A plan that cannot be is found before anything is loaded, measured or written.
    plan = planned_steps(data.train, config)
    model = _load(config, labels, problem_type(train_rows), reporter)
    lora, rank_rule = _ranks_that_fit(model, config, data.choosing)
    report = inject_(model, lora)
    engine = engine_for(config.task, model, pad_id(tokenizer), data.train)
    reporter.say(report.summary())
    described = _describe(data, engine, len(train_rows) - len(data.train)) + rank_rule
    reporter.say(described)

    predicted = forecast(plan, config, lora, len(labels), engine.packs)
    engine.recomputes = predicted.recompute
    _prepare(engine, plan, config, reporter)
    start, training = _start(engine, data, plan, config, run, reporter)
    outcome = run_training(training, data.held_out, config, run, reporter)
    return_freed_memory()  # What training needed at its height is not to lie beside what evaluation needs.
    steps, interrupted = outcome.steps, outcome.interrupted
    run.save_adapter(model)
    shrunk, uncut_because = None, config.why_rank_is_fixed(data.choosing)
    before = after = None
    with sigterm_as_ctrl_c() as interrupt:
        try:
            if not interrupted:
                if not uncut_because:
                    shrunk, uncut_because = _shrink(engine, data, config, run, reporter)
                before, after = _evaluate_both(engine, tokenizer, data, config, reporter)
        except KeyboardInterrupt:
            interrupted, before = True, None
            if not shrunk:
                run.take_full_adapter_back()
    result = {
        **_evaluation_fields(before, after),
        "trainable_parameters": report.trainable_parameters,
        "total_parameters": report.total_parameters,
        "steps": len(steps),
        "adapter_step": outcome.adapter_step,
        "stopped_early": outcome.stopped_early,
        "interrupted": interrupted,
        "signal": outcome.signal or interrupt.signal,
        "learning_rate": training.rate,
        "seconds": steps[-1].seconds if steps else 0.0,
        "useful_tokens": sum(step.tokens for step in steps),
        "useful_tokens_per_second": sum(step.tokens for step in steps) / steps[-1].seconds if steps else None,
        "peak_memory_bytes": peak_memory_bytes(),
        **asdict(predicted),
        "shrunk": shrunk and asdict(shrunk),
        "uncut_because": uncut_because,
        "packed": engine.packs,
        "base_sha256_before": start.base_sha256,
        "base_sha256_after": base_sha256(model),
    }
    run.finish(result, render_report(config.as_dict(), result, steps, described, inspect_adapter(run.adapter).matrices))
    return result


def _load(config: TrainConfig, labels: list[str], problem_type: str | None, reporter: Reporter) -> Any:
    """The base model, a new head as the seed draws it."""
    torch.manual_seed(config.seed)
    with reporter.stage(f"loading {config.model}"):
        model = load_model(config.model, config.task, labels, problem_type, config.base_dtype)
        renewed = renew_head_(model, config.model)
    if renewed:
        reporter.say("the base's head is for other labels than those of the data, and is drawn anew")
    return model


def _ranks_that_fit(model: Any, config: TrainConfig, held_out: int) -> tuple[LoraConfig, str]:
    """The adapter's settings, with ranks that nobody gave lowered where a matrix is smaller, and what is to be said."""
    left_out = unread_layers(model) if config.task == "embedding" else None
    lora = config.lora(config.trained_rank(held_out), left_out)
    if config.r != "auto":
        return lora, ""
    limits = largest_ranks(model, lora)
    small = [rank for rank in limits.values() if rank < lora.r]
    said = f"\n{config.rank_rule(held_out)}"
    if small:
        said += f"\n{len(small)} of {len(limits)} matrices are smaller, and train at min(d, k), from {min(small)} on"
    return lora.lowered_to(limits), said


def _prepare(engine: Engine[Any], plan: Plan[Any], config: TrainConfig, reporter: Reporter) -> None:
    """What the first batches are needed for: an explanation of the engine, a start of the adapter from data."""
    if not config.explain_engine and config.init_lora_weights not in FROM_DATA:
        return
    first = [batch for step in plan[:START_STEPS] for batch in step]
    if config.explain_engine:
        reporter.say(explain(engine, first, plan.rows, config.state_bytes(plan.runs_rows_again)))
    if config.init_lora_weights in FROM_DATA:
        with reporter.stage("starting the adapter from the first batches"):
            start_from_data_(engine.model, first, engine.loss)


def _start(
    engine: Engine[Any],
    data: Dataset,
    plan: Plan[Any],
    config: TrainConfig,
    run: RunFolder,
    reporter: Reporter,
) -> tuple[Start, Training]:
    """Settle the learning rate, or take that of the run to be resumed."""
    hashes = data.sha256, base_sha256(engine.model)
    start = run.read_start()
    if start is not None:
        start.check(*hashes)
        run.write_start(start)  # It may have been damaged.
        return start, Training(engine, data.train, replace(config, lr=start.learning_rate))
    run.write_settings()
    rate = config.lr
    if rate == "auto":
        rate = best_rate(engine, data.train, data.held_out, config, reporter.say)
    training = Training(engine, data.train, replace(config, lr=rate))
    reporter.say(f"{len(plan):,} steps, learning rate {training.rate:.3g}")
    start = Start(*hashes, training.rate, str(Path.cwd()), settings_of(config), run.day)
    run.write_start(start)
    return start, training


def read_data(
    config: TrainConfig, say: Callable[[str], None] = lambda line: None
) -> tuple[Sequence[Row], Sequence[Row]]:
    """(rows to train on, held-out rows); what was found is said line by line. Raises DataError."""
    layout = Layout.parse(config.format, config.columns)
    division = divide(config.data, config.eval_data, config.task, layout, config.eval_fraction, config.seed)
    division.refuse_problems()
    for line in division.lines():
        say(line)
    return division.train, division.held_out


def rows_sha256(config: TrainConfig) -> str:
    """SHA-256 of all rows of a run, on either side. Raises DataError."""
    digest = hashlib.sha256()
    for rows in read_data(config):
        digest.update(f"{len(rows)} rows\n".encode())
        for row in rows:
            digest.update(json.dumps(row.fields, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def labels_of(rows: Sequence[Row], base: str) -> list[str]:
    """The labels' names in the order of a classifier's outputs; none for rows that have no labels by their shape.

    A base that is a classifier of these very labels keeps its order, which its head was trained for.
    Raises DataError if they leave nothing to learn.
    """
    labels = label_counts(rows)
    if reason := why_no_classifier(rows, labels):
        raise DataError(f"{rows[0].file}: {reason}")
    own = label_names(base_config(base)) if labels else []
    return own if sorted(own) == sorted(labels) else in_order(labels)


def _tokenise(
    config: TrainConfig,
    train: Sequence[Row],
    held_out: Sequence[Row],
    tokenizer: Any,
    labels: list[str],
    say: Callable[[str], None],
) -> Dataset:
    length = min(config.max_length, longest_input_of(config.model))

    def examples_of(rows: Sequence[Row]) -> list[Any]:
        return examples_for(config.task, rows, tokenizer, labels, length, config.long_rows, config.train_on)

    if len(train) > ROWS_AT_FIRST and config.takes_rows_as_they_come:
        examples = LazyExamples(train, examples_of)
        first = examples.keep(planned_steps(examples, config).beginning.distinct)
    else:
        examples = first = examples_of(train)
    kept = examples_of(held_out)
    most = config.eval_answers if config.task in ASKING else 0
    questions = questions_of(kept, held_out, tokenizer, length, most, say)
    if config.metrics:
        text_metrics.check_answerable(questions)
    sha256 = data_sha256(tokenizer, train, held_out)
    return Dataset(examples, first, held_out, kept, questions, sha256, different_left(held_out, kept))


def _shrink(
    engine: Engine[Any], data: Dataset, config: TrainConfig, run: RunFolder, reporter: Reporter
) -> tuple[ShrinkReport | None, str | None]:
    """Cut the trained adapter to the ranks that the held-out rows show to be enough, and save both.

    Where they show none, the adapter stays as it is; then the reason is returned and no report.
    """
    try:
        held_out = split_examples(data.held_out_rows, data.held_out, config.seed, ROWS_OF_CUT)
        with reporter.stage("shrinking") as stage:
            report = shrink_(engine, held_out, on_progress=stage.update, share=SHARE_OF_CUT)
    except (ConfigError, DataError) as error:
        reporter.say(f"the adapter stays as it was trained: {error}")
        return None, str(error)
    run.keep_full_adapter()
    run.save_adapter(engine.model)
    reporter.say(report.summary())
    return report, None


def _evaluate_both(
    engine: Engine[Any], tokenizer: Any, data: Dataset, config: TrainConfig, reporter: Reporter
) -> tuple[Evaluation | None, Evaluation | None]:
    """(the base, the adapter); the base too after training, so that the first step waits for nothing."""

    def measured(stage: Any) -> Evaluation:
        return evaluate(engine, tokenizer, data.held_out, data.questions, stage.update, config.metrics)

    if not data.held_out:
        return None, None
    with reporter.stage("evaluating the base") as stage, adapters_off(engine.model):
        before = measured(stage)
    with reporter.stage("evaluating the adapter") as stage:
        return before, measured(stage)


def _evaluation_fields(before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
    """Those of result.json that say what the evaluations of base and adapter measured."""
    answers = [sample.answer for sample in after.samples] if after else []
    return {
        "eval_loss_before": before and before.loss,
        "eval_loss_after": after and after.loss,
        "metric_name": before and before.metric_name,
        "metric_before": before and before.metric,
        "metric_after": after and after.metric,
        "metrics_before": before and asdict(before)["metrics"],
        "metrics_after": after and asdict(after)["metrics"],
        "eval_rows": before.rows if before else 0,
        "samples": [
            {"prompt": sample.prompt, "reference": sample.reference, "before": sample.answer, "after": answer}
            for sample, answer in zip_longest(before.samples if before else (), answers)
        ],
    }


def _describe(data: Dataset, engine: Engine[Any], dropped: int) -> str:
    """What is trained and measured, and how; `dropped`: training rows that are left out."""
    path = "packed, no padding" if engine.packs else f"padded, because {engine.padded_because}"
    if later := len(data.train) - len(data.first):
        rest = f"; these are the first that run, the other {later:,} are looked at while training goes on"
    elif dropped:
        rest = f"; {dropped:,} too long and left out"
    else:
        rest = ""
    held_out = f"{len(data.held_out):,} rows are held out"
    if cut := sum(example.cut > 0 for example in data.held_out):
        held_out += f", {cut:,} of them cut off at their end"
    if left_out := len(data.held_out_rows) - len(data.held_out):
        held_out += f"; {left_out:,} more are too long and left out"
    return f"training: {measure(data.first)}{rest}\n{held_out}; {path}"
