"""AdamW for adapters, with what is particular to a product of two factors."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from rankwise.errors import ConfigError
from rankwise.lora.embedding import LoraEmbedding
from rankwise.lora.inject import trainable_parameters
from rankwise.lora.places import named_lora_layers, named_wrappers
from rankwise.lora.trained import TrainedCopy

Pair = tuple[nn.Parameter, nn.Parameter]
"""A [r, k] and B [d, r] of one update"""
DAMPING = 1e-6
"""δ of `PreconditionedAdamW`; Bᵀ·B starts at zero, where ∂A is zero too."""


def lora_optimizer(
    model: nn.Module,
    lr: float,
    lora_plus_ratio: float = 1.0,
    weight_decay: float = 0.0,
    preconditioned: bool = False,
) -> AdamW:
    """AdamW over everything that the adapters at work in `model` train.

    `lora_plus_ratio`: B learns so many times faster than A (LoRA+, Hayou et al. 2024, arXiv 2402.12354).
    `weight_decay`: shrinks A and B by lr·weight_decay in each step, whatever their rank, and nothing else that trains
    (heads, magnitudes, biases). With W0 frozen this pulls ΔW towards zero, so towards the base.
    `preconditioned`: gradients in the metric of ΔW (`PreconditionedAdamW`); not of stacked experts, nor of
    convolutions with groups.
    Raises ConfigError for a rate or ratio that is not positive, a negative decay, or an embedding whose gradients are
    sparse.
    """
    if not (lr > 0 and lora_plus_ratio > 0 and weight_decay >= 0):
        raise ConfigError(
            "lr and lora_plus_ratio must be above 0 and weight_decay at least 0, "
            f"found {lr}, {lora_plus_ratio} and {weight_decay}"
        )
    trained = trainable_parameters(model)
    if sparse := _sparse(model, {id(p) for p in trained}):
        raise ConfigError(
            f"AdamW takes no sparse gradients, as embeddings with sparse=True give them: {', '.join(sparse)}; leave "
            "them out (exclude_modules), make the base's dense, or train them with torch.optim.SparseAdam"
        )
    layers = [layer for _, layer in named_lora_layers(model)]
    updates = [(layer, layer.update(name)) for layer in layers for name in layer.active]
    of_A, of_B = {id(update.lora_A) for _, update in updates}, {id(update.lora_B) for _, update in updates}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) in of_A], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in of_B], "lr": lr * lora_plus_ratio, "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in of_A | of_B], "lr": lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not preconditioned:
        return AdamW(groups, lr=lr, fused=True)
    # A stack of experts, or of a convolution's groups, is no pair of two matrices of one rank.
    pairs = [(u.lora_A, u.lora_B) for layer, u in updates if layer.stacks == 1 and u.lora_A.requires_grad]
    return PreconditionedAdamW(pairs, groups, lr=lr)


class PreconditionedAdamW(AdamW):
    """AdamW on gradients that are preconditioned by r × r matrices (Zhang and Pilanci 2024, arXiv 2402.02347).

        ∂A → (Bᵀ·B + δ·I)⁻¹·∂A      ∂B → ∂B·(A·Aᵀ + δ·I)⁻¹

    The step of ΔW then depends less on how its size is spread over A and B, and so less on the rank and the scale.
    """

    def __init__(self, pairs: list[Pair], groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, lr=lr, fused=True)
        self._pairs = pairs

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step. Raises ConfigError if a closure is given: it would compute the gradients anew."""
        if closure is not None:
            raise ConfigError("the preconditioned optimiser takes no closure; call backward() before step()")
        for A, B in self._pairs:
            if A.grad is None or B.grad is None:
                continue
            of_A, of_B = A.flatten(1), B.flatten(1)
            A.grad.copy_(self._solve(of_B.T @ of_B, A.grad.flatten(1)).view_as(A))
            B.grad.copy_(self._solve(of_A @ of_A.T, B.grad.flatten(1).T).T.reshape(B.shape))
        return super().step()

    def _solve(self, gram: Tensor, gradient: Tensor) -> Tensor:
        """(gram [r, r] + δ·I)⁻¹ · gradient [r, n]"""
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve(gram + DAMPING * identity, gradient)


def _sparse(model: nn.Module, trained: set[int]) -> list[str]:
    """The embeddings that train and give sparse gradients."""
    return [
        name
        for name, layer in named_wrappers(model)
        if isinstance(layer, LoraEmbedding | TrainedCopy)
        and any(id(p) in trained for adapter in layer.active for p in layer.parameters_of(adapter))
        and (
            any(map(layer.is_sparse, layer.active))
            if isinstance(layer, LoraEmbedding)
            else any(getattr(module, "sparse", False) for module in layer.chosen().modules())
        )
    ]
