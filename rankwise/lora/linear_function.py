"""W·x + s·B·A·x of all layers that read the same x (q, k and v; gate and up) as one autograd function.

x is saved once, the A of all layers meet it in one product, and nothing of x's size is made beside the results.
T rows of x [T, k]; for each layer W [d, k], A [r, k], B [d, r]; backward, with g the gradient of its result [T, d]:
    ∂x = Σ g·W + (s·g·B)·A      ∂A = (s·g·B)ᵀ·x      ∂B = s·gᵀ·(x·Aᵀ)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rankwise.lora.frozen_product import PreparedWeight, frozen_linear, frozen_product


class Term(NamedTuple):
    """One layer. W and bias are frozen: they get no gradient."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float
    prepared: PreparedWeight | None = None
    """Copies of the weight to compute with."""


def linear_with_update(x: Tensor, terms: Sequence[Term]) -> tuple[Tensor, ...]:
    """x [..., k] → for each layer [..., d]."""
    return _LinearWithUpdate.apply(x, *[value for term in terms for value in term])


class _LinearWithUpdate(torch.autograd.Function):
    """apply(x, *values of all terms): autograd looks for tensors among the arguments themselves alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *values: Any) -> tuple[Tensor, ...]:
        terms = [Term(*values[start : start + _VALUES]) for start in range(0, len(values), _VALUES)]
        stacked = torch.cat([term.A for term in terms]) if len(terms) > 1 else terms[0].A
        hidden = F.linear(x.reshape(-1, x.shape[-1]), stacked)
        ctx.ranks = [term.A.shape[0] for term in terms]
        results = []
        for term, own in zip(terms, hidden.split(ctx.ranks, dim=1), strict=True):
            # The result must not be a view: models divide or activate it in place, which autograd forbids for a view.
            result = frozen_linear(x, term.weight if term.prepared is None else term.prepared.forward, term.bias)
            result.view(-1, result.shape[-1]).addmm_(own, term.B.T, alpha=term.scale)
            results.append(result)
        ctx.save_for_backward(x, hidden, stacked, *[tensor for term in terms for tensor in (term.weight, term.B)])
        ctx.rest = [(term.scale, term.prepared) for term in terms]
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, hidden, stacked, *tensors = ctx.saved_tensors
        of_x = None
        of_hidden = torch.zeros_like(hidden)
        of_B: list[Tensor | None] = [None] * len(gradients)
        parts = zip(hidden.split(ctx.ranks, dim=1), of_hidden.split(ctx.ranks, dim=1), strict=True)
        for index, (own, of_own) in enumerate(parts):
            (weight, B), (scale, prepared) = tensors[2 * index : 2 * index + 2], ctx.rest[index]
            gradient = gradients[index]
            if gradient is None:
                continue
            rows = gradient.reshape(-1, gradient.shape[-1])
            # A BLAS runs the thin products as written here two to three times faster than as g·B and gᵀ·h.
            torch.mul(rows @ B.T.contiguous().T, scale, out=of_own)
            if ctx.needs_input_grad[_argument(index, "B")]:
                of_B[index] = (own.T @ rows).mul_(scale).T
            if ctx.needs_input_grad[0]:
                part = frozen_product(rows, weight) if prepared is None else frozen_linear(rows, prepared.backward)
                of_x = part if of_x is None else of_x.add_(part)
        if of_x is not None:
            of_x = of_x.addmm_(of_hidden, stacked).view(x.shape)
        of_A: Sequence[Tensor | None] = [None] * len(gradients)
        if any(ctx.needs_input_grad[_argument(index, "A")] for index in range(len(gradients))):
            of_A = (of_hidden.T @ x.reshape(-1, x.shape[-1])).split(ctx.ranks)
        return of_x, *[
            value
            for A, B in zip(of_A, of_B, strict=True)
            for value in Term(None, None, A, B, None, None)  # pyright: ignore[reportArgumentType]
        ]


_VALUES = len(Term._fields)


def _argument(index: int, field: str) -> int:
    """Where among the arguments of apply a field of a term stands."""
    return 1 + index * _VALUES + Term._fields.index(field)
