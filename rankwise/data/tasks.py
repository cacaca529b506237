"""What each task makes of rows."""

from collections.abc import Sequence
from typing import Any

from rankwise.data.examples import LongRows, text_examples, tokenise
from rankwise.data.files import Problem, Row
from rankwise.data.labelled import label_examples, tokenise_labelled
from rankwise.data.pairs import pair_examples, tokenised_pairs
from rankwise.data.seq2seq import seq2seq_examples, tokenised_answers
from rankwise.data.transcripts import Tokenizer, TrainOn


def examples_for(
    task: str,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    labels: Sequence[str],
    max_length: int,
    long_rows: LongRows,
    train_on: TrainOn = "completion",
) -> list[Any]:
    """The rows as examples of the task: see `text_examples`, `label_examples`, `pair_examples`, `seq2seq_examples`."""
    if not rows:
        return []
    match task:
        case "seq_cls" | "token_cls":
            return label_examples(rows, tokenizer, labels, max_length, long_rows)
        case "embedding":
            return pair_examples(rows, tokenizer, max_length, long_rows)
        case "seq2seq_lm":
            return seq2seq_examples(rows, tokenizer, max_length, long_rows)
        case _:
            return text_examples(rows, tokenizer, max_length, long_rows, train_on)


def tokenised(
    task: str, rows: Sequence[Row], tokenizer: Tokenizer, labels: Sequence[str], train_on: TrainOn
) -> tuple[list[Any], list[Problem]]:
    """The same in any length, and what is wrong with rows that cannot be examples."""
    match task:
        case "seq_cls" | "token_cls":
            return tokenise_labelled(rows, tokenizer, labels)
        case "embedding":
            return tokenised_pairs(rows, tokenizer), []
        case "seq2seq_lm":
            return tokenised_answers(rows, tokenizer)
        case _:
            return tokenise(rows, tokenizer, train_on)
