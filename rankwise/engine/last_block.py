"""The last block for the tokens that the loss reads, and for no others: queries, attention output and MLP.

What comes after the last block works token by token, so of its outputs only the read ones count; keys and values must
be there for all tokens. A hook before the block lets it run twice: on all tokens as far as its attention, which takes
the keys and values, and then from its beginning to its end on the read tokens alone, whose queries meet what was taken.
It is the block's own forward both times, so norms, adapters, joint projections and parallel MLPs are as the model has
them. Symbols: T tokens in the stream, n that are read, d width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.engine.attention import Packing, Segment

PAYS_UP_TO = 0.5
"""The share n / T up to which it pays. What the cut saves is T - n times attention output and MLP, about three
quarters of a block's FLOPs and more; what it costs is n times the projections to queries, keys and values."""


@contextmanager
def only_at(rows: Tensor, block: nn.Module, packing: Packing) -> Iterator[None]:
    """While this lasts, `block` computes the tokens at `rows` [n] of the stream and puts out zeros for all others.

    Raises RuntimeError for a block that the model does not call, or that does not call packed attention exactly once.
    """
    tokens, calls = sum(packing.lengths), 0

    def cut(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal calls
        calls += 1
        try:
            block.forward(
                *args, **kwargs | {"packing": _UpToAttention(packing.lengths, packing.before, by_segment=True)}
            )
        except _Reached as reached:
            taken = [(reached.key, reached.value)]
        else:
            raise RuntimeError("its last block does not call the attention that was exchanged")
        args, values = _at(rows, tokens, (args, tuple(kwargs.values())))
        kwargs = dict(zip(kwargs, values, strict=True))
        return args, kwargs | {"packing": _AtRows(packing.lengths, packing.before, rows, taken, by_segment=True)}

    def put_back(_block: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (put_back(_block, _args, output[0]), *output[1:])
        # The model goes on with as many tokens as it began with, and may insist on that.
        return output.new_zeros(1, tokens, output.shape[2]).index_copy(1, rows, output)

    with block.register_forward_pre_hook(cut, with_kwargs=True), block.register_forward_hook(put_back):
        yield
    if calls != 1:
        raise RuntimeError(f"the model calls its last block {calls} times")


class _Reached(Exception):
    """Leaves a block at its attention, with the keys and values [1, G, T, D] of all tokens."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.key = key
        self.value = value


class _UpToAttention(Packing):
    def segments(self, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Segment]:
        raise _Reached(key, value)


@dataclass(frozen=True)
class _AtRows(Packing):
    """Queries of some tokens only, in any order."""

    rows: Tensor
    """[n], where in the stream they stand"""
    taken: list[tuple[Tensor, Tensor]]
    """The keys and values of all tokens, until attention has them."""

    def segments(self, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Segment]:
        if query.shape[2] != len(self.rows) or not self.taken:
            raise RuntimeError("its last block calls attention more than once, or with other tokens than it was given")
        keys, values = (x.split(self.lengths, dim=2) for x in self.taken.pop())
        ends = list(accumulate(self.lengths))
        segment_of = torch.bucketize(self.rows.cpu(), torch.tensor(ends), right=True)
        segments, counts = (x.tolist() for x in segment_of.unique_consecutive(return_counts=True))
        for segment, rows, q in zip(segments, self.rows.split(counts), query.split(counts, dim=2), strict=True):
            k, v = self.along(segment, keys), self.along(segment, values)
            yield Segment(q, k, v, rows - ends[segment] + k.shape[2])


def _at(rows: Tensor, tokens: int, value: Any) -> Any:
    """What a block is called with, cut to `rows` wherever it has a row for each token: [1, T, …]."""
    if isinstance(value, tuple):
        return tuple(_at(rows, tokens, part) for part in value)
    per_token = isinstance(value, Tensor) and value.shape[:2] == (1, tokens)
    return value.index_select(1, rows) if per_token else value
