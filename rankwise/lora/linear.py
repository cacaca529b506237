"""Adapters on linear layers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.lora.frozen_product import PreparedWeight
from rankwise.lora.layers import LoraLayer
from rankwise.lora.linear_function import Term, is_transformed, linear_with_update
from rankwise.lora.narrow import NarrowLinear, is_plain_linear
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
    _alone: tuple[Update | None] = (None,)
    """The update of the one adapter at work, if it is plain and of weight 1; looked up once, as for a token that takes
    as long as a product, and in a tuple, so that nn.Module does not list it as a child."""

    def forward(self, x: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """x: [..., k] → [..., d]"""
        if args or kwargs or x is None or is_transformed():
            return super().forward(x, *args, **kwargs)
        # The autograd function is there for its backward pass, and costs more than a token's arithmetic to call.
        has_more = has_own_forward
        if torch.is_grad_enabled():
            has_more = does_more_than_its_class
            if (terms := self.terms(x)) is not None:
                if self.shared_input is not None:
                    return self.shared_input.result(self, x)
                return linear_with_update(x, terms, self.lengths(x))[0]
        update = self._only_plain_update()
        if update is None:
            return super().forward(x)
        # A and B go to the type of x, never x to theirs: they are small, x is not.
        A, B = update.factors(x.dtype)
        change = F.linear(F.linear(update.drop(x) if update.dropout else x, A), B)
        base: Any = self._modules["base"]
        if type(base) is nn.Linear and not has_more(base):
            # Past the call of a module, which for one token takes as long as a product.
            own: Any = base._parameters
            return F.linear(x, own["weight"], own["bias"]).add_(change, alpha=update.scale)
        result = base(x)
        return torch.add(result, change.to(result.dtype), alpha=update.scale)

    def with_changes(self, x: Tensor, plain: Tensor) -> Tensor:
        if x.is_nested:
            return nested_like(x, self.with_changes(x.to_padded_tensor(0.0), plain.to_padded_tensor(0.0)))
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
        updates, matrix = self._plain_updates(), None if x.is_nested else self._frozen_matrix(x)
        if matrix is None or any(update.dropout and update.training for update in updates if update):
            return None
        return [self._term(matrix, update, x.dtype) for update in updates] or None

    def lengths(self, x: Tensor) -> tuple[int, ...] | None:
        """How many rows of x [..., k] each part has; None: it is one."""
        return None if self.parts is None else self.parts.lengths(x)

    def _term(self, matrix: tuple[Tensor, Tensor | None], update: Update | None, dtype: torch.dtype) -> Term:
        (weight, bias), prepared = matrix, self.prepared
        if prepared is not None and prepared.source is not weight:
            prepared = None
        if update is None:  # an adapter without a share here, as one of rank 0
            d, k = weight.shape
            A, B, scale = weight.new_empty(0, k, dtype=dtype), weight.new_empty(d, 0, dtype=dtype), 1.0
        else:
            (A, B), scale = update.factors(dtype), update.scale
        return Term(weight, bias, A, B, scale, prepared)

    def has_own_backward(self, dtype: torch.dtype) -> bool:
        """Whether training on inputs of this type takes the hand-written backward pass (linear_function)."""
        update = self._only_plain_update()
        empty = self.base.weight.new_empty(0, dtype=dtype)
        return update is not None and not update.dropout and self._frozen_matrix(empty) is not None

    def _plain_updates(self) -> list[Update | None]:
        """The update of each part of the input (None: it has none); nothing if one is more than scale·B·A·x."""
        if self.parts is None:
            update = self._only_plain_update()
            return [] if update is None else [update]
        updates = [self.update(name) if name in self.shares else None for name in self.parts.adapters]
        return updates if all(update is None or update.is_plain for update in updates) else []

    def _let_work(self, adapters: dict[str, float]) -> None:
        super()._let_work(adapters)
        update = self.update(next(iter(adapters))) if list(adapters.values()) == [1] else None
        self._alone = (update if update is not None and update.is_plain else None,)

    def _only_plain_update(self) -> Update | None:
        """The one update at work, if its change is scale·B·A·x and nothing more."""
        return None if self.merged or self.by_row is not None or self.parts is not None else self._alone[0]

    def _frozen_matrix(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """(W, bias) if base(x) is W·x + bias and nothing else, with both frozen."""
        base: Any = self._modules["base"]
        if not is_plain_linear(base) or does_more_than_its_class(base):
            return None
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
        if (
            type(weight) is not nn.Parameter
            or (weight.dtype != x.dtype and type(base) is not NarrowLinear)
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)
        ):
            return None
        return weight, bias


def does_more_than_its_class(base: nn.Module) -> bool:
    """Whether a call of a layer, or its gradient, does more than its class says."""
    return has_own_forward(base) or base.__dict__["_backward_hooks"] or base.__dict__["_backward_pre_hooks"]


def has_own_forward(base: nn.Module) -> bool:
    """Whether a call of a layer does more than its class says.

    Some libraries give a layer another forward, which moves its weight to where the input is.
    """
    own = base.__dict__  # A look-up here takes half as long as one of an attribute.
    return own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own


def nested_like(nested: Tensor, padded: Tensor) -> Tensor:
    """The rows of `padded` [N, L, …], each as long as that of `nested`."""
    pairs = zip(padded, nested.unbind(), strict=True)
    return torch.nested.as_nested_tensor([row[: len(own)] for row, own in pairs])
