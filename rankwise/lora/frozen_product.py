"""Products with a frozen weight, by the fastest of torch's libraries.

In fp32 oneDNN multiplies with a weight as nn.Linear stores it faster than the BLAS behind torch.mm does, and faster
still with a copy in the order of its own loops (measured on one kind of CPU: benchmarks/frozen_products.py). It offers
only x·Wᵀ, so that the backward pass, g·W, needs such a copy of the transposed weight.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST_RESULT = 2**17
"""A result of fewer numbers costs oneDNN more than the BLAS, as a weight in its plain layout is read with each call."""
_USUAL_ROWS = 512
"""The copies are laid out for so many rows of x; other numbers of rows run at nearly the same speed."""


@dataclass(frozen=True)
class PreparedWeight:
    """Copies of a frozen weight in oneDNN's own layout, opaque to all but `frozen_linear`."""

    source: Tensor
    """The weight [d, k] that they were made of."""
    forward: Tensor
    """For x·Wᵀ"""
    backward: Tensor
    """For g·W"""


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., k], weight [d, k], bias [d] → x·Wᵀ + bias [..., d], without a gradient graph; a new tensor, no view.

    The weight may be one of the copies in a `PreparedWeight`.
    """
    rows = x.reshape(-1, x.shape[-1])
    numbers = rows.shape[0] * weight.shape[0]
    if weight.is_mkldnn or (numbers >= _SMALLEST_RESULT and x.dtype == weight.dtype and runs_in_onednn(weight)):
        flat = torch.ops.mkldnn._linear_pointwise(rows.contiguous(), weight, bias, "none", [], "")
    else:
        flat = torch.mm(rows, weight.T) if bias is None else torch.addmm(bias, rows, weight.T)
    # As torch's own linear does: the same memory in the shape of x, which autograd does not take for a view.
    return torch.ops.aten._unsafe_view(flat, (*x.shape[:-1], weight.shape[0]))


def runs_in_onednn(weight: Tensor) -> bool:
    """Whether products with this weight are oneDNN's."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float
        and weight.is_contiguous()
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@torch.no_grad()
def prepare(weight: Tensor) -> PreparedWeight:
    """Copy a weight [d, k] that `runs_in_onednn`; takes twice its memory."""
    lay_out = torch.ops.mkldnn._reorder_linear_weight
    return PreparedWeight(
        weight, lay_out(weight.detach(), _USUAL_ROWS), lay_out(weight.detach().T.contiguous(), _USUAL_ROWS)
    )
