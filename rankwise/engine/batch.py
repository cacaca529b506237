"""Examples → the tensors of one forward pass: packed into a stream, or padded for a model that packing cannot serve."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.data.examples import LabelExample, TextExample
from rankwise.engine.attention import Packing


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


def pack(examples: Sequence[TextExample], share_prefix: bool, device: torch.device) -> Stream:
    """Pack conversations; with `share_prefix` the tokens that all of them begin with stand once, at the head."""
    prefix = _common_prefix(examples) if share_prefix and len(examples) > 1 else 0
    ids, positions = list(examples[0].ids[:prefix]), list(range(prefix))
    predictors, targets = [], []
    for example in examples:
        start = len(ids) - prefix
        ids += example.ids[prefix:]
        positions += range(prefix, len(example.ids))
        for place in range(1, len(example.ids)):
            if example.trained[place]:
                # The prefix ends before the last prompt token, so a predictor never lies inside it.
                predictors.append(start + place - 1)
                targets.append(example.ids[place])
    lengths = tuple(len(example.ids) - prefix for example in examples)
    tensors = [torch.tensor(values, device=device) for values in (ids, positions, predictors, targets)]
    return Stream(tensors[0][None], tensors[1][None], Packing(prefix, lengths), tensors[2], tensors[3])


def pack_texts(examples: Sequence[LabelExample], device: torch.device) -> Stream:
    """Pack texts to be classified; predictors are the first tokens of the texts, targets their labels."""
    lengths = tuple(len(example.ids) for example in examples)
    ids = torch.tensor([token for example in examples for token in example.ids], device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    firsts = torch.tensor(lengths, device=device).cumsum(0) - torch.tensor(lengths, device=device)
    targets = torch.tensor([example.label for example in examples], device=device)
    return Stream(ids[None], positions[None], Packing(0, lengths), firsts, targets)


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


def _common_prefix(examples: Sequence[TextExample]) -> int:
    """Tokens that all examples begin with, up to one before the last prompt token of any of them."""
    most = min(example.prompt_length for example in examples) - 1
    first = examples[0].ids
    return next(
        (place for place in range(most) if any(example.ids[place] != first[place] for example in examples)),
        max(most, 0),
    )
