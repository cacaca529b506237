"""Attention over packed examples: one stream of tokens without padding, each example attending to itself alone.

Registered with transformers as the attention "rankwise_packed". How the stream is cut travels as a keyword argument of
the model, `packing`, so that no model code is patched. A beginning that several examples share may stand once in the
stream: what follows it attends to it and to itself, and autograd sums its gradient over all that follow. Where a model
asks transformers for the mask of a window or of chunks, it gets a `Window`, which it hands to the attention as a mask.
Symbols: T tokens in the stream, H query heads, G key/value heads, D head width, t tokens of a segment, P before it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

PACKED = "rankwise_packed"
_ONE_CALL = 256
"""Tokens of a stream up to which one call with a mask takes less time than a call for each of several segments."""


class Segment(NamedTuple):
    """What attention computes at once: t queries and the keys and values that they may see."""

    query: Tensor
    """[1, H, t, D]"""
    key: Tensor
    """[1, G, P + t, D], as the values"""
    value: Tensor
    places: Tensor | None
    """[t], for each query which of the keys is its own; None: the last t, in their order."""


@dataclass(frozen=True)
class Window:
    """What a query sees of its text, beside what causality allows."""

    size: int
    """Keys less than so many tokens away …"""
    chunked: bool = False
    """… or those of its own chunk, where texts are cut into chunks of so many tokens (Llama 4)."""


@dataclass(frozen=True)
class Packing:
    """How a stream is cut into segments: whole examples, or a beginning that several share and the ends that follow.

    A segment attends to itself and to all that leads to it: the segment `before` it, the one before that, and so on.
    """

    lengths: tuple[int, ...]
    """Tokens of each segment, in the order of the stream."""
    before: tuple[int | None, ...]
    """For each segment the index of the one that it continues, which stands earlier; None: it begins an example."""
    by_segment: bool = field(default=False, kw_only=True)
    """Whether attention must go segment by segment: because no number of one may meet those of another, not even times
    zero (it might not be finite), or because the queries are not those of all tokens."""

    @classmethod
    def of_whole_examples(cls, lengths: Sequence[int]) -> "Packing":
        """Examples that share nothing."""
        return cls(tuple(lengths), (None,) * len(lengths))

    def followed_by(self, other: "Packing") -> "Packing":
        """The packing of another stream that stands after this one."""
        shifted = (None if segment is None else segment + len(self.lengths) for segment in other.before)
        return Packing((*self.lengths, *other.lengths), (*self.before, *shifted), by_segment=True)

    @property
    def takes_one_call(self) -> bool:
        """Whether attention takes the stream as a whole."""
        return not self.by_segment and len(self.lengths) > 1 and sum(self.lengths) <= _ONE_CALL

    def path(self, segment: int) -> list[int]:
        """The segments from the beginning of an example to this one."""
        before = self.before[segment]
        return [segment] if before is None else [*self.path(before), segment]

    def along(self, segment: int, parts: Sequence[Tensor]) -> Tensor:
        """What leads to a segment, and the segment: parts [1, G, t, D], one a segment, → [1, G, P + t, D]."""
        path = self.path(segment)
        return torch.cat([parts[index] for index in path], dim=2) if path[1:] else parts[segment]

    def segments(self, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Segment]:
        """Cut query [1, H, T, D], key and value [1, G, T, D].

        split and cat copy once each way; a slice per segment would fill a zero tensor of the whole stream for each of
        them in the backward pass.
        """
        queries, keys, values = (x.split(self.lengths, dim=2) for x in (query, key, value))
        for segment, q in enumerate(queries):
            yield Segment(q, self.along(segment, keys), self.along(segment, values), None)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Window | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    packing: Packing | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, G, T, D] → output [1, T, H, D]; exact, segment by segment.

    As in transformers' SDPA the mask alone decides what is seen, and not a `sliding_window`.
    """
    if packing is None:
        raise ValueError("the model does not hand on how its stream is packed")
    if isinstance(attention_mask, Tensor):
        raise ValueError("the model hands its attention a mask or a bias of its own")
    window, causal = attention_mask, is_causal if is_causal is not None else getattr(module, "is_causal", True)
    grouped = query.shape[1] != key.shape[1]
    if packing.takes_one_call and softcap is None:
        seen = _seen_in_stream(packing, causal, window, query.dtype, query.device)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, dropout_p=dropout, scale=scaling, enable_gqa=grouped
        )
        return output.transpose(1, 2).contiguous(), None
    outputs = []
    for segment in packing.segments(query, key, value):
        for q, k, v, seen in _calls(segment, causal, window):
            if softcap is not None:
                if seen is None:
                    seen = _seen(torch.arange(q.shape[2]), torch.arange(k.shape[2]), causal, None).to(q.device)
                outputs.append(_soft_capped(q, k, v, seen, softcap, scaling, dropout))
                continue
            output = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=seen,
                is_causal=causal and seen is None,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=grouped,
            )
            outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _calls(
    segment: Segment, causal: bool, window: Window | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """(queries, keys, values, which keys each query sees) of each call of a kernel; None: all, or all up to its own.

    Under a window narrower than the segment the keys are cut into bands as wide as the window, and the queries of a
    band meet its keys and those beside it alone: work and masks grow with t·window, and not with t².
    """
    query, key, value, places = segment
    tokens = key.shape[2]
    own = torch.arange(tokens - query.shape[2], tokens) if places is None else places.cpu()
    if window is None or tokens <= window.size:
        plain = not causal or (places is None and query.shape[2] == tokens)
        seen = None if plain else _seen(own, torch.arange(tokens), causal, None).to(query.device)
        yield query, key, value, seen
        return
    bands, counts = (x.tolist() for x in (own // window.size).unique_consecutive(return_counts=True))
    keys, values = (x.split(window.size, dim=2) for x in (key, value))
    back, ahead = 0 if window.chunked else 1, 0 if window.chunked or causal else 1
    for band, q, at in zip(bands, query.split(counts, dim=2), own.split(counts), strict=True):
        first = max(band - back, 0)
        k, v = (torch.cat(x[first : band + ahead + 1], dim=2) for x in (keys, values))
        met = torch.arange(k.shape[2]) + first * window.size
        yield q, k, v, _seen(at, met, causal, window).to(query.device)


def _soft_capped(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, softcap: float, scaling: float | None, dropout: float
) -> Tensor:
    """Attention whose scores pass through softcap·tanh(score / softcap) (Gemma 2), which no kernel here computes."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~seen, -torch.inf)
    return F.dropout(scores.softmax(-1), dropout) @ value


def _seen(own: Tensor, keys: Tensor, causal: bool, window: Window | None) -> Tensor:
    """[t, k]: which keys queries see, by the places of both [t], [k] in their text."""
    distance = own[:, None] - keys[None, :]
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is None:
        return seen
    if window.chunked:
        return seen & (own[:, None] // window.size == keys[None, :] // window.size)
    return seen & (distance.abs() < window.size)


@lru_cache(maxsize=8)
def _seen_in_stream(
    packing: Packing, causal: bool, window: Window | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[T, T], what is added to the scores: 0 where a query sees a key and -∞ elsewhere."""
    lengths = torch.tensor(packing.lengths)
    paths = [packing.path(segment) for segment in range(len(lengths))]
    leads = torch.zeros(len(lengths), len(lengths), dtype=torch.bool)
    for segment, path in enumerate(paths):
        leads[segment, path] = True
    segment_of = torch.arange(len(lengths)).repeat_interleave(lengths)
    starts = torch.tensor([0, *accumulate(packing.lengths)])[segment_of]
    before = torch.tensor([sum(packing.lengths[index] for index in path[:-1]) for path in paths])[segment_of]
    position = torch.arange(len(segment_of)) - starts + before
    seen = leads[segment_of[:, None], segment_of[None, :]] & _seen(position, position, causal, window)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf).to(device)


def _asked_for(
    *_: Any, config: Any = None, local_size: int | None = None, use_vmap: bool = False, **more: Any
) -> Window | None:
    """In the place of the mask that a model asks transformers for: what a mask would hold beside causality."""
    if use_vmap:
        raise ValueError("the model asks for a mask of its own making")
    if local_size is None:
        return None
    sizes = [getattr(config, name, None) for name in ("attention_chunk_size", "sliding_window")]
    if sizes == [local_size, local_size]:
        raise ValueError("its window and its chunks are of the same size, so a mask may be that of either")
    # Transformers' masks of both directions hold the keys at the distance `local_size` too.
    return Window(local_size + ("allow_is_bidirectional_skip" in more), chunked=sizes[0] == local_size)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _asked_for)
