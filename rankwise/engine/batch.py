"""Examples → the tensors of one forward pass: packed into a stream, or padded for a model that packing cannot serve."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor

from rankwise.data.examples import Ids, TextExample
from rankwise.data.labelled import LabelExample, LabelledExample, LabelSetExample, TagExample
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
    """[n], where in the stream the hidden state lies that predicts each trained token, text or word; of a text all that
    its head or its pooling reads"""
    targets: Tensor
    """[n], the trained tokens, labels or tags; [n, labels] 0 or 1 where a text may have several labels"""
    texts: tuple[Ids, ...]
    """All that stands in it."""
    own: tuple[int, ...]
    """For each text the segment that it ends with."""
    filler: int
    """How many of the T tokens are there for the length alone (`rounded_up`)."""
    spare: Tensor
    """Some places that nothing reads: with them the number of read ones is a round one too."""

    @property
    def tokens(self) -> int:
        """T"""
        return sum(self.packing.lengths)

    def inputs(self) -> dict[str, Any]:
        """What a model with packed attention takes."""
        return {"input_ids": self.ids, "position_ids": self.positions, "packing": self.packing}

    def places(self, text: int) -> Tensor:
        """[t], where in the stream the tokens of a text stand"""
        ends = list(accumulate(self.packing.lengths))
        path = self.packing.path(self.own[text])
        return torch.cat([torch.arange(ends[part] - self.packing.lengths[part], ends[part]) for part in path])


def stream_of(examples: Sequence[Any], device: torch.device) -> Stream:
    """The stream of examples of any one kind."""
    return _PACKERS[type(examples[0])](examples, device)


def join(streams: Sequence[Stream]) -> Stream:
    """Streams one after the other in one. They share nothing."""
    starts = [0, *accumulate(stream.tokens for stream in streams)]
    packing, own = Packing((), ()), ()
    for stream in streams:
        own = (*own, *(segment + len(packing.lengths) for segment in stream.own))
        packing = packing.followed_by(stream.packing)
    return Stream(
        torch.cat([stream.ids for stream in streams], dim=1),
        torch.cat([stream.positions for stream in streams], dim=1),
        packing,
        torch.cat([stream.predictors + start for stream, start in zip(streams, starts, strict=False)]),
        torch.cat([stream.targets for stream in streams]),
        tuple(text for stream in streams for text in stream.texts),
        own,
        sum(stream.filler for stream in streams),
        torch.cat([stream.spare + start for stream, start in zip(streams, starts, strict=False)]),
    )


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
    texts = [example.ids for example in examples]
    return _stream(layout.ids, layout.positions, layout.packing, predictors, targets, texts, layout.own, device)


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

    @property
    def packing(self) -> Packing:
        return Packing(tuple(self.lengths), tuple(self.before))

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
    return pack_whole(_ids(examples), [(0,)] * len(examples), [example.label for example in examples], device)


def pack_label_sets(examples: Sequence[LabelSetExample], device: torch.device) -> Stream:
    """Pack texts that may have several labels; predictors are their first tokens."""
    return pack_whole(_ids(examples), [(0,)] * len(examples), [example.labels for example in examples], device)


def pack_tagged(examples: Sequence[TagExample], device: torch.device) -> Stream:
    """Pack sentences whose words are tagged; predictors are the first tokens of the words, targets their tags."""
    tags = [tag for example in examples for tag in example.tags]
    return pack_whole(_ids(examples), [example.words for example in examples], tags, device)


def _ids(examples: Sequence[LabelledExample]) -> list[Ids]:
    return [example.ids for example in examples]


def pack_whole(
    texts: Sequence[Ids], read: Sequence[Sequence[int]], targets: Sequence[Any], device: torch.device
) -> Stream:
    """A stream of texts that share nothing; `read`: what is read of each of them, counted from its first token."""
    lengths = tuple(map(len, texts))
    starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
    predictors = [start + place for start, places in zip(starts, read, strict=True) for place in places]
    ids = [token for text in texts for token in text]
    positions = [place for length in lengths for place in range(length)]
    packing = Packing.of_whole_examples(lengths)
    return _stream(ids, positions, packing, predictors, targets, texts, range(len(lengths)), device)


def _stream(
    ids: list[int],
    positions: list[int],
    packing: Packing,
    predictors: list[int],
    targets: Sequence[Any],
    texts: Sequence[Ids],
    own: Sequence[int],
    device: torch.device,
) -> Stream:
    """The stream of these tokens, rounded up by a segment that nothing reads."""
    filler = rounded_up(len(ids)) - len(ids)
    if filler:
        packing = Packing((*packing.lengths, filler), (*packing.before, None))
    # A token that is there: that of padding may have an embedding of zeros, whose norm has no gradient. Its positions
    # go no further than those of the texts, as the model may have no more.
    longest = max(positions) + 1
    tokens, positions = [*ids, *ids[:1] * filler], [*positions, *(place % longest for place in range(filler))]
    read = set(predictors)
    unread = (place for place in range(len(tokens)) if place not in read)
    spare = list(islice(unread, rounded_up(len(predictors)) - len(predictors)))
    return Stream(
        torch.tensor(tokens, device=device)[None],
        torch.tensor(positions, device=device)[None],
        packing,
        torch.tensor(predictors, device=device),
        torch.tensor(targets, device=device),
        tuple(texts),
        tuple(own),
        filler,
        torch.tensor(spare, dtype=torch.long, device=device),
    )


def rounded_up(tokens: int) -> int:
    """The next multiple of 8, from 512 tokens on of 16, from 1,024 on of 32, and so on: at most a 32nd more then.

    oneDNN makes a program for each number of rows that a product has, and keeps parts of it for good (torch 2.13).
    With streams of any length a run would fill up with them and with the gaps between them; so there are few lengths.
    """
    step = 8
    while tokens >= 64 * step:
        step *= 2
    return -(-tokens // step) * step


_PACKERS: dict[type, Callable[[Any, torch.device], Stream]] = {
    TextExample: pack,
    LabelExample: pack_texts,
    LabelSetExample: pack_label_sets,
    TagExample: pack_tagged,
}


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, left: bool = False, least: int = 0
) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), both [B, longest or `least`], padded at the right end or the left one."""
    longest = max(least, *map(len, rows))
    ids = torch.full((len(rows), longest), pad_id, device=device)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[index, where] = torch.tensor(row, device=device)
        mask[index, where] = 1
    return ids, mask
