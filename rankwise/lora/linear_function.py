"""W·x + s·B·A·x of all layers that read the same x (q, k and v; gate and up) as one autograd function.

x is saved once, the A of all layers meet it in one product, and nothing of x's size is made beside the results.
T rows of x [T, k]; for each layer W [d, k], A [r, k], B [d, r]; backward, with g the gradient of its result [T, d]:
    ∂x = Σ g·W + (s·g·B)·A      ∂A = (s·g·B)ᵀ·x      ∂B = s·gᵀ·(x·Aᵀ)
The rows may fall into parts, each with A, B and s of its own adapter: W then meets all rows at once.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.nn import functional as F

from rankwise.lora.frozen_product import PreparedWeight, frozen_linear, frozen_product


class Term(NamedTuple):
    """One layer, or an adapter's part of it. W and bias are frozen: they get no gradient."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float
    prepared: PreparedWeight | None = None
    """Copies of the weight to compute with."""


def linear_with_update(x: Tensor, terms: Sequence[Term], lengths: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    """x [..., k] → for each layer [..., d].

    With `lengths`, x is cut into parts of so many rows, and each layer has a term for every part, one after the other:
    W is the same for all, and A and B are those of the part's own adapter.
    """
    return _LinearWithUpdate.apply(x, lengths, *[value for term in terms for value in term])


class _LinearWithUpdate(torch.autograd.Function):
    """apply(x, lengths, *values of all terms): autograd looks for tensors among the arguments themselves alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Sequence[int] | None, *values: Any) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        ctx.lengths = lengths = [len(rows)] if lengths is None else list(lengths)
        terms = [Term(*values[start : start + _VALUES]) for start in range(0, len(values), _VALUES)]
        layers = [terms[start : start + len(lengths)] for start in range(0, len(terms), len(lengths))]
        parts = [terms[part :: len(lengths)] for part in range(len(lengths))]
        stacked = [torch.cat([term.A for term in part]) if len(part) > 1 else part[0].A for part in parts]
        hidden = [F.linear(own, A) for own, A in zip(_split(rows, lengths), stacked, strict=True)]
        ctx.ranks = [[term.A.shape[0] for term in part] for part in parts]
        results = []
        for layer, of_layer in zip(layers, _by_layer(hidden, ctx.ranks), strict=True):
            weight, bias, prepared = layer[0].weight, layer[0].bias, layer[0].prepared
            # The result must not be a view: models divide or activate it in place, which autograd forbids for a view.
            result = frozen_linear(x, weight if prepared is None else prepared.forward, bias)
            places = _split(result.view(-1, result.shape[-1]), lengths)
            for term, own, place in zip(layer, of_layer, places, strict=True):
                place.addmm_(own, term.B.T, alpha=term.scale)
            results.append(result)
        # For a gradient that is differentiated itself, the A that are stacked; they are there anyway.
        own_A = [term.A for term in terms] if len(layers) > 1 else []
        weights = [layer[0].weight for layer in layers]
        ctx.save_for_backward(x, *hidden, *stacked, *weights, *[term.B for term in terms], *own_A)
        ctx.scales = [[term.scale for term in layer] for layer in layers]
        ctx.prepared = [layer[0].prepared for layer in layers]
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        parts = len(ctx.lengths)
        x, *tensors = ctx.saved_tensors
        hidden, stacked, tensors = tensors[:parts], tensors[parts : 2 * parts], tensors[2 * parts :]
        layers = len(gradients)
        weights, B = tensors[:layers], tensors[layers : layers + layers * parts]
        if torch.is_grad_enabled():  # with create_graph
            A = tensors[layers + layers * parts :] or stacked
            return _differentiable_backward(ctx, x, weights, A, B, gradients)
        of_x = None
        of_hidden = [torch.zeros_like(own) for own in hidden]
        of_B: list[Tensor | None] = [None] * len(B)
        own, of_own = _by_layer(hidden, ctx.ranks), _by_layer(of_hidden, ctx.ranks)
        for layer, gradient in enumerate(gradients):
            if gradient is None:
                continue
            rows = gradient.reshape(-1, gradient.shape[-1])
            for part, own_rows in enumerate(_split(rows, ctx.lengths)):
                index, scale = layer * parts + part, ctx.scales[layer][part]
                # A BLAS runs the thin products as written here two to three times faster than as g·B and gᵀ·h.
                torch.mul(own_rows @ B[index].T.contiguous().T, scale, out=of_own[layer][part])
                if ctx.needs_input_grad[_argument(index, "B")]:
                    of_B[index] = (own[layer][part].T @ own_rows).mul_(scale).T
            if ctx.needs_input_grad[0]:
                prepared = ctx.prepared[layer]
                if prepared is None:
                    through = frozen_product(rows, weights[layer])
                else:
                    through = frozen_linear(rows, prepared.backward)
                of_x = through if of_x is None else of_x.add_(through)
        if of_x is not None:
            for place, of_part, A in zip(_split(of_x, ctx.lengths), of_hidden, stacked, strict=True):
                place.addmm_(of_part, A)
            of_x = of_x.view(x.shape)
        of_A: list[Tensor | None] = [None] * len(B)
        for part, own_rows in enumerate(_split(x.reshape(-1, x.shape[-1]), ctx.lengths)):
            if any(ctx.needs_input_grad[_argument(index, "A")] for index in range(part, len(B), parts)):
                of_A[part::parts] = _split(of_hidden[part].T @ own_rows, ctx.ranks[part])
        return of_x, None, *_of_terms(of_A, of_B)


_VALUES = len(Term._fields)


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which the function here does not know."""
    return forward_ad._current_level >= 0 or _are_functorch_transforms_active()


def _differentiable_backward(
    ctx: Any,
    x: Tensor,
    weights: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
) -> tuple[Any, ...]:
    """What backward returns, by operations that autograd records."""
    parts = len(ctx.lengths)
    x_rows = _split(x.reshape(-1, x.shape[-1]), ctx.lengths)
    of_x = [torch.zeros_like(rows) for rows in x_rows]
    of_A: list[Tensor | None] = [None] * len(B)
    of_B: list[Tensor | None] = [None] * len(B)
    for layer, gradient in enumerate(gradients):
        if gradient is None:
            continue
        weight = weights[layer].to(x.dtype)
        for part, rows in enumerate(_split(gradient.reshape(-1, gradient.shape[-1]), ctx.lengths)):
            index, scale = layer * parts + part, ctx.scales[layer][part]
            of_hidden = rows @ B[index] * scale
            of_x[part] = of_x[part] + rows @ weight + of_hidden @ A[index]
            of_A[index] = of_hidden.T @ x_rows[part]
            of_B[index] = rows.T @ (x_rows[part] @ A[index].T) * scale
    return torch.cat(of_x).view(x.shape), None, *_of_terms(of_A, of_B)


def _of_terms(of_A: Sequence[Tensor | None], of_B: Sequence[Tensor | None]) -> list[Any]:
    """The gradients of the values of all terms."""
    return [
        value
        for one_A, one_B in zip(of_A, of_B, strict=True)
        for value in Term(None, None, one_A, one_B, None, None)  # pyright: ignore[reportArgumentType]
    ]


def _by_layer(hidden: Sequence[Tensor], ranks: Sequence[list[int]]) -> list[tuple[Tensor, ...]]:
    """For each part the hidden values of all layers beside each other → for each layer those of all parts."""
    return list(zip(*(_split(own, r, dim=1) for own, r in zip(hidden, ranks, strict=True)), strict=True))


def _split(tensor: Tensor, sizes: Sequence[int], dim: int = 0) -> Sequence[Tensor]:
    """tensor.split, which for one part takes as long as a thin product."""
    return (tensor,) if len(sizes) == 1 else tensor.split(sizes, dim)


def _argument(index: int, field: str) -> int:
    """Where among the arguments of apply a field of a term stands."""
    return 2 + index * _VALUES + Term._fields.index(field)
