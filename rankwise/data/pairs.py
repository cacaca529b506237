"""Rows → tokens for embeddings: a text, one that belongs to it, and ones that do not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rankwise.data.examples import Ids
from rankwise.data.files import Row
from rankwise.data.transcripts import Tokenizer


@dataclass(frozen=True)
class PairExample:
    """A text and its positive as tokens, and negatives of its own."""

    counts_tokens: ClassVar[bool] = False
    anchor: Ids
    positive: Ids
    negatives: tuple[Ids, ...]
    place: str
    cut: int = 0

    @property
    def texts(self) -> tuple[Ids, ...]:
        return (self.anchor, self.positive, *self.negatives)

    @property
    def ids(self) -> Ids:
        return tuple(token for text in self.texts for token in text)

    @property
    def taught(self) -> tuple[int, ...]:
        return tuple(map(len, self.texts))

    @property
    def counted(self) -> int:
        """How many predictions the loss counts: which text is the positive."""
        return 1

    def short(self) -> "PairExample":
        """The first 24 tokens of each text."""
        return self.cut_to(24)

    def cut_to(self, length: int) -> "PairExample":
        anchor, positive, *negatives = (text[:length] for text in self.texts)
        cut = sum(max(0, len(text) - length) for text in self.texts)
        return PairExample(anchor, positive, tuple(negatives), self.place, cut)


def tokenised_pairs(rows: Sequence[Row], tokenizer: Tokenizer) -> list[PairExample]:
    """The rows as tokens, of any length."""
    if not rows:
        return []
    texts = [(row.fields["anchor"], row.fields["positive"], *row.fields["negatives"]) for row in rows]
    tokens = iter(tokenizer([text for row in texts for text in row]).input_ids)
    examples = []
    for row, own in zip(rows, texts, strict=True):
        anchor, positive, *negatives = (tuple(next(tokens)) for _ in own)
        examples.append(PairExample(anchor, positive, tuple(negatives), row.place))
    return examples
