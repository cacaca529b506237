"""Frozen layers whose weight is kept in a narrower type than they compute in: bf16 in memory, fp32 in every product.

A weight is widened piece by piece for a product, in the backward pass again, and each piece is gone after its product
(lora/frozen_product.py). Every bf16 number is an fp32 number, so the results are those of a model whose weights were
widened for good, up to the order of sums.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rankwise.lora.config import lies_in_head
from rankwise.lora.frozen_product import frozen_linear, frozen_product
from rankwise.lora.weight_reads import modules_read


class NarrowLinear(nn.Linear):
    """W·x + bias in the type of the input x; a weight that trains is widened in the gradient graph instead."""

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., k] → [..., d]"""
        if any(parameter.requires_grad for parameter in self.parameters()):
            return F.linear(input, self.weight.to(input.dtype), self.bias)
        result: Any = _FrozenLinear.apply(input, self.weight, self.bias)
        return result


class NarrowEmbedding(nn.Embedding):
    """Looks rows up and widens those."""

    computes_in: torch.dtype
    embed_scale: float = 1.0
    """What the looked-up rows are multiplied by (Gemma)."""

    def forward(self, input: Tensor) -> Tensor:
        """input: token indices [...] → [..., d]"""
        rows = F.embedding(input, self.weight, self.padding_idx).to(self.computes_in)
        return rows if self.embed_scale == 1 else rows * self.embed_scale


class _FrozenLinear(torch.autograd.Function):
    """apply(x [..., k], frozen weight [d, k], frozen bias [d]) → [..., d]; keeps the weight as it is stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return frozen_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        of_x = frozen_product(gradient.reshape(-1, gradient.shape[-1]), weight)
        return of_x.view(*gradient.shape[:-1], weight.shape[1]), None, None


def is_plain_linear(module: Any) -> bool:
    """Whether a module computes W·x + bias and nothing else."""
    return type(module) in (nn.Linear, NarrowLinear)


def is_narrow(model: nn.Module) -> bool:
    """Whether some of a model's weights are kept in a narrower type than it computes in."""
    return any(isinstance(module, NarrowLinear | NarrowEmbedding) for module in model.modules())


@torch.no_grad()
def compute_in_(model: nn.Module, dtype: torch.dtype, widened: Sequence[str] = ()) -> None:
    """Let a model whose weights are stored in a narrow type compute in `dtype`, in place.

    Linear layers and embeddings keep their weights as they are. All else is widened for good: norms, biases, layers of
    other kinds, layers whose weight the model reads without calling them, and the modules that `widened` names (exact
    name or dotted suffix), which are about to train.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    read = modules_read(modules.values())
    fit = {
        name: module
        for name, module in modules.items()
        if _has_a_narrow_kind(module) and not lies_in_head(name, widened) and module not in read
    }
    wide = {id(p) for name, module in modules.items() for key, p in _own(module) if name not in fit or key != "weight"}
    # A weight that two modules share stays narrow only if both can do with it.
    fit = {name: module for name, module in fit.items() if id(module.weight) not in wide}
    narrow = {id(module.weight) for module in fit.values()}
    for module in modules.values():
        for _, tensor in (*_own(module), *module.named_buffers(recurse=False)):
            if tensor.is_floating_point() and id(tensor) not in narrow:
                tensor.data = tensor.data.to(dtype)
    for name, module in fit.items():
        model.set_submodule(name, _narrow(module, dtype))


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False))


def _has_a_narrow_kind(module: Any) -> bool:
    """Whether there is a class in this file that computes what a module does."""
    if isinstance(module, nn.Embedding):
        # transformers' embeddings with a forward of their own and a scale multiply by it, and do nothing else.
        return module.max_norm is None and (type(module) is nn.Embedding or hasattr(module, "embed_scale"))
    return type(module) is nn.Linear


def _narrow(module: Any, dtype: torch.dtype) -> nn.Module:
    """A layer that holds the very parameters of `module`."""
    if isinstance(module, nn.Linear):
        result: Any = NarrowLinear(module.in_features, module.out_features, module.bias is not None, device="meta")
        result.bias = module.bias
    else:
        result = NarrowEmbedding(module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta")
        result.computes_in = dtype
        # The scale as the model's code has it, which its buffer holds rounded to the narrow type.
        scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0))
        result.embed_scale = float(scale)
    result.weight = module.weight
    return result.train(module.training)
