"""Adapters on linear layers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.lora.frozen_product import PreparedWeight
from rankwise.lora.layers import LoraLayer
from rankwise.lora.linear_function import Term, linear_with_update
from rankwise.lora.parts import Parts
from rankwise.lora.shared_input import SharedInput
from rankwise.lora.update import Update


class LoraLinear(LoraLayer):
    """A linear layer (nn.Linear, transformers' Conv1D, a quantised one, or any that computes like them)."""

    prepared: PreparedWeight | None = None
    """Copies of the base's weight that training computes with (lora/prepared.py)."""
    shared_input: SharedInput | None = None
    """The layers that are called with the same input as this one, this one included."""
    parts: Parts | None = None
    """Which adapter computes which part of the input, while several work in one pass."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [..., k] → [..., d]"""
        if args or kwargs:
            return super().forward(x, *args, **kwargs)
        # The autograd function is there for its backward pass, and costs more than a token's arithmetic to call.
        if torch.is_grad_enabled() and (terms := self.terms(x)) is not None:
            if self.shared_input is not None:
                return self.shared_input.result(self, x)
            return linear_with_update(x, terms, self.lengths(x))[0]
        update = self._only_plain_update()
        if update is None:
            return super().forward(x)
        # A and B go to the type of x, never x to theirs: they are small, x is not.
        A, B = update.factors(x.dtype)
        result = self.base(x)
        if result.dtype != A.dtype:
            return result + self.product(update, x).to(result.dtype)
        # Few and cheap calls: for one token they are what an adapter costs.
        return torch.add(result, F.linear(F.linear(update.drop(x), A), B), alpha=update.scale)

    def with_changes(self, x: Tensor, plain: Tensor) -> Tensor:
        if self.parts is None:
            return super().with_changes(x, plain)
        lengths = self.parts.lengths(x)
        rows, results = (values.reshape(-1, values.shape[-1]).split(lengths) for values in (x, plain))
        changed = [
            result + self.change(self.update(adapter), own, result) if adapter in self.shares else result
            for adapter, own, result in zip(self.parts.adapters, rows, results, strict=True)
        ]
        return torch.cat(changed).view(plain.shape)

    def terms(self, x: Tensor) -> list[Term] | None:
        """The layer as linear_function computes it on this input, a term a part; None where it is more than that."""
        updates = self._plain_updates()
        if any(update.dropout and update.training for update in updates if update) or not self._is_matrix_product(x):
            return None
        return [self._term(update, x.dtype) for update in updates] or None

    def lengths(self, x: Tensor) -> tuple[int, ...] | None:
        """How many rows of x [..., k] each part has; None: it is one."""
        return None if self.parts is None else self.parts.lengths(x)

    def _term(self, update: Update | None, dtype: torch.dtype) -> Term:
        weight, prepared = self.base.weight, self.prepared
        if prepared is not None and prepared.source is not weight:
            prepared = None
        if update is None:  # an adapter without a share here, as one of rank 0
            A, B, scale = weight.new_empty(0, weight.shape[1]), weight.new_empty(weight.shape[0], 0), 1.0
        else:
            (A, B), scale = update.factors(dtype), update.scale
        return Term(weight, self.base.bias, A, B, scale, prepared)

    def has_own_backward(self, dtype: torch.dtype) -> bool:
        """Whether training on inputs of this type takes the hand-written backward pass (linear_function)."""
        update = self._only_plain_update()
        return (
            update is not None
            and not update.dropout
            and self._is_matrix_product(self.base.weight.new_empty(0, dtype=dtype))
        )

    def _plain_updates(self) -> list[Update | None]:
        """The update of each part of the input (None: it has none); nothing if one is more than scale·B·A·x."""
        if self.parts is None:
            update = self._only_plain_update()
            return [] if update is None else [update]
        updates = [self.update(name) if name in self.shares else None for name in self.parts.adapters]
        return updates if all(update is None or update.is_plain for update in updates) else []

    def _only_plain_update(self) -> Update | None:
        """The one update at work, if its change is scale·B·A·x and nothing more."""
        if self.rows is not None or self.parts is not None or self.merged or len(self.active) != 1:
            return None
        [(adapter, weight)] = self.active.items()
        update = self.update(adapter)
        return update if weight == 1 and update.is_plain else None

    def _is_matrix_product(self, x: Tensor) -> bool:
        """Whether base(x) is W·x + bias and nothing else, with W and bias frozen."""
        base = self.base
        return (
            type(base) is nn.Linear
            and type(base.weight) is nn.Parameter
            and base.weight.dtype == x.dtype
            and not base.weight.requires_grad
            and (base.bias is None or not base.bias.requires_grad)
            and not (base._forward_hooks or base._forward_pre_hooks)
            and not torch.is_autocast_enabled(x.device.type)
        )
