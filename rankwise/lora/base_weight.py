"""Reading and writing the dense weight of a base layer, whichever way round the layer stores it.

Throughout rankwise a weight is seen as the d × k matrix (out × in) of h = W·x. transformers' Conv1D stores it as
[in, out]; nn.Embedding, a linear map of one-hot rows, as [in, out] too (vocabulary × dimension); a convolution as
[out, in / groups, *kernel], of which k is all but the first; nn.MultiheadAttention keeps q, k and v as one [3·E, E].
"""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import MergeError

BaseLayer = Any
"""A layer with a weight: nn.Linear, transformers' Conv1D, nn.Embedding, a convolution, or one that looks like them."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D (GPT-2's linear layer); told by name, so transformers is not imported."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" for kind in type(module).__mro__
    )


def is_stored_transposed(base: nn.Module) -> bool:
    """Whether the layer stores its weight as [in, out]."""
    return isinstance(base, nn.Embedding) or is_conv1d(base)


def dimensions(base: BaseLayer) -> tuple[int, int]:
    """(d, k) of a base layer: its output and its input width (of a convolution: of one group, kernel included)."""
    if isinstance(base, nn.Embedding):
        return base.embedding_dim, base.num_embeddings
    if isinstance(base, CONVOLUTIONS):
        return base.out_channels, base.in_channels // base.groups * prod(base.kernel_size)
    if isinstance(base, nn.MultiheadAttention):
        return 3 * base.embed_dim, base.embed_dim
    if is_conv1d(base):
        k, d = base.weight.shape
        return d, k
    return base.out_features, base.in_features


def weight_name(base: BaseLayer) -> str:
    """The name of the parameter that holds the matrix."""
    return "in_proj_weight" if isinstance(base, nn.MultiheadAttention) else "weight"


def bias_name(base: BaseLayer) -> str:
    """The name of the bias that goes with the matrix; the layer may have none."""
    return "in_proj_bias" if isinstance(base, nn.MultiheadAttention) else "bias"


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps what the module holds elsewhere, and lends it while the module computes."""
    return any(p.is_meta for p in module.parameters(recurse=False)) and hasattr(module, "_hf_hook")


def device_of(base: BaseLayer, weight: Tensor) -> torch.device:
    """Where a layer computes with its weight."""
    return torch.device(base._hf_hook.execution_device) if is_offloaded(base) else weight.device


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest numbers of another type, a tie to the even one.

    torch goes from fp64 to bf16 and fp16 through fp32, and a number that the first rounding moves onto a tie is then
    rounded the wrong way. So what fp32 cannot hold is cut there with its last bit set, which keeps it off any tie.
    """
    if values.dtype != torch.float64 or dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    single = values.float()
    beyond = single.double().abs() > values.abs()
    bits = single.view(torch.int32)
    bits = torch.where(beyond & torch.isfinite(values), bits - 1, bits)  # One step towards zero, whatever the sign.
    inexact = bits.view(torch.float32).double() != values
    return torch.where(inexact, bits | 1, bits).view(torch.float32).to(dtype)


def as_matrix(base: BaseLayer, weight: Tensor) -> Tensor:
    """A stored weight of a base layer as a [d, k] view; raises MergeError for another form (quantised)."""
    plain = type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()
    if not plain or weight.numel() != prod(dimensions(base)):
        raise MergeError(
            f"the weight of a {type(base).__name__} cannot be read as a dense matrix "
            f"(found {type(weight).__name__} of {weight.dtype})"
        )
    return weight.detach().T if is_stored_transposed(base) else weight.detach().flatten(1)


def as_stored(base: BaseLayer, matrix: Tensor) -> Tensor:
    """A [d, k] matrix in the form in which a base layer stores its weight."""
    stored = matrix.T if is_stored_transposed(base) else matrix
    return stored.contiguous().view(getattr(base, weight_name(base)).shape)


def working_dtype(weight: Tensor) -> torch.dtype:
    """The type that adapter weights and merges are kept in: fp32, or fp64 over an fp64 base."""
    return torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
