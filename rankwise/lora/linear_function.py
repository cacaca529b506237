"""W·x + s·B·A·x as one autograd function: x is saved once, nothing of x's size is made beside the result.

T rows of x [T, k]; W [d, k], A [r, k], B [d, r]; backward, with g the gradient of the result [T, d]:
    ∂x = g·W + (s·g·B)·A      ∂A = (s·g·B)ᵀ·x      ∂B = s·gᵀ·(x·Aᵀ)
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rankwise.lora.frozen_product import PreparedWeight, frozen_linear


class LinearWithUpdate(torch.autograd.Function):
    """apply(x [..., k], W, bias or None, A, B, s, prepared copies of W or None) → [..., d].

    W and bias are frozen: they get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        prepared: PreparedWeight | None = None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        hidden = F.linear(rows, A)
        # The result must not be a view: models divide or activate it in place, which autograd forbids for a view.
        result = frozen_linear(x, prepared.forward if prepared else weight, bias)
        result.view(-1, weight.shape[0]).addmm_(hidden, B.T, alpha=scale)
        ctx.save_for_backward(x, hidden, weight, A, B)
        ctx.scale, ctx.prepared = scale, prepared
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, hidden, weight, A, B = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        # A BLAS runs the thin products as written here two to three times faster than as g·B and gᵀ·h.
        of_hidden = (rows @ B.T.contiguous().T).mul_(ctx.scale)
        of_A = of_hidden.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[3] else None
        of_B = (hidden.T @ rows).mul_(ctx.scale).T if ctx.needs_input_grad[4] else None
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = frozen_linear(rows, ctx.prepared.backward) if ctx.prepared else rows @ weight
            of_x = of_x.addmm_(of_hidden, A).view(x.shape)
        return of_x, None, None, of_A, of_B, None, None
