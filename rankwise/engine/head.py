"""The loss at the output head in chunks of tokens, its gradient computed in the forward pass.

n tokens with hidden states x [n, k] and targets t [n]; W [V, k] and b [V] the frozen head; z = f(x·Wᵀ + b) [n, V] the
logits, where f multiplies by a scale and may cap softly, c·tanh(· / c); ε the label smoothing. For each token
    loss = log Σ_v exp z_v - (1 - ε)·z_t - ε/V·Σ_v z_v
    ∂loss/∂x = (df·(softmax z - (1 - ε)·1_t - ε/V))·W      df: the derivative of f
As W gets no gradient, a chunk's logits are turned into their gradient in place, that into the gradient of x, and are
gone before the next chunk: n·k numbers are kept for the backward pass and never n·V (Hsu et al. 2024, Liger Kernel).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rankwise.lora.frozen_product import frozen_linear, frozen_product
from rankwise.lora.linear import does_more_than_its_class
from rankwise.lora.narrow import is_plain_linear

CHUNK_BYTES = 30 * 2**20
"""Of a chunk's logits. Smaller chunks read W more often; a piece of 32 MiB and more glibc asks of the system anew each
time."""

_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier")
"""Fields of configs by which models multiply or divide their logits (Granite, Cohere, Falcon-H1)."""


@dataclass(frozen=True)
class OutputHead:
    """From hidden states [n, k] to logits [n, V] and losses [n]."""

    linear: nn.Linear
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, V]. Everything that multiplies is done on the narrow side of the product."""
        factor = self.scale if self.cap is None else self.scale / self.cap
        bias = self.linear.bias
        if factor != 1:
            hidden, bias = hidden * factor, None if bias is None else bias * factor
        logits = frozen_linear(hidden, self.linear.weight, bias)
        return logits if self.cap is None else logits.tanh_().mul_(self.cap)

    def losses(self, hidden: Tensor, targets: Tensor, label_smoothing: float = 0.0, rows: int | None = None) -> Tensor:
        """[n] cross-entropies in nats, in fp32 at least; `rows` a chunk at most, by default what CHUNK_BYTES hold.

        The head gets no gradient, which is exact only while it is frozen.
        """
        result: Any = _ChunkedLoss.apply(hidden, targets, self, label_smoothing, rows or self.rows_at_once)
        return result

    @property
    def rows_at_once(self) -> int:
        weight = self.linear.weight
        return max(1, CHUNK_BYTES // (len(weight) * _at_least_fp32(weight.dtype).itemsize))


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _ChunkedLoss(torch.autograd.Function):
    """apply(hidden [n, k], targets [n], head, label smoothing, rows a chunk at most) → losses [n]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: OutputHead, label_smoothing: float, rows: int
    ) -> Tensor:
        # Chunks of equal size: a small last one would read all of W for few rows.
        chunks = max(1, -(-len(hidden) // rows))
        losses = hidden.new_empty(len(hidden), dtype=_at_least_fp32(hidden.dtype))
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        places = of_hidden.tensor_split(chunks) if of_hidden is not None else [None] * chunks
        parts = (x.tensor_split(chunks) for x in (hidden, targets, losses))
        for x, t, loss, place in zip(*parts, places, strict=True):
            loss.copy_(_loss_of_chunk(x, t, head, label_smoothing, place))
        if of_hidden is not None:
            ctx.save_for_backward(of_hidden)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (of_hidden,) = ctx.saved_tensors
        return of_hidden * gradient[:, None].to(of_hidden.dtype), None, None, None, None


def _loss_of_chunk(
    hidden: Tensor, targets: Tensor, head: OutputHead, label_smoothing: float, of_hidden: Tensor | None
) -> Tensor:
    """The losses [m] of a chunk's m rows; their gradient goes into `of_hidden` [m, k], if given."""
    logits = head.logits(hidden)
    logits = logits.to(_at_least_fp32(logits.dtype))
    at_target = targets[:, None]
    highest = logits.amax(1, keepdim=True)
    losses = highest - (1 - label_smoothing) * logits.gather(1, at_target)
    if label_smoothing:
        losses -= label_smoothing * logits.mean(1, keepdim=True)
    of_cap = None
    if head.cap is not None and of_hidden is not None:
        of_cap = (logits / head.cap).square_().neg_().add_(1)
    total = logits.sub_(highest).exp_().sum(1, keepdim=True)
    losses += total.log()
    if of_hidden is not None:
        # The gradient of the logits, times each row's total, which is divided out where a row has k numbers and not V.
        gradient = logits.scatter_add_(1, at_target, total * (label_smoothing - 1))
        if label_smoothing:
            gradient.sub_(total * (label_smoothing / gradient.shape[1]))
        if of_cap is not None:
            gradient.mul_(of_cap)
        product = frozen_product(gradient.to(hidden.dtype), head.linear.weight)
        of_hidden.copy_(product.mul_(head.scale / total))
    return losses[:, 0]


def why_not_plain(model: Any) -> str | None:
    """Why the model's output head is more than a product with nothing attached to it, and frozen where gradients are
    asked for; None if it is just that."""
    head = model.get_output_embeddings()
    if head is None:
        return "the model names no output head"
    if not is_plain_linear(head):
        return f"the output head is a {type(head).__name__}, not a plain linear layer"
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters()):
        return "the output head is trained"
    attached = {"the model": model, "the output head": head}
    found = (name for name, module in attached.items() if does_more_than_its_class(module))
    return next((f"{name} carries hooks or another forward" for name in found), None)


def head_that_gives(logits: Tensor, hidden: Tensor, model: Any) -> OutputHead | None:
    """The head that makes `logits` [n, V] of `hidden` [n, k] up to rounding; None if no known one does.

    A config names numbers; whether a model multiplies or divides by them is found out here.
    """
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    # A wrong cap of small logits shows late: 64 ε is 8e-6 in fp32.
    largest_difference = min(64 * torch.finfo(hidden.dtype).eps, 0.03) * logits.abs().max()
    for scale in _scales(config):
        head = OutputHead(model.get_output_embeddings(), scale, cap)
        if (head.logits(hidden) - logits).abs().max() <= largest_difference:
            return head
    return None


def _scales(config: Any) -> Iterator[float]:
    yield 1.0
    for name in _SCALES:
        number = getattr(config, name, None)
        if number:
            yield from (float(number), 1 / number)
