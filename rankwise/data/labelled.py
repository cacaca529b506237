"""Rows with labels → tokens, and what a classifier should find in them: a label, several labels, or a tag a word."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from rankwise.data.examples import Ids
from rankwise.data.files import Problem, Row
from rankwise.data.transcripts import Tokenizer

SEVERAL_LABELS = "multi_label_classification"
"""What transformers' configurations call texts with any number of labels (`problem_type`) …"""
ONE_LABEL = "single_label_classification"
"""… and texts with one each."""
_WHOLE = re.compile(r"-?[0-9]{1,18}")
_SHORT = 24
"""Tokens of a piece to try a model with."""


@dataclass(frozen=True)
class _LabelledText:
    """A text as tokens, whose loss is one prediction: of its label, or the mean over all labels."""

    counts_tokens: ClassVar[bool] = False
    ids: Ids

    @property
    def texts(self) -> tuple[Ids, ...]:
        return (self.ids,)

    @property
    def counted(self) -> int:
        """How many predictions the loss counts."""
        return 1

    @property
    def answer(self) -> tuple[int, ...]:
        """What a classifier should find."""
        raise NotImplementedError

    @property
    def taught(self) -> tuple[int, ...]:
        return self.answer

    def cut_to(self, length: int) -> Self:
        """The first `length` tokens."""
        return replace(self, ids=self.ids[:length], cut=max(0, len(self.ids) - length))

    def short(self) -> Self:
        """The first 24 tokens."""
        return self.cut_to(_SHORT)


@dataclass(frozen=True)
class LabelExample(_LabelledText):
    """A text as tokens and the index of its label."""

    label: int
    place: str
    """file:line, for messages."""
    cut: int = 0
    """Tokens that were cut off its end."""

    @property
    def answer(self) -> tuple[int, ...]:
        return (self.label,)

    def written(self, answer: Sequence[int], _tokenizer: Tokenizer, names: Sequence[str]) -> str:
        """An answer, for people to read."""
        return names[answer[0]]


@dataclass(frozen=True)
class LabelSetExample(_LabelledText):
    """A text as tokens, and for each label whether it has it."""

    labels: tuple[bool, ...]
    place: str
    cut: int = 0

    @property
    def answer(self) -> tuple[int, ...]:
        return self.labels

    def written(self, answer: Sequence[int], _tokenizer: Tokenizer, names: Sequence[str]) -> str:
        """An answer, for people to read."""
        return ", ".join(names[index] for index, has in enumerate(answer) if has) or "(no label)"


@dataclass(frozen=True)
class TagExample:
    """A sentence as tokens and the index of the tag of each word."""

    counts_tokens: ClassVar[bool] = True
    ids: Ids
    words: tuple[int, ...]
    """Where the first token of each word stands, the only one of the word that the loss counts."""
    tags: tuple[int, ...]
    place: str
    cut: int = 0

    @property
    def texts(self) -> tuple[Ids, ...]:
        return (self.ids,)

    @property
    def counted(self) -> int:
        """How many predictions the loss counts."""
        return len(self.words)

    @property
    def answer(self) -> tuple[int, ...]:
        return self.tags

    @property
    def taught(self) -> tuple[int, ...]:
        return self.words + self.tags

    def cut_to(self, length: int) -> "TagExample":
        """The first `length` tokens, with the words that begin there."""
        kept = sum(place < length for place in self.words)
        cut = max(0, len(self.ids) - length)
        return TagExample(self.ids[:length], self.words[:kept], self.tags[:kept], self.place, cut)

    def short(self) -> "TagExample":
        """The first 24 tokens, and more if no word begins there."""
        return self.cut_to(max(_SHORT, self.words[0] + 1))

    def written(self, answer: Sequence[int], tokenizer: Tokenizer, names: Sequence[str]) -> str:
        """An answer, for people to read: word/tag, and a word alone where its tag is O."""
        ends = (*self.words[1:], len(self.ids))
        parts = zip(self.words, ends, answer, strict=True)
        words = [(tokenizer.decode(self.ids[i:j], skip_special_tokens=True).strip(), names[tag]) for i, j, tag in parts]
        return " ".join(word if tag == "O" else f"{word}/{tag}" for word, tag in words)


LabelledExample = LabelExample | LabelSetExample | TagExample


def labels_in(row: Row) -> list[str]:
    """The labels of a row: of its text, or of its words."""
    fields = row.fields
    return [str(fields["label"])] if "label" in fields else fields["tags" if "tags" in fields else "labels"]


