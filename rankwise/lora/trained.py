"""What an adapter trains besides low-rank updates: whole modules, rows of an embedding, bias vectors.

Each is a copy; the base's own numbers stay as they were.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.errors import ConfigError
from rankwise.lora.base_weight import bias_name
from rankwise.lora.config import LoraConfig
from rankwise.lora.layers import Wrapper
from rankwise.lora.parts import Parts


class TrainedCopy(Wrapper):
    """A module that is trained in full (a classifier head): each adapter trains a copy, the original stays."""

    parts: Parts | None = None
    """Which adapter's copy computes which part of the input, while several work in one pass."""

    def add(self, adapter: str, config: LoraConfig) -> None:
        """Give an adapter its copy of the original."""
        self.shares[adapter] = deepcopy(self.base).requires_grad_(not config.inference_mode)

    def chosen(self) -> nn.Module:
        """The copy that is at work, or the original."""
        return next((self.shares[adapter] for adapter in self.active), self.base)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.parts is None:
            return self.chosen()(*args, **kwargs)
        if len(args) != 1 or kwargs:
            raise ConfigError("a module trained in full that is called with more than its input cannot share a pass")
        inputs, dim = self.parts.split(args[0])
        copies: dict[str, Any] = dict(self.shares.items())
        own = [copies.get(name, self.base)(x) for name, x in zip(self.parts.adapters, inputs, strict=True)]
        return torch.cat(own, dim)


class Rows(nn.Module):
    """Copies of some rows of an embedding [vocabulary, d]."""

    place: Tensor
    """[vocabulary], where in `values` a token's row stands, or -1"""

    def __init__(self, embedding: Any, tokens: Sequence[int], trains: bool) -> None:
        super().__init__()
        values = embedding.weight.detach()[list(tokens)].clone()
        self.values = nn.Parameter(values, requires_grad=trains)
        """[tokens, d]"""
        self.tokens = tuple(tokens)
        place = torch.full((embedding.num_embeddings,), -1, device=values.device)
        place[list(tokens)] = torch.arange(len(tokens), device=values.device)
        self.register_buffer("place", place, persistent=False)


class TokenRows(Wrapper):
    """An embedding of which some tokens' rows train. Only those rows are copied, never the table."""

    def add(self, adapter: str, config: LoraConfig, tokens: Sequence[int]) -> None:
        """Give an adapter its copy of the rows of `tokens`."""
        self.shares[adapter] = Rows(self.base, tokens, not config.inference_mode)

    def rows(self, adapter: str) -> Rows:
        """An adapter's share."""
        found = self.shares[adapter]
        assert isinstance(found, Rows)
        return found

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [...] → [..., d]"""
        result = self.base(ids)
        for rows in map(self.rows, self.active):
            place = rows.place[ids]
            own = F.embedding(place.clamp_min(0), rows.values.to(result.dtype))
            own = own * getattr(self.base, "embed_scale", 1.0)
            result = torch.where((place >= 0)[..., None], own, result)
        return result

    @property
    def weight(self) -> Tensor:
        """The base's table; with the rows of the adapters at work in it, where the model computes with it."""
        return self.trained_table() if self.weight_is_read and self.active else self.base.weight

    def trained_table(self) -> Tensor:
        """[vocabulary, d], the whole table with the rows of the adapters at work in it."""
        table = self.base.weight
        for rows in map(self.rows, self.active):
            tokens = torch.tensor(rows.tokens, device=table.device)
            table = table.index_copy(0, tokens, rows.values.to(table.dtype))
        return table


class TiedTokenHead(Wrapper):
    """An output head that shares the table of an embedding with trained rows: those tokens' logits use the rows too."""

    def __init__(self, base: nn.Module, embedding: TokenRows) -> None:
        super().__init__(base)
        self.embedding = [embedding]
        """In a list, so that it is not a child of this module too."""

    def adapters(self) -> set[str]:
        return self.embedding[0].adapters()

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [..., k] → logits [..., vocabulary]"""
        result = self.base(hidden)
        for rows in map(self.embedding[0].rows, self.active):
            tokens = torch.tensor(rows.tokens, device=hidden.device)
            bias = None if self.base.bias is None else self.base.bias[tokens]
            own = F.linear(hidden, rows.values.to(hidden.dtype), bias)
            result = result.index_copy(-1, tokens, own.to(result.dtype))
        return result


class TrainedBias:
    """The bias of one module, of which one adapter trains a copy."""

    def __init__(self, module: nn.Module, adapter: str, config: LoraConfig) -> None:
        self.module = module
        self.adapter = adapter
        self.original: nn.Parameter = getattr(module, bias_name(module))
        self.trained = nn.Parameter(self.original.detach().clone(), requires_grad=not config.inference_mode)

    def show(self, adapters: Any) -> None:
        """Let the module use the copy if its adapter is among `adapters`, or else the original."""
        setattr(self.module, bias_name(self.module), self.trained if self.adapter in adapters else self.original)
