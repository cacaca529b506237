"""What each task makes of rows."""

from collections.abc import Sequence
from typing import Any

from rankwise.data.examples import LongRows, label_examples, text_examples
from rankwise.data.files import Row
from rankwise.data.pairs import pair_examples
from rankwise.data.seq2seq import seq2seq_examples
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
        case "seq_cls":
            return label_examples(rows, tokenizer, labels, max_length, long_rows)
        case "embedding":
            return pair_examples(rows, tokenizer, max_length, long_rows)
        case "seq2seq_lm":
            return seq2seq_examples(rows, tokenizer, max_length, long_rows)
        case _:
            return text_examples(rows, tokenizer, max_length, long_rows, train_on)
