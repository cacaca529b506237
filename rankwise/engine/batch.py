"""Examples → the tensors of one forward pass: packed into a stream, or padded for a model that packing cannot serve."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from rankwise.data.examples import LabelExample, TextExample
from rankwise.engine.attention import Packing

_LEAST_SAVED = 16
"""Tokens that a shared segment must save: attention works segment by segment, and a short one is not worth its call."""


@dataclass(frozen=True)
class Stream:
    """Examples one after the other. T tokens, n trained tokens."""

    ids: Tensor
    """[1, T]"""
    positions: Tensor
    """[1, T], restarting with each example"""
    packing: Packing
    predictors: Tensor
    """[n], where in the stream the hidden state lies that predicts each trained token"""
    targets: Tensor
    """[n], the trained tokens"""


def pack(examples: Sequence[TextExample], device: torch.device) -> Stream:
    """Pack conversations; a beginning that several of them share stands once in the stream."""
    layout = _Layout(examples)
    layout.place(range(len(examples)), start=0, before=None)
    ends = list(accumulate(layout.lengths))
    predictors, targets = [], []
    for index, example in enumerate(examples):
        # What is shared ends before the last prompt token, so all predictors lie in the example's own end.
        shift = ends[layout.own[index]] - len(example.ids) - 1
        places = [place for place in range(1, len(example.ids)) if example.trained[place]]
        predictors += [shift + place for place in places]
        targets += [example.ids[place] for place in places]
    tensors = [torch.tensor(values, device=device) for values in (layout.ids, layout.positions, predictors, targets)]
    packing = Packing(tuple(layout.lengths), tuple(layout.before))
    return Stream(tensors[0][None], tensors[1][None], packing, tensors[2], tensors[3])


class _Layout:
    """The segments of a stream, written one by one: a trie of the examples' prompts."""

    def __init__(self, examples: Sequence[TextExample]) -> None:
        self.examples = examples
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.lengths: list[int] = []
        self.before: list[int | None] = []
        self.own = [0] * len(examples)
        """For each example the segment that it shares with no other."""

    def place(self, group: Sequence[int], start: int, before: int | None) -> None:
        """Write the examples of `group`, which agree up to `start`, from there on; segment `before` holds the rest."""
        if len(group) == 1:
            self.own[group[0]] = self._write(group[0], start, len(self.examples[group[0]].ids), before)
            return
        end = self._agree_until(group, start)
        branches: dict[int, list[int]] = {}
        for index in group:
            # An example whose prompt ends here goes on alone; those with the same next token go on together.
            over = end >= self.examples[index].prompt_length - 1
            branches.setdefault(-1 - index if over else self.examples[index].ids[end], []).append(index)
        if (end - start) * (len(group) - 1) >= _LEAST_SAVED:
            start, before = end, self._write(group[0], start, end, before)
        for branch in branches.values():
            self.place(branch, start, before)

    def _agree_until(self, group: Sequence[int], start: int) -> int:
        rows = [self.examples[index] for index in group]
        most = max(min(row.prompt_length for row in rows) - 1, start)
        first = rows[0].ids
        return next(
            (place for place in range(start, most) if any(row.ids[place] != first[place] for row in rows)), most
        )

    def _write(self, index: int, start: int, end: int, before: int | None) -> int:
        self.ids += self.examples[index].ids[start:end]
        self.positions += range(start, end)
        self.lengths.append(end - start)
        self.before.append(before)
        return len(self.lengths) - 1


def pack_texts(examples: Sequence[LabelExample], device: torch.device) -> Stream:
    """Pack texts to be classified; predictors are the first tokens of the texts, targets their labels."""
    return pack_whole([example.ids for example in examples], [example.label for example in examples], device)


def pack_whole(texts: Sequence[Sequence[int]], targets: Sequence[int], device: torch.device) -> Stream:
    """Pack texts that share nothing; predictors are their first tokens, each of which has its target."""
    lengths = tuple(map(len, texts))
    ids = torch.tensor([token for text in texts for token in text], device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    firsts = torch.tensor(lengths, device=device).cumsum(0) - torch.tensor(lengths, device=device)
    packing = Packing.of_whole_examples(lengths)
    return Stream(ids[None], positions[None], packing, firsts, torch.tensor(targets, device=device))


def pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, left: bool = False) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), both [B, longest], padded at the right end or the left one."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id, device=device)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[index, where] = torch.tensor(row, device=device)
        mask[index, where] = 1
    return ids, mask
