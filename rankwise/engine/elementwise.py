"""Element-wise work without the temporaries that plain modules make: RMS norms, gated activations, rotary positions.

torch runs such work one operation at a time, and each writes a tensor for the next one. Here a result is changed in
place as far as possible, and the backward pass is written by hand. Symbols: x the input, g the gradient of the result,
w the norm's weight, d its width, ⊙ a product number by number:
    norm        y = x·i⊙w, i = 1/√(Σx²/d + ε)           ∂x = i·(g⊙w - x·i²·Σ(g⊙w⊙x)/d)
    gate        y = a(u)⊙v, a an activation             ∂u = a'(u)⊙(g⊙v)   ∂v = g⊙a(u), where a(u) is computed again
    rotation    y₁ = x₁⊙c₁ - x₂⊙s₁   y₂ = x₂⊙c₂ + x₁⊙s₂      the halves of a head, or of the part of it that turns;
                                                             c, s the cosines and sines
Which modules of a model compute just this is not known but tried: what stands in for one gives the same numbers up to
rounding.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rankwise.lora.linear import does_more_than_its_class
from rankwise.lora.places import named_places, replace_

_ROTATION = "apply_rotary_pos_emb"
"""What transformers calls the function in each of its model files that it is in."""
_ROUNDING = 64
"""Two ways to compute the same differ by less than so many units in the last place of the largest number."""


@dataclass(frozen=True)
class StandIns:
    """What computes the same as parts of a model, with fewer temporaries."""

    modules: dict[nn.Module, nn.Module] = field(default_factory=dict)
    """A norm or a gated MLP → what stands in for it."""
    files: list[ModuleType] = field(default_factory=list)
    """The model files whose function for rotary positions is exchanged."""

    def count(self, kind: type) -> int:
        """How many stand-ins of a kind there are."""
        return sum(isinstance(stand_in, kind) for stand_in in self.modules.values())


def stand_ins(model: nn.Module) -> StandIns:
    """Those for a model. Modules with hooks, or whose own parameters train, have none."""
    places = [module for _, module in named_places(model)]
    found = {module: stand_in for module in places if (stand_in := _norm(module) or _gated_mlp(module))}
    files = {sys.modules[name] for module in places if (name := type(module).__module__) in sys.modules}
    return StandIns(found, [file for file in files if _rotates(getattr(file, _ROTATION, None))])


@contextmanager
def elementwise_by_hand(model: nn.Module) -> Iterator[None]:
    """Let the stand-ins work in the places of a model's parts while the block lasts."""
    found = stand_ins(model)
    before = {file: getattr(file, _ROTATION) for file in found.files}
    replace_(model, found.modules)
    for file, plain in before.items():
        setattr(file, _ROTATION, _rotation_in_place_of(plain))
    try:
        yield
    finally:
        for file, plain in before.items():
            setattr(file, _ROTATION, plain)
        replace_(model, {stand_in: module for module, stand_in in found.modules.items()})


class RmsNorm(nn.Module):
    """x·i⊙w, or x·i⊙(1 + w) for `plus_one` (Gemma)."""

    def __init__(self, weight: nn.Parameter, epsilon: float, plus_one: bool) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon
        self.plus_one = plus_one

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d] → [..., d]"""
        result: Any = _RmsNorm.apply(x, self.weight + 1 if self.plus_one else self.weight, self.epsilon)
        return result


class GatedMlp(nn.Module):
    """down(a(gate(x))⊙up(x)), with the layers of a model's own MLP."""

    def __init__(self, mlp: Any, activation: "_Activation") -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (mlp.get_submodule(name) for name in _MLP)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d] → [..., d]"""
        return self.down_proj(_Gated.apply(self.gate_proj(x), self.up_proj(x), self.activation))


@dataclass(frozen=True)
class _Activation:
    value: Callable[[Tensor], Tensor]
    gradient_: Callable[[Tensor, Tensor], Tensor]
    """(g, u) → g⊙a'(u), in the memory of g"""


def _gelu(approximate: str) -> _Activation:
    backward = torch.ops.aten.gelu_backward.grad_input
    return _Activation(
        lambda u: F.gelu(u, approximate=approximate),
        lambda g, u: backward(g, u, approximate=approximate, grad_input=g),
    )


_ACTIVATIONS = (
    _Activation(F.silu, lambda g, u: torch.ops.aten.silu_backward.grad_input(g, u, grad_input=g)),
    _gelu("tanh"),
    _gelu("none"),
)
_MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")


