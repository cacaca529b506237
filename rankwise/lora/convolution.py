"""Adapters on convolutions of one, two and three dimensions."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.errors import CheckpointError, MergeError
from rankwise.lora.layers import LoraLayer
from rankwise.lora.update import Update

_CONVOLVE: dict[type, Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}

MIXES = "lora_A reads the channels of other groups than its own, so no weight of this convolution's shape can hold it"


class LoraConv(LoraLayer):
    """A convolution: A convolves as the base does, with its stride, padding, dilation and groups; B is 1 × … × 1.

    d = out_channels and k = (in_channels / groups)·kernel; each group has its own r / groups of the rank.
    An A that PEFT trained may read all channels for every group. It works and trains as it does there; no weight of the
    base's shape holds such a change, so it cannot be merged.
    """

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self._convolve = next(function for kind, function in _CONVOLVE.items() if isinstance(base, kind))
        self.output_dim = -len(base.kernel_size) - 1
        self.groups = self.stacks = base.groups

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        base = self.base
        ones = (1,) * len(base.kernel_size)
        return (r, base.in_channels // base.groups, *base.kernel_size), (base.out_channels, r // base.groups, *ones)

    def product(self, update: Update, x: Tensor) -> Tensor:
        """x: [batch, in_channels, *size] → [batch, out_channels, *size], the batch may be missing"""
        A, B = self._factors(update, x.dtype)
        hidden = self._read(F.dropout(x, update.dropout, update.training), A)
        return self._convolve(hidden * update.scale, B, groups=self.base.groups)

    def _read(self, x: Tensor, A: Tensor) -> Tensor:
        """What the base makes of x with A in the place of its weight; the shape of A tells its groups."""
        base, padding = self.base, self.base.padding
        if base.padding_mode != "zeros":
            x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
        return self._convolve(x, A, None, base.stride, padding, base.dilation, base.in_channels // A.shape[1])

    def _mixes_groups(self, A: Tensor) -> bool:
        return A.shape[1] * self.groups != self.base.in_channels

    def _factors(self, update: Update, dtype: Any) -> tuple[Tensor, Tensor]:
        return self._by_group(update, *update.factors(dtype))

    def _by_group(self, update: Update, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A and B; a start stacked below A goes group by group, since each group reads its own rows."""
        if not update.has_start or self.groups == 1:
            return A, B
        own_A, start_A = A.chunk(2)
        halves = zip(own_A.chunk(self.groups), start_A.chunk(self.groups), strict=True)
        parts = [part for pair in halves for part in pair]
        return torch.cat(parts), B

    def stored_factors(self, update: Update) -> tuple[Tensor, Tensor]:
        """A as the format has it: for all channels, here with zeros for those of the other groups."""
        A, B = self._by_group(update, *update.whole_factors())
        if self.groups == 1 or self._mixes_groups(A):
            return A, B
        stored = A.new_zeros(len(A), self.base.in_channels, *A.shape[2:])
        for own, place in zip(A.chunk(self.groups), _places_of_groups(stored, self.groups), strict=True):
            place.copy_(own)
        return stored, B

    def take_stored(self, update: Update, stored: Tensor) -> Tensor:
        """The A that `stored_factors` made so; where a group reads others' channels, the whole, for which room is made.

        One of another shape is given back as it is. Raises CheckpointError where the groups are mixed and there is
        DoRA, which needs the rows of the changed weight.
        """
        if stored.shape != (update.r, self.base.in_channels, *self.base.kernel_size):
            return stored
        A = torch.cat(_places_of_groups(stored, self.groups))
        if A.count_nonzero() == stored.count_nonzero():
            return A
        if update.magnitude is not None:
            raise CheckpointError(f"{MIXES}, and DoRA needs the lengths of its rows")
        update.lora_A = nn.Parameter(update.lora_A.new_empty(stored.shape), update.lora_A.requires_grad)
        return stored

    def row_factors(self, update: Update) -> tuple[Tensor, Tensor]:
        """A as [groups, r / groups, k] and B as [groups, d / groups, r / groups], where there are groups.

        Raises MergeError where A mixes the groups.
        """
        if self._mixes_groups(update.lora_A):
            raise MergeError(MIXES)
        A, B = (factor.flatten(1) for factor in self._factors(update, update.lora_A.dtype))
        if self.groups == 1:
            return A, B
        return A.view(self.groups, -1, A.shape[1]), B.view(self.groups, -1, B.shape[1])


def as_matrices(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a module as they stand in a file → the factors of ΔW [d, k], a convolution's kernel flattened into k.

    With groups, k is what one group reads; where A mixes the groups, ΔW is that of a convolution without groups.
    """
    groups = len(A) // B.shape[1] if B.ndim > 2 and B.shape[1] and len(A) % B.shape[1] == 0 else 1
    if groups == 1 or len(B) % groups or A.shape[1] % groups:
        return A.flatten(1), B.flatten(1)
    own = torch.cat(_places_of_groups(A, groups))
    A = own if own.count_nonzero() == A.count_nonzero() else A
    return A.flatten(1), torch.block_diag(*B.flatten(1).chunk(groups))


def by_group(B: Tensor, groups: int) -> Tensor:
    """B [d, r] of `as_matrices` → [groups, d / groups, r / groups]"""
    return torch.stack([rows.chunk(groups, dim=1)[i] for i, rows in enumerate(B.chunk(groups))])


def _places_of_groups(A: Tensor, groups: int) -> list[Tensor]:
    """For each group its rows and channels of an A as the file has it."""
    return [rows.chunk(groups, dim=1)[i] for i, rows in enumerate(A.chunk(groups))]
