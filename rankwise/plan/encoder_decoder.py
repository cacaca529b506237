"""Encoders with decoders: T5 and BART with their kin.

Symbols: d the hidden width, q that of all heads together, f the inner width. A decoder's block has a second attention,
whose queries are its own and whose keys and values are made of what the encoder puts out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rankwise.plan.blocks import kept_by_activation
from rankwise.plan.settings import Settings
from rankwise.plan.shape import SOURCE, Block, Linear, ModelShape, Stack


@dataclass(frozen=True)
class _Variant:
    """How a member differs from BART."""

    positions: int | None
    """Rows of a stack's table of positions beyond the longest text's; None: positions are computed."""
    norms: int
    """Norms of a stack that lie outside of its blocks."""


_BARTS = {
    "bart": _Variant(2, 1),
    "mbart": _Variant(2, 2),
    "marian": _Variant(0, 0),
    "pegasus": _Variant(0, 1),
    "m2m_100": _Variant(None, 1),
}
_FEED_FORWARD = {"t5": "relu", "mt5": "gated-gelu"}
"""feed_forward_proj, where the file does not say."""
ENCODER_DECODERS = (*_FEED_FORWARD, *_BARTS)


def encoder_decoder(s: Settings, kind: str) -> ModelShape:
    """The shape of a model of ENCODER_DECODERS."""
    return _t5(s, kind) if kind in _FEED_FORWARD else _bart(s, kind)


def _t5(s: Settings, kind: str) -> ModelShape:
    d, heads, vocabulary = s.number("d_model"), s.number("num_heads"), s.number("vocab_size")
    width, f, layers = s.number("d_kv"), s.number("d_ff"), s.number("num_layers")
    gated, _, activation = str(s.get("feed_forward_proj", default=_FEED_FORWARD[kind])).rpartition("-")
    activation = "gelu_new" if gated and activation == "gelu" else activation
    kept = kept_by_activation(activation, f) | ({"activated": f, "up": f} if gated else {})
    stacks = []
    for side, depth in (("encoder", layers), ("decoder", s.number("num_decoder_layers", default=layers))):
        cross = side == "decoder"
        attentions = ["layer.0.SelfAttention", "layer.1.EncDecAttention"][: 1 + cross]
        place = f"layer.{len(attentions)}.DenseReluDense"
        inner = [Linear(f"{place}.{name}", f, d, False, "mlp in") for name in (("wi_0", "wi_1") if gated else ("wi",))]
        mlp = [*inner, Linear(f"{place}.wo", d, f, False, "product" if gated else "activated")]
        # Attention gets the bias by position as a mask, in each block anew.
        masks, once = ((0, heads), heads) if cross else ((heads,), 0)
        block = _block(attentions, ("q", "k", "v", "o"), mlp, heads, heads * width, (d, 1), kept, masks, once)
        stacks.append(Stack(f"{side}.block", block, depth))
    biases = 2 * s.number("relative_attention_num_buckets", default=32) * heads
    # transformers ties the head unless the files hold another one, as those of version 1.1 do.
    own_head = not s.get("tie_word_embeddings", default=True) or not s.get("scale_decoder_outputs", default=True)
    return _shape(kind, stacks, heads, width, d, vocabulary, 10**9, vocabulary * d + biases + 2 * d, not own_head)


def _bart(s: Settings, kind: str) -> ModelShape:
    variant, d, vocabulary = _BARTS[kind], s.number("d_model"), s.number("vocab_size")
    positions, tied = s.number("max_position_embeddings"), bool(s.get("tie_word_embeddings", default=True))
    s.only({"share_encoder_decoder_embeddings": True})
    activation = s.get("activation_function", default="gelu")
    stacks = []
    for side in ("encoder", "decoder"):
        cross = side == "decoder"
        attentions = ["self_attn", "encoder_attn"][: 1 + cross]
        f, heads = s.number(f"{side}_ffn_dim"), s.number(f"{side}_attention_heads")
        mlp = [Linear("fc1", f, d, True, "mlp in"), Linear("fc2", d, f, True, "activated")]
        parts = ("q_proj", "k_proj", "v_proj", "out_proj")
        # A causal attention needs no mask.
        masks = (0, 1) if cross else (1,)
        block = _block(attentions, parts, mlp, heads, d, (2 * d, 2), kept_by_activation(activation, f), masks)
        stacks.append(Stack(f"model.{side}.layers", block, s.number(f"{side}_layers")))
    tables = (1 if tied else 3) * vocabulary
    if variant.positions is not None:
        tables += 2 * (positions + variant.positions)
    heads = s.number("encoder_attention_heads")
    other = tables * d + 2 * variant.norms * 2 * d
    return _shape(kind, stacks, heads, d // heads, d, vocabulary, positions, other, tied)


def _block(
    attentions: Sequence[str],
    parts: Sequence[str],
    mlp: Sequence[Linear],
    heads: int,
    q: int,
    norm: tuple[int, int],
    kept: Mapping[str, int],
    masks: tuple[int, ...],
    mask_of_a_row: int = 0,
) -> Block:
    """A block with a norm to each attention and to the MLP.

    `attentions`: name of its own, and in a decoder of that to the encoder. `parts`: names of query, key, value, output.
    `norm`: its parameters, and the numbers a token that it keeps beside its input. `kept`: what the MLP keeps of a
    token. `masks`: what each attention keeps of a pair of query and key; `mask_of_a_row`: once for all rows.
    """
    d, bias, count = mlp[-1].d, mlp[-1].bias, len(attentions)
    linears: list[Linear] = []
    for place, own, keys, out in zip(
        attentions, ("attention in", "cross in"), ("attention in", SOURCE), ("attended", "cross attended"), strict=False
    ):
        query, key, value, output = (f"{place}.{part}" for part in parts)
        linears += [Linear(query, q, d, bias, own), Linear(key, q, d, bias, keys), Linear(value, q, d, bias, keys)]
        linears.append(Linear(output, d, q, bias, out))
    attention = {"queries": count * q, "keys, values": 2 * q, "attended": q, "log-sums": count * heads}
    norms = {"before norms": (count + 1) * d, "statistics": (count + 1) * norm[1]}
    return Block(
        linears=(*linears, *mlp),
        other=(count + 1) * norm[0],
        kept={**attention, **({"cross attended": q} if count > 1 else {}), **norms, **kept},
        from_input=("attention in",),
        activations=mlp[-1].k,
        kept_by_pair=masks,
        kept_by_pair_of_a_row=mask_of_a_row,
        kept_of_source=2 * q * (count - 1),
    )


def _shape(
    kind: str,
    stacks: Sequence[Stack],
    heads: int,
    width: int,
    d: int,
    vocabulary: int,
    positions: int,
    other: int,
    tied: bool,
) -> ModelShape:
    return ModelShape(
        model_type=kind,
        stacks=tuple(stacks),
        heads=heads,
        head_width=width,
        causal=False,
        attention="padded",
        vocabulary=vocabulary,
        width=d,
        other=other,
        positions=positions,
        head=Linear("lm_head", vocabulary, d, False, "final"),
        head_is_tied=tied,
    )
