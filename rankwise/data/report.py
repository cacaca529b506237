"""What a data set would teach, before any training: counts, lengths, an example with its trained tokens, a verdict."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from rankwise.data.examples import Example, LongRows, TextExample, fitted, longest_text, untrained_because
from rankwise.data.files import Problem, Row
from rankwise.data.labelled import in_order, label_counts, why_no_classifier
from rankwise.data.rows import Division, why_no_split
from rankwise.data.tasks import tokenised, why_too_few
from rankwise.data.transcripts import Tokenizer, TrainOn


@dataclass(frozen=True)
class Measure:
    """Counts of one side's rows."""

    rows: int
    tokens: int
    trained_tokens: int
    """Or words to tag, each trained at its first token; 0 where the loss counts rows."""
    median: int
    """Length in tokens of a row's longest text, as p95, p99 and longest."""
    p95: int
    p99: int
    longest: int
    cut: int
    """Rows whose end was cut off."""
    duplicates: int
    """Rows that another row before them equals, token by token."""

    def __str__(self) -> str:
        trained = f", {self.trained_tokens:,} of them trained" if self.trained_tokens else ""
        notes = f"; {self.cut:,} cut off at their end" if self.cut else ""
        notes += f"; {self.duplicates:,} are duplicates" if self.duplicates else ""
        return (
            f"{self.rows:,} rows, {self.tokens:,} tokens{trained}; length: median {self.median}, "
            f"95 % up to {self.p95}, 99 % up to {self.p99}, longest {self.longest}{notes}"
        )


def measure(examples: Sequence[Example]) -> Measure:
    """Count rows, tokens and duplicates of examples."""
    lengths = sorted(map(longest_text, examples)) or [0]
    median, p95, p99 = (lengths[int(part * (len(lengths) - 1))] for part in (0.5, 0.95, 0.99))
    different = {(example.ids, example.taught) for example in examples}
    return Measure(
        rows=len(examples),
        tokens=sum(len(example.ids) for example in examples),
        trained_tokens=sum(example.counted for example in examples if example.counts_tokens),
        median=median,
        p95=p95,
        p99=p99,
        longest=lengths[-1],
        cut=sum(example.cut > 0 for example in examples),
        # A row that its file's weight repeats is no duplicate.
        duplicates=len({example.place for example in examples}) - len(different),
    )


@dataclass(frozen=True)
class DataReport:
    """Everything that `rankwise data` says."""

    lines: list[str]
    train: Measure
    held_out: Measure | None
    labels: dict[str, int]
    """Rows, or words, of each label; empty where there are none."""
    left_out: int
    """Training rows that ask what an evaluation row asks."""
    problems: list[Problem]
    """Everything that would stop a training run, row by row."""
    dropped: int
    """Rows that are too long and left out."""
    example: Example | None
    """The first one that has something to train."""
    why_not_learned: str | None
    """Why the task cannot be learned from these labels, or from so few rows."""
    why_no_split: str | None = None
    """Why a run could hold out none of the rows by itself."""

    @property
    def verdict(self) -> str:
        if self.problems:
            rows = len({problem.place for problem in self.problems})
            return f"not ready: {rows:,} rows stop a training run; mend or remove them"
        if not self.train.rows:
            long = f"; {self.dropped:,} rows are too long (--max-length)" if self.dropped else ""
            return f"not ready: no row is left to train on{long}"
        if self.why_not_learned:
            return f"not ready: {self.why_not_learned}"
        notes = [f"{self.dropped:,} rows are too long and left out"] if self.dropped else []
        notes += [self.why_no_split] if self.why_no_split else []
        return f"ready to train ({'; '.join(notes)})" if notes else "ready to train"

    @property
    def ready(self) -> bool:
        return self.verdict.startswith("ready")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "verdict": self.verdict,
            "ready": self.ready,
            "read": self.lines,
            "train": asdict(self.train),
            "held_out": self.held_out and asdict(self.held_out),
            "labels": self.labels,
            "left_out_of_training": self.left_out,
            "dropped": self.dropped,
            "problems": [asdict(problem) for problem in self.problems],
        }


def report_on(
    division: Division, task: str, tokenizer: Tokenizer, max_length: int, long_rows: LongRows, train_on: TrainOn
) -> DataReport:
    """Tokenise both sides and find everything that would stop a training run on them."""
    labels = label_counts(division.train)
    problems = list(division.problems)
    sides: list[list[Any]] = []
    dropped = 0
    for rows in (division.train, division.held_out):
        examples, refused = tokenised(task, rows, tokenizer, in_order(labels), train_on)
        problems += refused
        kept = fitted(examples, max_length, long_rows)
        problems += _problems(kept, max_length)
        dropped += len(examples) - len(kept)
        sides.append(kept)
    return DataReport(
        lines=[*division.lines(), *_special_tokens(division.train, tokenizer)],
        train=measure(sides[0]),
        held_out=measure(sides[1]) if division.held_out else None,
        labels=dict(labels.most_common()),
        left_out=len(division.left_out),
        # A row that a weight repeats has its problem once.
        problems=list(dict.fromkeys(problems)),
        dropped=dropped,
        example=next((example for example in sides[0] if example.counted), None),
        why_not_learned=why_no_classifier(division.train, labels) or why_too_few(task, len(sides[0])),
        why_no_split=why_no_split(division.train) if division.train and not division.held_out else None,
    )


def _special_tokens(rows: Sequence[Row], tokenizer: Tokenizer) -> Iterator[str]:
    """A line about rows whose own text holds marks such as an end of turn, which the model reads as its own."""
    marks = [token for token in tokenizer.all_special_tokens if len(token) > 1]
    found = [
        (row.place, mark)
        for row in rows
        for text in [json.dumps(row.fields, ensure_ascii=False, default=str)]
        if (mark := next((mark for mark in marks if mark in text), None))
    ]
    if found:
        (place, mark), count = found[0], len({place for place, _ in found})
        yield f"special tokens of the model stand in the text of {count:,} rows (the first: {place}, {mark!r})"


def _problems(kept: Sequence[Example], max_length: int) -> Iterator[Problem]:
    for example in kept:
        if longest_text(example) > max_length:
            yield Problem(
                example.place,
                f"{longest_text(example)} tokens, more than {max_length}, all that --max-length and the model allow "
                "(--long-rows cut or drop says what to do with such rows)",
            )
        elif not example.counted:
            yield Problem(example.place, f"no trained token: {untrained_because(example)}")


def stretches(example: TextExample, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The example as text, in stretches that are trained or not."""
    pairs = groupby(zip(example.ids, example.trained, strict=True), key=lambda pair: pair[1])
    return [(tokenizer.decode([token for token, _ in group]), trained) for trained, group in pairs]
