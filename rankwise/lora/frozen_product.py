"""Products with a frozen weight, by the fastest of torch's libraries.

In fp32 oneDNN multiplies with a weight as nn.Linear stores it faster than the BLAS behind torch.mm does, and faster
still with a copy in the order of its own loops (measured on one kind of CPU: benchmarks/frozen_products.py). It offers
only x·Wᵀ, so that the backward pass, g·W, needs such a copy of the transposed weight.

A weight that is stored in a narrower type than x (lora/narrow.py) is widened piece by piece for the product.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST_RESULT = 2**17
"""A result of fewer numbers costs oneDNN more than the BLAS, as a weight in its plain layout is read with each call."""
_USUAL_ROWS = 512
"""The copies are laid out for so many rows of x; other numbers of rows run at nearly the same speed."""
_PIECE = 2**20
"""Numbers of a narrow weight that are wide at a time."""


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
    if weight.dtype != x.dtype:
        flat = _narrow_linear(rows, weight, bias)
    elif weight.is_mkldnn or (numbers >= _SMALLEST_RESULT and runs_in_onednn(weight)):
        flat = torch.ops.mkldnn._linear_pointwise(rows.contiguous(), weight, bias, "none", [], "")
    else:
        flat = torch.mm(rows, weight.T) if bias is None else torch.addmm(bias, rows, weight.T)
    # As torch's own linear does: the same memory in the shape of x, which autograd does not take for a view.
    return torch.ops.aten._unsafe_view(flat, (*x.shape[:-1], weight.shape[0]))


def frozen_product(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient [T, d], weight [d, k] → g·W [T, k], without a gradient graph."""
    if weight.dtype == gradient.dtype:
        return gradient @ weight
    result = gradient.new_zeros(len(gradient), weight.shape[1])
    for columns, piece in zip(gradient.split(_rows_of_a_piece(weight), dim=1), _pieces(weight), strict=True):
        result.addmm_(columns, piece.to(gradient.dtype))
    return result


def _narrow_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows [T, k], weight [d, k] of a narrower type, bias [d] → [T, d]"""
    result = rows.new_empty(len(rows), len(weight))
    for columns, piece in zip(result.split(_rows_of_a_piece(weight), dim=1), _pieces(weight), strict=True):
        torch.mm(rows, piece.to(rows.dtype).T, out=columns)
    return result if bias is None else result.add_(bias)


def _rows_of_a_piece(weight: Tensor) -> int:
    return max(1, _PIECE // weight.shape[1])


def _pieces(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.split(_rows_of_a_piece(weight))


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