class _RmsNorm(torch.autograd.Function):
    """apply(x [..., d], frozen weight [d], ε) → [..., d]"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, inverse, weight = ctx.saved_tensors
        result = gradient * weight
        along_x = torch.linalg.vecdot(result, x, dim=-1).unsqueeze(-1)
        along_x.mul_(inverse).mul_(inverse).div_(x.shape[-1])
        return result.addcmul_(x, along_x, value=-1).mul_(inverse), None, None


class _Gated(torch.autograd.Function):
    """apply(u [..., f], v [..., f], activation) → a(u)⊙v"""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, activation: _Activation) -> Tensor:
        ctx.save_for_backward(u, v)
        ctx.activation = activation
        return activation.value(u).mul_(v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        u, v = ctx.saved_tensors
        activation: _Activation = ctx.activation
        return activation.gradient_(gradient * v, u), activation.value(u).mul_(gradient), None


class _Rotated(torch.autograd.Function):
    """apply(x [..., T, w], cos, sin [..., T, p]) → [..., T, w]: the first p numbers of each head are rotated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        result = _beginning_times(x, cos)
        (x1, x2), (y1, y2), (s1, s2) = (_halves(tensor, cos) for tensor in (x, result, sin))
        y1.addcmul_(x2, s1, value=-1)
        y2.addcmul_(x1, s2)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        result = _beginning_times(gradient, cos)
        (g1, g2), (of_x1, of_x2), (s1, s2) = (_halves(tensor, cos) for tensor in (gradient, result, sin))
        of_x1.addcmul_(g2, s2)
        of_x2.addcmul_(g1, s1, value=-1)
        return result, None, None


def _beginning_times(x: Tensor, cos: Tensor) -> Tensor:
    """x with as many numbers of each head as there are cosines multiplied by these."""
    if x.shape[-1] == cos.shape[-1]:
        return x * cos
    result = x.clone()
    result[..., : cos.shape[-1]].mul_(cos)
    return result


def _halves(x: Tensor, cos: Tensor) -> tuple[Tensor, ...]:
    return x[..., : cos.shape[-1]].chunk(2, dim=-1)


def _rotation_in_place_of(plain: Callable[..., Any]) -> Callable[..., Any]:
    """As `plain`, which takes over where something else is asked for."""

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, **more: Any) -> Any:
        if more or not q.dtype == k.dtype == cos.dtype:
            return plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, **more)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return _Rotated.apply(q, cos, sin), _Rotated.apply(k, cos, sin)

    return rotated


@torch.no_grad()
def _rotates(plain: Any) -> bool:
    """Whether a function turns the halves of heads as above; of parts of heads too, if it takes them."""

    def agrees(rotated: int) -> bool | None:
        q, k, (cos, sin) = _numbers(1, 2, 3, 8), _numbers(1, 1, 3, 8), _numbers(2, 1, 3, rotated)
        try:
            theirs, ours = plain(q, k, cos, sin), _rotation_in_place_of(plain)(q, k, cos, sin)
            return all(_same(a, b) for a, b in zip(theirs, ours, strict=True))
        except (TypeError, ValueError, RuntimeError, IndexError):  # It takes other arguments, or gives other results.
            return None

    return callable(plain) and bool(agrees(8)) and agrees(4) is not False


def _norm(module: Any) -> nn.Module | None:
    """What stands in for an RMS norm, if `module` is one."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not (type(module).__name__.endswith("RMSNorm") and isinstance(weight, nn.Parameter) and _is_free(module)):
        return None
    if weight.dtype not in (torch.float, torch.double) or weight.ndim != 1 or not isinstance(epsilon, float):
        return None
    kinds = [RmsNorm(weight, epsilon, plus_one) for plus_one in (False, True)]
    return _alike(module, kinds, _numbers(4, len(weight)).to(weight))


def _gated_mlp(module: Any) -> nn.Module | None:
    """What stands in for a gated MLP, if `module` is one."""
    if {name for name, _ in module.named_children()} != set(_MLP) or not (_is_free(module) and _is_free(module.act_fn)):
        return None
    weight = next(module.gate_proj.parameters(), None)
    if weight is None or not hasattr(module.gate_proj, "in_features"):
        return None
    # Weights that are stored in fewer bits meet fp32 (lora/narrow.py).
    x = _numbers(4, module.gate_proj.in_features).to(weight.device, torch.promote_types(weight.dtype, torch.float))
    return _alike(module, [GatedMlp(module, activation) for activation in _ACTIVATIONS], x)


@torch.no_grad()
def _alike(module: nn.Module, kinds: Sequence[nn.Module], x: Tensor) -> nn.Module | None:
    """The first of `kinds` that makes the same of x as `module` does."""
    try:
        expected = module(x)
    except (TypeError, ValueError, RuntimeError):  # It takes other arguments than x, or another type.
        return None
    return next((kind.train(module.training) for kind in kinds if _same(expected, kind(x))), None)


def _is_free(module: nn.Module) -> bool:
    """Whether nobody watches a module, and nothing of its own trains."""
    trains = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    return not trains and not does_more_than_its_class(module)


def _numbers(*shape: int) -> Tensor:
    """The same random numbers each time, without a draw from torch's global generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _same(expected: Any, found: Tensor) -> bool:
    return (
        isinstance(expected, Tensor)
        and expected.dtype == found.dtype
        and expected.shape == found.shape
        and bool((expected - found).abs().max() <= _ROUNDING * torch.finfo(found.dtype).eps * expected.abs().max())
    )
