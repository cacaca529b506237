"""Reading and writing the dense weight of a base layer, whichever way round the layer stores it.

Throughout rankwise a weight is seen as the d × k matrix (out × in) of h = W·x. transformers' Conv1D stores it as
[in, out]; nn.Embedding, a linear map of one-hot rows, as [in, out] too (vocabulary × dimension).
"""

from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import MergeError

BaseLayer = Any
"""A layer with a weight: nn.Linear, transformers' Conv1D, nn.Embedding, or one that looks like them."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D (GPT-2's linear layer); told by name, so transformers is not imported."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" for kind in type(module).__mro__
    )


def is_stored_transposed(base: nn.Module) -> bool:
    """Whether the layer stores its weight as [in, out]."""
    return isinstance(base, nn.Embedding) or is_conv1d(base)


def dimensions(base: BaseLayer) -> tuple[int, int]:
    """(d, k) of a base layer: its output and its input width."""
    if isinstance(base, nn.Embedding):
        return base.embedding_dim, base.num_embeddings
    if is_conv1d(base):
        k, d = base.weight.shape
        return d, k
    return base.out_features, base.in_features


def read_weight(base: BaseLayer) -> Tensor:
    """The dense weight as a [d, k] view; raises MergeError if the layer keeps it in another form (quantised)."""
    weight = base.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or tuple(weight.shape) != _stored_shape(base):
        raise MergeError(
            f"the weight of a {type(base).__name__} cannot be read as a dense matrix "
            f"(found {getattr(weight, 'dtype', type(weight).__name__)}); keep the adapter unmerged"
        )
    return weight.detach().T if is_stored_transposed(base) else weight.detach()


def replace_weight(base: BaseLayer, matrix: Tensor) -> nn.Parameter:
    """Put a new parameter with the values of `matrix` [d, k] in place of the layer's own and return the old parameter.

    The old parameter is not written to, so a module that shares it keeps its values.
    """
    old = base.weight
    stored = matrix.T.contiguous() if is_stored_transposed(base) else matrix.contiguous()
    base.weight = nn.Parameter(stored.to(old.dtype), requires_grad=False)
    return old


def _stored_shape(base: BaseLayer) -> tuple[int, int]:
    d, k = dimensions(base)
    return (k, d) if is_stored_transposed(base) else (d, k)


def working_dtype(weight: Tensor) -> torch.dtype:
    """The type that adapter weights and merges are kept in: fp32, or fp64 over an fp64 base."""
    return torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
