"""Rows → tokens for sequence-to-sequence models: the encoder reads what is asked, the decoder writes the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rankwise.data.examples import NO_END, Ids, asked
from rankwise.data.files import Problem, Row
from rankwise.data.transcripts import Tokenizer
from rankwise.errors import DataError


@dataclass(frozen=True)
class Seq2SeqExample:
    """A question and its answer as tokens."""

    counts_tokens: ClassVar[bool] = True
    source: Ids
    """What the encoder reads."""
    target: Ids
    """What the decoder is to write, its end-of-text token included."""
    place: str
    cut: int = 0

    @property
    def texts(self) -> tuple[Ids, ...]:
        return self.source, self.target

    @property
    def ids(self) -> Ids:
        return self.source + self.target

    @property
    def taught(self) -> tuple[int, ...]:
        return (len(self.source),)

    @property
    def counted(self) -> int:
        """How many predictions the loss counts: every token of the target."""
        return len(self.target)

    @property
    def answer(self) -> Ids:
        """What the model should find."""
        return self.target

    def short(self) -> "Seq2SeqExample":
        """The first 24 tokens of both."""
        return self.cut_to(24)

    def cut_to(self, length: int) -> "Seq2SeqExample":
        cut = sum(max(0, len(text) - length) for text in self.texts)
        return Seq2SeqExample(self.source[:length], self.target[:length], self.place, cut)


def tokenised_answers(rows: Sequence[Row], tokenizer: Tokenizer) -> tuple[list[Seq2SeqExample], list[Problem]]:
    """The rows as tokens, of any length, and what is wrong with those that the tokenizer cannot render.

    The source is what the model is asked later, the target the answer with the tokens that the tokenizer puts around a
    target. Raises DataError if the tokenizer names no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(NO_END)
    examples: list[Seq2SeqExample] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            prompt = asked(row, tokenizer)
        except DataError as error:
            problems.append(Problem(row.place, str(error)))
            continue
        if prompt.answer is None:
            problems.append(Problem(row.place, "the last turn is no answer that is trained, and the decoder writes it"))
            continue
        target = tuple(tokenizer(text_target=prompt.answer).input_ids)
        target += () if target[-1:] == (tokenizer.eos_token_id,) else (tokenizer.eos_token_id,)
        examples.append(Seq2SeqExample(prompt.ids, target, row.place))
    return examples, problems
