"""Blocks with LayerNorm and an MLP of two matrices, of many families; what they keep for the backward pass.

What it is was read from transformers' code; tests compare it with what autograd saves.
"""

from typing import Literal

from rankwise.plan.shape import Attention, Block, Linear


def plain_block(
    names: tuple[str, str, str, str],
    d: int,
    f: int,
    heads: int,
    activation: str,
    key_values: int | None = None,
    bias: bool = True,
    parallel: Literal["no", "two norms", "one norm"] = "no",
    rotary: bool = False,
    attention: Attention = "packed",
) -> Block:
    """A block with LayerNorm, one fused matrix for query, key and value, and an MLP of two matrices.

    `names`: of the fused matrix, the attention's output and both MLP matrices. `parallel`: attention and MLP read the
    same input. Padded attention makes tensors of their own of the three parts; packed attention works on views of the
    fused one, unless it turns queries and keys.
    """
    mlp_reads = {"no": "mlp in", "two norms": "mlp in too", "one norm": "attention in"}[parallel]
    fused = d + 2 * (d if key_values is None else key_values)
    kept = {"residuals": d if parallel != "no" else 2 * d, "statistics": 2 if parallel == "one norm" else 4}
    if attention == "packed":
        kept |= {"fused": fused, "turned": 2 * d if rotary else 0, "attended": d, "log-sums": heads}
    else:
        kept |= {"queries, keys, values": 3 * d}
    if attention == "padded":
        kept |= {"attended": d, "log-sums": heads}
    return Block(
        linears=(
            Linear(names[0], fused, d, bias, "attention in"),
            Linear(names[1], d, d, bias, "attended" if attention == "padded" else "joined"),
            Linear(names[2], f, d, bias, mlp_reads),
            Linear(names[3], d, f, bias, "activated"),
        ),
        other=2 * d if parallel == "one norm" else 4 * d,
        kept=kept | kept_by_activation(activation, f),
        from_input=("attention in",) if parallel == "no" else ("attention in", mlp_reads),
        activations=f,
        kept_by_pair={"packed": (), "padded": (1,), "scores": (heads,)}[attention],
    )


def kept_by_activation(name: str, f: int) -> dict[str, int]:
    """What an activation function keeps; its output is what the next matrix reads."""
    if name == "relu":
        return {"activated": f}
    # Written out in elementary steps, each of which keeps its input.
    return {"before activation": 4 * f if name in ("gelu_new", "gelu_fast") else f}


def apart_block(names: tuple[str, ...], d: int, f: int, heads: int, norms: dict[str, int], activation: str) -> Block:
    """A block with query, key and value in matrices of their own, all with biases, LayerNorm and packed attention."""
    reads = (*["attention in"] * 3, "joined", "mlp in", "activated")
    sizes = [(d, d)] * 4 + [(f, d), (d, f)]
    parts = zip(names, sizes, reads, strict=True)
    kept = {"queries": d, "keys": d, "values": d, "attended": d, "log-sums": heads, "statistics": 4}
    return Block(
        linears=tuple(Linear(name, *size, True, tensor) for name, size, tensor in parts),
        other=4 * d,
        kept={**kept, **norms, **kept_by_activation(activation, f)},
        from_input=("attention in",),
        activations=f,
    )
