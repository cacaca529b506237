"""Which kind of adapter layer goes with which kind of module; a user can add kinds of their own."""

from typing import Any

from torch import nn

from rankwise.lora.attention import LoraAttention
from rankwise.lora.base_weight import CONVOLUTIONS, is_conv1d
from rankwise.lora.convolution import LoraConv
from rankwise.lora.embedding import LoraEmbedding
from rankwise.lora.layers import LoraLayer
from rankwise.lora.linear import LoraLinear

_KINDS: dict[type[nn.Module], type[LoraLayer]] = {
    nn.Linear: LoraLinear,
    nn.Embedding: LoraEmbedding,
    nn.Conv1d: LoraConv,
    nn.Conv2d: LoraConv,
    nn.Conv3d: LoraConv,
    nn.MultiheadAttention: LoraAttention,
}


def register_layer(module: type[nn.Module], layer: type[LoraLayer]) -> None:
    """Let modules of this type, and of types derived from it, carry adapters through `layer`.

    `layer` derives from rankwise.lora.layers.LoraLayer, which says what a kind must define. A later entry for the same
    type replaces the earlier one.
    """
    _KINDS[module] = layer


def layer_kind(module: nn.Module) -> type[LoraLayer] | None:
    """The kind for a module: that of its nearest registered type, or None."""
    found = _nearest_type(module)
    return _KINDS[found] if found else LoraLinear if is_conv1d(module) else None


def _nearest_type(module: nn.Module) -> type[nn.Module] | None:
    return next((base for base in type(module).__mro__ if base in _KINDS), None)


def computes_otherwise(module: Any) -> str | None:
    """Why an adapter that computes as torch's own class does is wrong for a module derived from that, or None.

    To a linear layer the change is added whatever it makes of its input.
    """
    base: Any = _nearest_type(module)
    if base not in (nn.Embedding, *CONVOLUTIONS, nn.MultiheadAttention):
        return None
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "an embedding with max_norm rewrites its own weight"
    if isinstance(module, nn.Embedding) and (hasattr(module, "embed_scale") or not module.weight.is_floating_point()):
        return None  # The one multiplies what it looks up by a scale, the other is quantised; they do nothing else.
    names = [name for name in ("forward", "_conv_forward") if hasattr(base, name)]
    if all(getattr(type(module), name) is getattr(base, name) for name in names):
        return None
    return (
        f"its class, {type(module).__name__}, computes in a way of its own, which an adapter of an nn.{base.__name__} "
        "does not know; leave it out (exclude_modules), or say how it is adapted (rankwise.register_layer)"
    )


def unsupported_reason(module: nn.Module, parent: nn.Module | None) -> str | None:
    """Why a module cannot carry an adapter, or None if it can."""
    if isinstance(parent, nn.MultiheadAttention):
        return "it is a part of an nn.MultiheadAttention, which reads its weight without calling it; name that one"
    if isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim:
        return "an nn.MultiheadAttention with other widths for keys or values has no joint projection"
    if reason := computes_otherwise(module):
        return reason
    return None if layer_kind(module) else f"a {type(module).__name__} cannot carry an adapter"
