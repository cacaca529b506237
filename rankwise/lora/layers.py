"""The layers that carry an adapter beside a frozen base layer, by composition: they call it, and never look inside."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.lora.base_weight import BaseLayer, dimensions, replace_weight, working_dtype
from rankwise.lora.config import LoraConfig
from rankwise.lora.linear_function import LinearWithUpdate
from rankwise.lora.low_rank import LowRank


class _Wrapper(nn.Module):
    """A module in the place of another one, `base`, whose attributes (in_features, weight, …) it passes on."""

    base: BaseLayer

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.base = base
        self.active = True
        self.train(base.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)


class LoraLayer(_Wrapper):
    """A frozen base layer of d × k and its update (scale)·B·A; B starts at zero, so at first it is the base exactly.

    lora_A is [r, k], lora_B is [d, r]; both are fp32, or fp64 over an fp64 base.
    """

    def __init__(self, base: BaseLayer, config: LoraConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(base)
        d, k = dimensions(base)
        kind: dict[str, Any] = {"dtype": working_dtype(base.weight), "device": base.weight.device}
        self.scale = config.scale
        self.dropout = float(config.lora_dropout)
        self.lora_A = nn.Parameter(torch.empty(config.r, k, **kind), requires_grad=not config.inference_mode)
        self.lora_B = nn.Parameter(torch.zeros(d, config.r, **kind), requires_grad=not config.inference_mode)
        self.unmerged_weight: nn.Parameter | None = None
        self.reset(generator)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw A from U(±1/√k) and set B to zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_B)

    @property
    def low_rank(self) -> LowRank:
        return LowRank(self.lora_A.detach(), self.lora_B.detach(), self.scale)

    @property
    def merged(self) -> bool:
        return self.unmerged_weight is not None

    def merge(self, matrix: Tensor) -> None:
        """Let the base compute with `matrix` [d, k]; the base's own parameter is kept for `unmerge`."""
        self.unmerged_weight = replace_weight(self.base, matrix)

    def unmerge(self) -> None:
        """Put back the very parameter that the base had before `merge`."""
        if self.unmerged_weight is not None:
            self.base.weight, self.unmerged_weight = self.unmerged_weight, None

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute as the base alone while the block lasts, merged or not."""
        active, merged = self.active, self.base.weight
        self.active = False
        if self.unmerged_weight is not None:
            self.base.weight = self.unmerged_weight
        try:
            yield
        finally:
            self.active, self.base.weight = active, merged


class LoraLinear(LoraLayer):
    """A linear layer (nn.Linear, transformers' Conv1D, or one that computes like them) with its update."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., k] → [..., d]"""
        if not self.active or self.merged:
            return self.base(x)
        # A and B go to the type of x, never x to theirs: they are small, x is not.
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        if self._is_plain(x):
            return LinearWithUpdate.apply(x, self.base.weight, self.base.bias, A, B, self.scale)
        result = self.base(x)
        hidden = F.linear(F.dropout(x, self.dropout, self.training), A)
        update = torch.addmm(result.flatten(0, -2), hidden.flatten(0, -2), B.T, alpha=self.scale)
        return update.view(result.shape)

    def _is_plain(self, x: Tensor) -> bool:
        """Whether base(x) is W·x + bias and nothing else, with W frozen, and x reaches the adapter as it is."""
        base = self.base
        return (
            type(base) is nn.Linear
            and base.weight.dtype == x.dtype
            and not base.weight.requires_grad
            and not (base._forward_hooks or base._forward_pre_hooks)
            and not (self.training and self.dropout)
            and not torch.is_autocast_enabled(x.device.type)
        )


class LoraEmbedding(LoraLayer):
    """An embedding with its update: a linear map of one-hot x, d = embedding_dim and k = num_embeddings."""

    def reset(self, generator: torch.Generator | None = None) -> None:
        """A = 0 and B from N(0, 1), the other way round than in a linear layer, as the format's readers expect."""
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [...] → [..., d]"""
        result = self.base(ids)
        if not self.active or self.merged:
            return result
        rows = F.embedding(ids, self.lora_A.T)
        if self.training and self.dropout:
            # x is one-hot: dropping entries of x drops the whole row of a token or nothing of it.
            rows = rows * F.dropout(torch.ones_like(rows[..., :1]), self.dropout)
        # Gemma's embeddings multiply what they look up; ΔW is part of that table.
        scale = self.scale * getattr(self.base, "embed_scale", 1.0)
        return result + ((rows @ self.lora_B.T) * scale).to(result.dtype)


class TrainedCopy(_Wrapper):
    """A module that is trained in full (a classifier head): a copy is trained, the original stays as it was."""

    def __init__(self, base: BaseLayer, config: LoraConfig) -> None:
        super().__init__(base)
        self.trained = deepcopy(base).requires_grad_(not config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.trained if self.active else self.base)(*args, **kwargs)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute with the original while the block lasts."""
        active, self.active = self.active, False
        try:
            yield
        finally:
            self.active = active
