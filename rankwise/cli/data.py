"""`rankwise data`"""

import json
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from rankwise.cli.arguments import parse
from rankwise.data.shapes import Format, Layout, Task
from rankwise.data.transcripts import TrainOn
from rankwise.errors import ConfigError, listing

if TYPE_CHECKING:
    from rankwise.data.report import DataReport

LONGEST_SHOWN = 4000
"""Characters of a stretch of the example."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Show what a data set would teach a model: its shape, an example with the trained tokens, counts, all problems."""

    data: tyro.conf.Positional[tuple[Path, ...]]
    """Files (JSONL, JSON, CSV, TSV, Parquet, CoNLL), folders of them, or hub data sets (OWNER/NAME@SPLIT); b.csv:2
    counts the rows of b.csv twice."""
    model: str
    """The model whose tokenizer and chat template read the data."""
    task: Task = "causal_lm"
    """causal_lm: answer prompts. seq_cls: give texts a label, or several. token_cls: give each word a tag. embedding:
    bring texts that belong together near to each other. seq2seq_lm: answer prompts with an encoder and a decoder (T5,
    BART)."""
    format: Format | None = None
    """Shape of the rows; without it, the one that most rows have."""
    columns: tuple[str, ...] = ()
    """Names of the data's own columns, such as prompt=question completion=answer."""
    train_on: TrainOn = "completion"
    """completion: every answer of a row. last: only its last answer. all: the prompts too. (causal_lm)"""
    eval_data: tuple[Path, ...] = ()
    """Held-out data in the same shape, named as the data are."""
    max_length: int = 1024
    """Longest row, in tokens."""
    long_rows: Literal["error", "cut", "drop"] = "error"
    """What to do with rows longer than --max-length."""
    all_problems: bool = False
    """Print every problem, not only the first twenty."""
    json: bool = False
    """Print the report as JSON, with every problem."""


def main(options: list[str]) -> int:
    config = parse(DataConfig, options, "data")
    if not config.data:
        raise ConfigError("name at least one file, folder or hub data set")
    if config.max_length < 2:
        raise ConfigError(f"--max-length must be at least 2, found {config.max_length}")
    if config.train_on != "completion" and config.task != "causal_lm":
        raise ConfigError(f"--train-on {config.train_on} needs --task causal_lm; leave it out")
    layout = Layout.parse(config.format, config.columns)
    from rankwise.data.report import report_on
    from rankwise.data.rows import divide
    from rankwise.models.load import load_tokenizer, longest_input_of

    division = divide(config.data, config.eval_data, config.task, layout)
    tokenizer = load_tokenizer(config.model)
    length = min(config.max_length, longest_input_of(config.model))
    report = report_on(division, config.task, tokenizer, length, config.long_rows, config.train_on)
    if config.json:
        print(json.dumps(report.as_dict(), ensure_ascii=False, indent=1))
    else:
        from rich.console import Console

        _show(report, tokenizer, config.all_problems, Console(highlight=False, emoji=False, soft_wrap=True))
    return 0 if report.ready else 2


def _show(report: "DataReport", tokenizer: Any, all_problems: bool, console: Any) -> None:
    from rankwise.data.rows import MOST_PROBLEMS

    for line in report.lines:
        console.print(line, markup=False)
    console.print(f"training: {report.train}", markup=False)
    if report.held_out:
        console.print(f"evaluation: {report.held_out}", markup=False)
    if report.labels:
        counts, kind = list(report.labels.values()), "words" if report.train.trained_tokens else "rows"
        console.print(f"labels: {len(counts)}, with {counts[-1]:,} to {counts[0]:,} {kind} each", markup=False)
    _show_example(report, tokenizer, console)
    if report.problems:
        most = len(report.problems) if all_problems else MOST_PROBLEMS
        console.print(f"\nproblems: {len(report.problems):,}", markup=False)
        console.print(listing([str(problem) for problem in report.problems], most), markup=False)
    console.print(f"\n{report.verdict}", markup=False)


def _show_example(report: "DataReport", tokenizer: Any, console: Any) -> None:
    """The first row: trained tokens in colour on a terminal, in ⟦ ⟧ elsewhere."""
    from rich.text import Text

    from rankwise.data.examples import TextExample
    from rankwise.data.labelled import LabelledExample, in_order
    from rankwise.data.report import stretches

    example = report.example
    if example is None:
        return
    if isinstance(example, LabelledExample):
        answer = example.written(example.answer, tokenizer, in_order(report.labels))
        console.print(f"\n{example.place}: {tokenizer.decode(example.ids)} → {answer}", markup=False)
        return
    if not isinstance(example, TextExample):
        names = ("encoder", "decoder, trained") if report.train.trained_tokens else ("anchor", "positive")
        console.print(f"\n{example.place}, as the model reads it:", markup=False)
        for name, ids in zip_longest(names, example.texts, fillvalue="negative"):
            console.print(f"{name}: {tokenizer.decode(ids)}", markup=False)
        return
    marks = ("", "") if console.is_terminal else ("⟦", "⟧")
    text = Text()
    for part, trained in stretches(example, tokenizer):
        if len(part) > LONGEST_SHOWN:
            part = f"{part[: LONGEST_SHOWN // 2]} … {part[-LONGEST_SHOWN // 2 :]}"
        text.append(part.join(marks) if trained else part, style="bold green" if trained else "dim")
    how = "in green" if console.is_terminal else "between ⟦ and ⟧"
    console.print(f"\n{example.place}, as the model reads it; trained {how}:", markup=False)
    console.print(text)
