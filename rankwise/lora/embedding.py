"""Adapters on embeddings."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.lora.layers import LoraLayer
from rankwise.lora.update import Update


class LoraEmbedding(LoraLayer):
    """An embedding: a linear map of one-hot x, d = embedding_dim and k = num_embeddings."""

    def draw(self, update: Update, how: bool | str, generator: torch.Generator | None) -> None:
        """A = 0 and B from N(0, 1), the other way round than in a linear layer, as the format's readers expect."""
        (nn.init.zeros_ if how is not False else nn.init.normal_)(update.lora_A)
        nn.init.normal_(update.lora_B, generator=generator)

    def product(self, update: Update, x: Tensor) -> Tensor:
        """x: token indices [...] → [..., d]"""
        A, B = update.factors()
        # Dense also over a sparse base: the gradient of A has a transposed view of its own, which no sparse one takes.
        rows = F.embedding(x, A.T)
        if update.training and update.dropout:
            # x is one-hot: dropping entries of x drops the whole row of a token or nothing of it.
            rows = rows * F.dropout(torch.ones_like(rows[..., :1]), update.dropout)
        # Gemma's embeddings multiply what they look up; ΔW is part of that table.
        return (rows @ B.T) * (update.scale * getattr(self.base, "embed_scale", 1.0))
