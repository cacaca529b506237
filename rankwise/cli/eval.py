"""`rankwise eval`"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankwise.cli.arguments import parse
from rankwise.data.shapes import ASKING, Format, Layout, Task
from rankwise.data.transcripts import TrainOn
from rankwise.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measure loss, exact match and more (accuracy, F1, MCC; recall, MRR) on a file, each with a 95 % interval."""

    data: tuple[Path, ...]
    """Rows of the shape that the adapter was trained on: files, folders or hub data sets, as in training."""
    format: Format | None = None
    """Shape of the rows; without it, the one that most rows have."""
    columns: tuple[str, ...] = ()
    """Names of the data's own columns, such as prompt=question completion=answer."""
    train_on: TrainOn = "completion"
    """What the loss counts, as in training."""
    adapter: Path | None = None
    """Adapter folder, or the folder of a run; without it the base model is measured."""
    model: str | None = None
    """Base model; without it, the one that the adapter names."""
    task: Task | None = None
    """What the model does; without it, what the adapter's configuration says, and causal_lm for a base model."""
    base_dtype: Literal["fp32", "bf16"] = "fp32"
    """How the base model's weights are kept, as in training."""
    eval_answers: int | None = None
    """At most so many prompts are answered to count exact matches; without it, all. 0: none."""
    metrics: bool = False
    """Measure BLEU, chrF and ROUGE of the answers too; needs pip install 'rankwise[metrics]'."""
    max_length: int = 1024
    """Longest row, in tokens."""
    long_rows: Literal["error", "cut", "drop"] = "error"
    """What to do with rows longer than --max-length."""


def main(options: list[str]) -> int:
    config = parse(EvalConfig, options, "eval")
    if config.eval_answers is not None and config.eval_answers < 0:
        raise ConfigError(f"--eval-answers must be at least 0, found {config.eval_answers}")
    if config.max_length < 2:
        raise ConfigError(f"--max-length must be at least 2, found {config.max_length}")
    if config.metrics and config.eval_answers == 0:
        raise ConfigError("--metrics measures answers; leave --eval-answers 0 out")
    layout = Layout.parse(config.format, config.columns)
    from rankwise.data.examples import questions_of
    from rankwise.data.rows import read_rows
    from rankwise.data.sources import check_unweighted
    from rankwise.data.tasks import examples_for
    from rankwise.engine.tasks import engine_for
    from rankwise.models.adapted import load_adapted
    from rankwise.models.load import longest_input, pad_id
    from rankwise.train import text_metrics
    from rankwise.train.evaluate import evaluate
    from rankwise.train.progress import Reporter

    if config.metrics:
        text_metrics.check_installed()
    check_unweighted(config.data)
    reporter = Reporter()
    with reporter.stage("loading"):
        adapted = load_adapted(config.model, config.adapter, config.task, config.base_dtype)
    if config.metrics and adapted.task not in ASKING:
        raise ConfigError("--metrics is for answers; what other tasks measure is always measured")
    if config.eval_answers and adapted.task not in ASKING:
        raise ConfigError("--eval-answers is for tasks that answer; this adapter's task has no answers")
    if config.train_on != "completion" and adapted.task != "causal_lm":
        raise ConfigError(f"--train-on {config.train_on} needs --task causal_lm; leave it out")
    rows, tokenizer = read_rows(config.data, adapted.task, layout), adapted.tokenizer
    length = min(config.max_length, longest_input(adapted.model))
    examples = examples_for(adapted.task, rows, tokenizer, adapted.labels, length, config.long_rows, config.train_on)
    most = config.eval_answers if adapted.task in ASKING else 0
    questions = questions_of(examples, rows, tokenizer, length, most, reporter.say)
    if config.metrics:
        text_metrics.check_answerable(questions)
    engine = engine_for(adapted.task, adapted.model, pad_id(tokenizer), examples)
    with reporter.stage("evaluating") as stage:
        measured = evaluate(engine, tokenizer, examples, questions, stage.update, config.metrics)
    values = {measured.metric_name: measured.metric} | {name: found.value for name, found in measured.metrics.items()}
    intervals = {name: [found.lower, found.upper] for name, found in measured.metrics.items()}
    print(json.dumps({"loss": measured.loss, **values, "rows": measured.rows, "intervals": intervals}, allow_nan=False))
    return 0