def label_counts(rows: Sequence[Row]) -> Counter[str]:
    """How many texts, or words, have each label; empty for rows without labels."""
    return Counter(label for row in rows for label in labels_in(row)) if rows and _has_labels(rows[0]) else Counter()


def in_order(labels: Iterable[str]) -> list[str]:
    """The labels as they number the classes: whole numbers by their value, others by the alphabet."""
    names = sorted(labels)
    return sorted(names, key=int) if all(map(_WHOLE.fullmatch, names)) else names


def why_no_classifier(rows: Sequence[Row], labels: Counter[str]) -> str | None:
    """Why a classifier cannot be trained on rows with these labels; None if it can, or if they have none to learn."""
    several = bool(rows) and problem_type(rows) == SEVERAL_LABELS
    if several and not labels:
        return "no row has a label"
    if several and len(labels) > 1 and set(labels.values()) == {len(rows)}:
        return (
            f"every row has all {len(labels)} labels; labels lists those of the row's text, not a 0 or 1 for each label"
        )
    if not several and len(labels) == 1:
        what = "word has the tag" if "tags" in rows[0].fields else "row has the label"
        return f"every {what} {next(iter(labels))!r}; a classifier needs at least two"
    return None


def _has_labels(row: Row) -> bool:
    return not row.fields.keys().isdisjoint(("label", "labels", "tags"))


def problem_type(rows: Sequence[Row]) -> str | None:
    """How many labels a text may have, in transformers' words; None where texts have none."""
    fields = rows[0].fields
    return SEVERAL_LABELS if "labels" in fields else ONE_LABEL if "label" in fields else None


def tokenise_labelled(
    rows: Sequence[Row], tokenizer: Tokenizer, labels: Sequence[str]
) -> tuple[list[Any], list[Problem]]:
    """The rows as tokens, of any length, and what is wrong with the others; `labels` gives each label its index.

    Rows of text and label become LabelExamples, of text and labels LabelSetExamples, of tokens and tags TagExamples.
    """
    index = {label: number for number, label in enumerate(labels)}
    problems = [
        Problem(row.place, f"{label!r} is not among the {len(labels)} labels that are trained")
        for row in rows
        for label in dict.fromkeys(labels_in(row))
        if label not in index
    ]
    known = [row for row in rows if index.keys() >= set(labels_in(row))]
    if not known:
        return [], problems
    if "tokens" in known[0].fields:
        examples, more = _tagged(known, tokenizer, index)
        return examples, problems + more
    ids = [tuple(tokens) for tokens in tokenizer([row.fields["text"] for row in known]).input_ids]
    if "label" in known[0].fields:
        return [LabelExample(i, index[labels_in(r)[0]], r.place) for i, r in zip(ids, known, strict=True)], problems
    sets = [tuple(label in labels_in(row) for label in labels) for row in known]
    return [LabelSetExample(i, s, r.place) for i, s, r in zip(ids, sets, known, strict=True)], problems


def _tagged(rows: Sequence[Row], tokenizer: Tokenizer, index: dict[str, int]) -> tuple[list[TagExample], list[Problem]]:
    """Words are joined by blanks and tokenised as one text, so that they have the tokens that a sentence has."""
    if not tokenizer.is_fast:
        problem = "the model's tokenizer does not say which characters a token stands for, so words cannot be tagged"
        return [], [Problem(row.place, problem) for row in rows]
    encoded = tokenizer([" ".join(row.fields["tokens"]) for row in rows], return_offsets_mapping=True)
    examples: list[TagExample] = []
    problems: list[Problem] = []
    for row, ids, spans in zip(rows, encoded.input_ids, encoded.offset_mapping, strict=True):
        words, faults = first_tokens(row.fields["tokens"], spans)
        problems += [Problem(row.place, fault) for fault in faults]
        if not faults:
            tags = tuple(index[tag] for tag in row.fields["tags"])
            examples.append(TagExample(tuple(ids), tuple(words), tags, row.place))
    return examples, problems


def first_tokens(words: Sequence[str], spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[str]]:
    """(the first token of each word, what is wrong) of words that are joined by blanks.

    `spans`: [start, end) of the characters of each token; those of special tokens are empty.
    """
    places, faults = [], []
    start = token = 0
    for number, word in enumerate(words):
        while token < len(spans) and spans[token][1] <= start:
            token += 1
        if token == len(spans) or spans[token][0] >= start + len(word):
            faults.append(f"tokens[{number}] ({word!r:.80}) becomes no token of this model")
        elif number and spans[token][0] < start - 1:
            faults.append(f"tokens[{number - 1}] and tokens[{number}] ({word!r:.80}) share a token of this model")
        places.append(token)
        start += len(word) + 1
    return places, faults
