"""From a config.json to a ModelShape: the architectures that a plan knows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rankwise.errors import ModelError, nearest
from rankwise.plan.blocks import apart_block, plain_block
from rankwise.plan.encoder_decoder import ENCODER_DECODERS, encoder_decoder
from rankwise.plan.llama import LLAMAS, llama_block
from rankwise.plan.settings import Settings, read_settings
from rankwise.plan.shape import Attention, Block, Linear, ModelShape, Stack

ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert")
_LANGUAGE = {"causal_lm": "causal language model", "seq2seq_lm": "sequence-to-sequence model"}
"""Tasks of models that write, and what such a model is called."""
TAGGERS = {
    **dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "gemma", "phi3"), "score"),
    **dict.fromkeys(("gpt2", "gpt_neox", "bloom", "falcon"), "classifier"),
}
"""Decoders that transformers has token classifiers of, and the name of their head."""


def read_shape(source: Path | str, task: str, labels: int = 2) -> ModelShape:
    """The shape of a model for `task`; a classifier ("seq_cls", "token_cls") has so many labels.

    `source` is a config.json, a folder that holds one, or the name of a published model (settings.PUBLISHED).
    Raises ModelError for an architecture that is not known and for a file that lacks what is needed.
    """
    settings = read_settings(source)
    kind = str(settings.get("model_type", default="none"))
    known = [*LLAMAS, *_FAMILIES, *ENCODERS, *ENCODER_DECODERS]
    if kind not in known:
        raise ModelError(
            f"{settings.place} is of model_type {kind!r}, whose matrices a plan does not know{nearest(kind, known)}; "
            f"known: {', '.join(known)}"
        )
    _check_task(kind, task)
    shape = _whole(settings, kind, task, labels)
    settings.check()
    if task == "embedding":
        return _embedding(shape)
    if kind in ENCODERS or task in _LANGUAGE:
        return shape
    of_texts = task == "seq_cls"
    head = Linear("score" if of_texts else TAGGERS[kind], labels, shape.head.k, not of_texts, "final")
    return replace(shape, head=head, head_is_tied=False, of_texts=of_texts)


def _check_task(kind: str, task: str) -> None:
    """Raise ModelError for a task that models of this kind do not have."""
    if kind in ENCODER_DECODERS:
        if task != "seq2seq_lm":
            raise ModelError(f"a {kind} model has an encoder and a decoder; plan it with --task seq2seq_lm")
        return
    tasks = ["causal_lm"] * (kind not in ENCODERS) + ["seq_cls", "token_cls", "embedding"]
    if task in _LANGUAGE and task not in tasks:
        known = f"{', '.join(tasks[:-1])} or {tasks[-1]}"
        raise ModelError(f"a {kind} model is no {_LANGUAGE[task]}; plan it with --task {known}")
    if task == "token_cls" and kind not in (*ENCODERS, *TAGGERS):
        raise ModelError(
            f"transformers has no token classifier for {kind}; it has for {', '.join((*ENCODERS, *TAGGERS))}"
        )


def _whole(s: Settings, kind: str, task: str, labels: int) -> ModelShape:
    """With the head that its own kind of model has."""
    if kind in LLAMAS:
        return _llama(s, kind)
    if kind in ENCODER_DECODERS:
        return encoder_decoder(s, kind)
    return _encoder(s, kind, task, labels) if kind in ENCODERS else _FAMILIES[kind](s, kind)


def _embedding(shape: ModelShape) -> ModelShape:
    """The body of a model, without a head and with the names that it has by itself."""

    def own(name: str) -> str:
        return name.partition(".")[2]

    # An encoder's pooler is there, but embeddings do not pass it.
    poolers = [linear for linear in shape.outside if linear.reads == "first token" and shape.model_type != "distilbert"]
    outside = tuple(replace(linear, name=own(linear.name)) for linear in shape.outside if linear.reads != "first token")
    return replace(
        shape,
        stacks=tuple(replace(stack, path=own(stack.path)) for stack in shape.stacks),
        other=shape.other + sum(linear.parameters for linear in poolers),
        head=Linear("", 0, shape.width, False, "final"),
        head_is_tied=True,
        outside=outside,
        of_texts=True,
    )


def _decoder(
    s: Settings,
    kind: str,
    path: str,
    block: Block,
    layers: int,
    heads: int,
    other: int,
    tied: bool,
) -> ModelShape:
    """A causal model with packed attention; `other` is what lies outside of the blocks beside the table of tokens."""
    d = s.number("hidden_size", "n_embd", "n_embed")
    vocabulary, table_width = s.number("vocab_size"), s.number("word_embed_proj_dim", default=d)
    return ModelShape(
        model_type=kind,
        stacks=(Stack(path, block, layers),),
        heads=heads,
        head_width=d // heads,
        causal=True,
        attention="packed",
        vocabulary=vocabulary,
        width=d,
        positions=s.number("max_position_embeddings", "n_positions", default=10**9),
        other=vocabulary * table_width + other,
        head=Linear("lm_head", vocabulary, table_width, False, "final"),
        head_is_tied=bool(s.get("tie_word_embeddings", default=tied)),
    )


def _llama(s: Settings, kind: str) -> ModelShape:
    variant = LLAMAS[kind]
    d, heads = s.number("hidden_size"), s.number("num_attention_heads")
    width = s.number("head_dim", default=variant.head_width or d // heads)
    block = llama_block(s, variant, d, heads, width)
    final_norm = d if variant.norms_have_weights else 0
    layers = s.number("num_hidden_layers")
    shape = _decoder(s, kind, "model.layers", block, layers, heads, final_norm, variant.tied)
    return replace(shape, head_width=width)


def _gpt2(s: Settings, kind: str) -> ModelShape:
    d, heads = s.number("n_embd", "hidden_size"), s.number("n_head", "num_attention_heads")
    s.only({"add_cross_attention": False})
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    f = s.number("n_inner", default=4 * d)
    block = plain_block(names, d, f, heads, s.get("activation_function", default="gelu_new"))
    positions = s.number("n_positions", "max_position_embeddings") * d
    layers = s.number("n_layer", "num_hidden_layers")
    return _decoder(s, kind, "transformer.h", block, layers, heads, positions + 2 * d, tied=True)


_DENSE = ("dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


def _gpt_neox(s: Settings, kind: str) -> ModelShape:
    d, heads = s.number("hidden_size"), s.number("num_attention_heads")
    names = ("attention.query_key_value", f"attention.{_DENSE[0]}", *_DENSE[1:])
    parallel = "two norms" if s.get("use_parallel_residual", default=True) else "no"
    f, activation = s.number("intermediate_size"), s.get("hidden_act", default="gelu")
    block = plain_block(names, d, f, heads, activation, parallel=parallel, rotary=True)
    if not s.get("attention_bias", default=True):
        *attention, up, down = block.linears  # The MLP has its biases all the same.
        block = replace(block, linears=(*(replace(linear, bias=False) for linear in attention), up, down))
    layers = s.number("num_hidden_layers")
    return _decoder(s, kind, "gpt_neox.layers", block, layers, heads, 2 * d, tied=False)


def _bloom(s: Settings, kind: str) -> ModelShape:
    d, heads = s.number("hidden_size", "n_embed"), s.number("n_head", "num_attention_heads")
    names = ("self_attention.query_key_value", f"self_attention.{_DENSE[0]}", *_DENSE[1:])
    block = plain_block(names, d, 4 * d, heads, "gelu", attention="scores")
    layers = s.number("n_layer", "num_hidden_layers")
    return replace(_decoder(s, kind, "transformer.h", block, layers, heads, 4 * d, tied=True), attention="scores")


def _falcon(s: Settings, kind: str) -> ModelShape:
    d = s.number("hidden_size")
    heads, layers = s.number("num_attention_heads", "n_head"), s.number("num_hidden_layers", "n_layer")
    new = bool(s.get("new_decoder_architecture", default=False))
    s.only({"alibi": False, **({} if new else {"multi_query": True, "parallel_attn": True})})
    names = ("self_attention.query_key_value", f"self_attention.{_DENSE[0]}", *_DENSE[1:])
    groups = s.number("num_kv_heads", "n_head_kv", default=heads) if new else 1
    two_norms = new and s.get("num_ln_in_parallel_attn", default=2) == 2
    # Keys and values of one head for all are no case for PyTorch's fused attention.
    attention: Attention = "padded" if new else "scores"
    block = plain_block(
        names,
        d,
        s.number("ffn_hidden_size", default=4 * d),
        heads,
        s.get("activation", default="gelu"),
        groups * (d // heads),
        bias=bool(s.get("bias", default=False)),
        parallel="two norms" if two_norms else "one norm",
        attention=attention,
    )
    return replace(_decoder(s, kind, "transformer.h", block, layers, heads, 2 * d, tied=True), attention=attention)


def _opt(s: Settings, kind: str) -> ModelShape:
    d, heads = s.number("hidden_size"), s.number("num_attention_heads")
    s.only(dict.fromkeys(("enable_bias", "layer_norm_elementwise_affine", "do_layer_norm_before"), True))
    names = (*(f"self_attn.{part}_proj" for part in ("k", "v", "q", "out")), "fc1", "fc2")
    activation = s.get("activation_function", default="relu")
    f = s.number("ffn_dim")
    block = apart_block(names, d, f, heads, {"residuals": 2 * d}, activation)
    narrow, layers = s.number("word_embed_proj_dim", default=d), s.number("num_hidden_layers")
    ends = (("project_in", d, narrow), ("project_out", narrow, d)) if narrow != d else ()
    outside = tuple(Linear(f"model.decoder.{name}", rows, columns, False, name) for name, rows, columns in ends)
    # Positions begin at 2.
    other = (s.number("max_position_embeddings") + 2) * d + 2 * d
    return replace(_decoder(s, kind, "model.decoder.layers", block, layers, heads, other, tied=True), outside=outside)


def _encoder(s: Settings, kind: str, task: str, labels: int) -> ModelShape:
    distil, bert, of_texts = kind == "distilbert", kind == "bert", task in ("seq_cls", "embedding")
    roberta = not distil and not bert
    d, heads = s.number("hidden_size", "dim"), s.number("num_attention_heads", "n_heads")
    f = s.number("intermediate_size", "hidden_dim")
    names = tuple(f"attention.self.{part}" for part in ("query", "key", "value"))
    names = (*names, "attention.output.dense", "intermediate.dense", "output.dense")
    if distil:
        names = (*(f"attention.{part}_lin" for part in ("q", "k", "v", "out")), "ffn.lin1", "ffn.lin2")
    activation = s.get("hidden_act", "activation", default="gelu")
    norms = {"before norms": 2 * d}
    block = apart_block(names, d, f, heads, norms, activation)
    first = "pre_classifier" if distil else "bert.pooler.dense" if bert else "classifier.dense"
    vocabulary = s.number("vocab_size")
    types = 0 if distil else s.number("type_vocab_size", default=2)
    paths = {"bert": "bert.encoder.layer", "distilbert": "distilbert.transformer.layer"}
    return ModelShape(
        model_type=kind,
        stacks=(Stack(paths.get(kind, "roberta.encoder.layer"), block, s.number("num_hidden_layers", "n_layers")),),
        heads=heads,
        head_width=d // heads,
        causal=False,
        attention="packed",
        vocabulary=vocabulary,
        width=d,
        # RoBERTa's positions begin at 2.
        positions=s.number("max_position_embeddings") - 2 * roberta,
        other=(vocabulary + types + s.number("max_position_embeddings")) * d + 2 * d,
        head=Linear("classifier.out_proj" if of_texts and roberta else "classifier", labels, d, True, "final"),
        head_is_tied=False,
        outside=(Linear(first, d, d, True, "first token"),) if of_texts else (),
        of_texts=of_texts,
    )


_FAMILIES: dict[str, Callable[[Settings, str], ModelShape]] = {
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
    "opt": _opt,
    "falcon": _falcon,
}
