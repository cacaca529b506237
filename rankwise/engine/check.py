"""Whether one way to run a model gives what another one does: on short pieces of examples, token by token."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.data.examples import E, longest_text
from rankwise.engine.batch import Stream

ROUNDING = 256
"""Two ways to compute the same differ by less than so many units in the last place: 3e-5 in fp32. Over the types of
tests/engine/test_model_types.py with 2 and 8 blocks, SmolLM2 and MiniLM the largest difference of a token was 3e-6."""
_WINDOW = 256
"""The widest window that a piece is made to reach beyond."""
BESIDE = 8
"""Tokens of padding beside a text, or of a text beyond a window."""


def rounding(dtype: torch.dtype) -> float:
    """The largest share by which two ways to compute the same may differ; models compute in fp32 here and there.

    In bf16 the largest difference of a token was 2e-2.
    """
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float).eps)
    return min(ROUNDING * eps, 0.1)


def pieces(sample: Sequence[E], window: int | None = None) -> list[E]:
    """Short pieces of three examples, one of them beyond `window` if that is narrow and an example is so long.

    At least two: a text that is alone in its stream meets no other.
    """
    short: list[E] = [example.short() for example in sample[:3]]
    if window is not None and window <= _WINDOW:
        cut = [example.cut_to(window + BESIDE) for example in sample[:3]]
        short[-1] = next((x for x in cut if longest_text(x) > window and x.counted), short[-1])
    return short if len(short) > 1 else short * 2


def narrowest_window(configs: Sequence[Any]) -> int | None:
    """The smallest number of tokens to which a configuration limits attention."""
    names = ("sliding_window", "attention_chunk_size")
    return min((size for config in configs for name in names if (size := getattr(config, name, None))), default=None)


@contextmanager
def put_out(parts: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """What these parts of a model put out while this lasts, the last time that each was called."""
    found: dict[nn.Module, Tensor] = {}

    def note(part: nn.Module, _: Any, output: Any) -> None:
        found[part] = output if isinstance(output, Tensor) else output[0]

    with ExitStack() as hooks:
        for part in parts:
            hooks.callback(part.register_forward_hook(note).remove)
        yield found


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest number or of 1."""
    return (found - expected).abs().max().item() / max(expected.abs().max().item(), 1.0)


def token_difference(stream: Stream, packed: dict[nn.Module, Tensor], padded: dict[nn.Module, Tensor]) -> float:
    """The largest difference of a token's hidden states in a stream and in a padded batch, as a share of their length.

    A model that mixes tokens outside attention shows it at the first tokens of a text, which the loss may never read.
    """
    shapes = (1, stream.tokens), (len(stream.texts), max(map(len, stream.texts)))
    largest = 0.0
    for part, hidden in packed.items():
        if part not in padded or (hidden.shape[:2], padded[part].shape[:2]) != shapes:
            continue
        for index, text in enumerate(stream.texts):
            expected = padded[part][index, : len(text)]
            lengths = expected.norm(dim=-1).clamp_min(torch.finfo(expected.dtype).tiny)
            share = (hidden[0, stream.places(index)] - expected).norm(dim=-1) / lengths
            largest = max(largest, share.max().item())
    return largest
