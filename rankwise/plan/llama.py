"""Llama's family: RMS norms, rotary positions, grouped query heads, a gated MLP, and how its members differ."""

from dataclasses import dataclass
from typing import Literal

from rankwise.plan.settings import Settings
from rankwise.plan.shape import Block, Linear


@dataclass(frozen=True)
class Variant:
    """How a member differs from Llama."""

    tied: bool = False
    """Whether embedding and head share a table where the file does not say."""
    head_width: int | None = None
    """Where the file does not say; None: the hidden width shared out over the heads."""
    biases: Literal["as set", "qkv", "none"] = "as set"
    """Of the attention's matrices: as attention_bias says, always on query, key and value, or never."""
    query_norm: Literal["none", "by head", "whole"] = "none"
    """Whether queries and keys are normalised, head by head or whole."""
    norms: Literal["before", "before and after", "after"] = "before"
    """Where a block normalises, seen from attention and MLP."""
    norms_have_weights: bool = True
    fused: bool = False
    """Query, key and value in one matrix, gate and up in another."""


LLAMAS = {
    "llama": Variant(),
    "mistral": Variant(biases="none"),
    "ministral": Variant(biases="none"),
    "qwen2": Variant(biases="qkv"),
    "qwen3": Variant(head_width=128, query_norm="by head"),
    "smollm3": Variant(tied=True),
    "gemma": Variant(tied=True, head_width=256),
    "gemma3_text": Variant(tied=True, head_width=256, query_norm="by head", norms="before and after"),
    "phi3": Variant(biases="none", fused=True),
    "granite": Variant(),
    "olmo": Variant(norms_have_weights=False),
    "olmo2": Variant(query_norm="whole", norms="after"),
    "olmo3": Variant(query_norm="whole", norms="after"),
}


def llama_block(s: Settings, variant: Variant, d: int, heads: int, width: int) -> Block:
    """A block of hidden width d with so many query heads of `width`."""
    groups = s.number("num_key_value_heads", default=heads)
    q, kv, f = heads * width, groups * width, s.number("intermediate_size")
    bias = {"as set": bool(s.get("attention_bias")), "qkv": True, "none": False}[variant.biases]
    mlp_bias = bool(s.get("mlp_bias"))
    inner = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]
    gates = [("gate_proj", f), ("up_proj", f)]
    if variant.fused:
        inner, gates = [("qkv_proj", q + 2 * kv)], [("gate_up_proj", 2 * f)]
    return Block(
        linears=(
            *(Linear(f"self_attn.{name}", rows, d, bias, "attention in") for name, rows in inner),
            Linear("self_attn.o_proj", d, q, bias and variant.biases != "qkv", "joined"),
            *(Linear(f"mlp.{name}", rows, d, mlp_bias, "mlp in") for name, rows in gates),
            Linear("mlp.down_proj", d, f, mlp_bias, "product"),
        ),
        other=_norm_parameters(variant, d, q, kv, width),
        kept=_kept(variant, d, q, kv, f, heads, groups),
        from_input=("attention in",),
        activations=f,
    )


def _norm_parameters(variant: Variant, d: int, q: int, kv: int, width: int) -> int:
    norms = (4 if variant.norms == "before and after" else 2) * d * variant.norms_have_weights
    return norms + {"none": 0, "by head": 2 * width, "whole": q + kv}[variant.query_norm]


def _kept(variant: Variant, d: int, q: int, kv: int, f: int, heads: int, groups: int) -> dict[str, int]:
    """What a norm normalises, what attention and the gated product multiply, and a few numbers beside them."""
    before, after = variant.norms != "after", variant.norms != "before"
    # A norm without weights is a LayerNorm, which keeps mean and deviation.
    statistics = 2 * (before + after) * (1 if variant.norms_have_weights else 2)
    kept = {
        "residuals": 2 * d * before,
        "branches": 2 * d * after,
        "queries": q,
        "keys": kv,
        # Values that are a view into a fused matrix's result keep all of it.
        "values": q + 2 * kv if variant.fused else kv,
        "attended": q,
        "log-sums": heads,
        # What stands in for a gated MLP computes the activated gate once more (engine/elementwise.py).
        "gate, up": (3 if variant.fused else 2) * f,
    }
    if variant.query_norm != "none":
        kept["before query norm"] = q + kv
        statistics += 2 if variant.query_norm == "whole" else heads + groups
    return kept | {"statistics": statistics}
