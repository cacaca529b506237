"""Adapters on embeddings."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.lora.layers import LoraLayer
from rankwise.lora.update import Update


class LoraEmbedding(LoraLayer):
    """An embedding: a linear map of one-hot x, d = embedding_dim and k = num_embeddings."""

    def draw(self, update: Update, how: bool | str, generator: torch.Generator | None) -> None:
        """A = 0 and B from N(0, 1), the other way round than in a linear layer, as the format's readers expect."""
        if how is False:
            nn.init.normal_(update.lora_A, generator=generator)
        else:
            nn.init.zeros_(update.lora_A)
        nn.init.normal_(update.lora_B, generator=generator)

    def product(self, update: Update, x: Tensor) -> Tensor:
        """x: token indices [...] → [..., d]"""
        A, B = update.factors()
        rows = self._columns(A, x)
        if update.training and update.dropout:
            # x is one-hot: dropping entries of x drops the whole row of a token or nothing of it.
            rows = rows * F.dropout(torch.ones_like(rows[..., :1]), update.dropout)
        # Gemma's embeddings multiply what they look up; ΔW is part of that table.
        return (rows @ B.T) * (update.scale * getattr(self.base, "embed_scale", 1.0))

    def _columns(self, A: Tensor, x: Tensor) -> Tensor:
        """A [r, k] at the tokens x [...] → [..., r], with the gradient that the base's own table would have: none at
        its padding_idx, and a sparse one if it has that."""
        if self._has_sparse_gradient and A.is_leaf and A.requires_grad:
            return _SparseColumns.apply(A, x, self.base.padding_idx)
        by_frequency = getattr(self.base, "scale_grad_by_freq", False)
        return F.embedding(x, A.T, getattr(self.base, "padding_idx", None), scale_grad_by_freq=by_frequency)

    def is_sparse(self, adapter: str) -> bool:
        """Whether an adapter's A gets a sparse gradient: not with a start, which is computed with as one matrix."""
        update = self.update(adapter)
        return self._has_sparse_gradient and update.lora_A.requires_grad and not update.has_start

    @property
    def _has_sparse_gradient(self) -> bool:
        """Whether the base's own table would have one; torch knows none that is scaled by frequency."""
        return getattr(self.base, "sparse", False) and not getattr(self.base, "scale_grad_by_freq", False)


class _SparseColumns(torch.autograd.Function):
    """What F.embedding(x, A.T, padding, sparse=True) means; torch has no backward pass of it through the transpose."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, x: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shape, ctx.padding = A.shape, padding
        return F.embedding(x, A.T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        r, (columns, values) = ctx.shape[0], (ctx.saved_tensors[0].flatten(), gradients[0].flatten(0, -2))
        if ctx.padding is not None:
            trained = columns != ctx.padding
            columns, values = columns[trained], values[trained]
        rows = torch.arange(r, device=columns.device).repeat(len(columns))
        places = torch.stack([rows, columns.repeat_interleave(r)])
        return torch.sparse_coo_tensor(places, values.flatten(), ctx.shape, check_invariants=False), None, None
