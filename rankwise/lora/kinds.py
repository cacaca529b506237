"""Which kind of adapter layer goes with which kind of module; a user can add kinds of their own."""

from torch import nn

from rankwise.lora.attention import LoraAttention
from rankwise.lora.base_weight import is_conv1d
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
    for base in type(module).__mro__:
        if base in _KINDS:
            return _KINDS[base]
    return LoraLinear if is_conv1d(module) else None


def unsupported_reason(module: nn.Module, parent: nn.Module | None) -> str | None:
    """Why a module cannot carry an adapter, or None if it can."""
    if isinstance(parent, nn.MultiheadAttention):
        return "it is a part of an nn.MultiheadAttention, which reads its weight without calling it; name that one"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "an embedding with max_norm rewrites its own weight"
    if isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim:
        return "an nn.MultiheadAttention with other widths for keys or values has no joint projection"
    return None if layer_kind(module) else f"a {type(module).__name__} cannot carry an adapter"
