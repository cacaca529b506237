"""What each task makes of rows."""

from collections.abc import Sequence
from typing import Any

from rankwise.data.examples import LongRows, tokenise, usable
from rankwise.data.files import Problem, Row
from rankwise.data.labelled import tokenise_labelled
from rankwise.data.pairs import tokenised_pairs
from rankwise.data.seq2seq import tokenised_answers
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
    """The rows as examples of the task, each of whose texts has at most `max_length` tokens.

    `labels` gives each label its index. `train_on`, of causal_lm, says which tokens of a conversation are trained:
    "completion" every assistant turn with its end-of-turn token, "last" the last one alone, "all" every token; of a
    text every token is trained.
    Raises DataError for rows of which the task can make no example (`tokenised`); for rows that are too long, if
    `long_rows` is "error"; if "drop" leaves no row, or "cut" a row with nothing to predict.
    """
    if not rows:
        return []
    return usable(*tokenised(task, rows, tokenizer, labels, train_on), max_length, long_rows)


def why_too_few(task: str, rows: int) -> str | None:
    """Why a task cannot be learned from so few rows; None if it can."""
    if task == "embedding" and rows < 2:
        return (
            "--task embedding needs at least two training rows, because a row is told apart from the others of its "
            f"batch; found {rows}"
        )
    return None


def tokenised(
    task: str, rows: Sequence[Row], tokenizer: Tokenizer, labels: Sequence[str], train_on: TrainOn
) -> tuple[list[Any], list[Problem]]:
    """The rows as examples of any length, and what is wrong with rows that cannot be examples.

    Those are rows that the chat template cannot render, that have a label which is not among `labels`, whose words are
    no tokens of their own, or that have no answer for a decoder to write.
    Raises DataError if the tokenizer names no end-of-text token where one ends an answer.
    """
    match task:
        case "seq_cls" | "token_cls":
            return tokenise_labelled(rows, tokenizer, labels)
        case "embedding":
            return tokenised_pairs(rows, tokenizer), []
        case "seq2seq_lm":
            return tokenised_answers(rows, tokenizer)
        case _:
            return tokenise(rows, tokenizer, train_on)
