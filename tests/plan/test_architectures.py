"""A plan's matrices, totals and kept tensors against what inject_ and autograd say of real (small, random) models."""

from collections import Counter
from dataclasses import fields, replace
from functools import partial
from itertools import product

import pytest
import torch
import transformers
from conftest import numbers_kept
from transformers import AutoConfig

import rankwise
from rankwise.data.examples import TextExample
from rankwise.data.labelled import LabelExample, TagExample
from rankwise.data.pairs import PairExample
from rankwise.data.shapes import TASK_TYPES
from rankwise.engine.tasks import engine_for
from rankwise.errors import TargetError
from rankwise.lora.config import LoraConfig
from rankwise.plan.architectures import _FAMILIES, TAGGERS, read_shape
from rankwise.plan.llama import LLAMAS
from rankwise.plan.workload import unshared_batch

SMALL = {
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "head_dim": 12,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim", "n_inner"), 56),
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CAUSAL = [
    ("llama", "LlamaForCausalLM", {}),
    ("llama", "LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("mistral", "MistralForCausalLM", {}),
    ("ministral", "MinistralForCausalLM", {"layer_types": None}),
    ("qwen2", "Qwen2ForCausalLM", {}),
    ("qwen3", "Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    ("smollm3", "SmolLM3ForCausalLM", {}),
    ("gemma", "GemmaForCausalLM", {}),
    ("gemma3_text", "Gemma3ForCausalLM", {}),
    ("phi3", "Phi3ForCausalLM", {}),
    ("granite", "GraniteForCausalLM", {}),
    ("olmo", "OlmoForCausalLM", {}),
    ("olmo2", "Olmo2ForCausalLM", {}),
    ("olmo3", "Olmo3ForCausalLM", {}),
    ("gpt2", "GPT2LMHeadModel", {}),
    ("gpt2", "GPT2LMHeadModel", {"n_inner": None, "activation_function": "gelu"}),
    ("gpt_neox", "GPTNeoXForCausalLM", {}),
    ("gpt_neox", "GPTNeoXForCausalLM", {"use_parallel_residual": False}),
    ("gpt_neox", "GPTNeoXForCausalLM", {"attention_bias": False}),
    ("bloom", "BloomForCausalLM", {}),
    ("opt", "OPTForCausalLM", {}),
    ("opt", "OPTForCausalLM", {"word_embed_proj_dim": 16, "activation_function": "gelu"}),
    ("falcon", "FalconForCausalLM", {}),
    ("falcon", "FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    ("falcon", "FalconForCausalLM", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
]
ENCODERS = [
    ("bert", "BertForSequenceClassification", {}),
    ("roberta", "RobertaForSequenceClassification", {}),
    ("xlm-roberta", "XLMRobertaForSequenceClassification", {"type_vocab_size": 1}),
    ("camembert", "CamembertForSequenceClassification", {}),
    ("distilbert", "DistilBertForSequenceClassification", {}),
]
DECODERS_AS_CLASSIFIERS = [
    ("llama", "LlamaForSequenceClassification", {}),
    ("gpt2", "GPT2ForSequenceClassification", {}),
    ("gpt_neox", "GPTNeoXForSequenceClassification", {}),
    ("opt", "OPTForSequenceClassification", {}),
    ("bloom", "BloomForSequenceClassification", {}),
    ("falcon", "FalconForSequenceClassification", {}),
]
TAGGERS_OF = [(kind, name.replace("Sequence", "Token"), other) for kind, name, other in ENCODERS]
TAGGERS_OF += [
    (kind, name.replace("CausalLM", "TokenClassification"), {})
    for kind, name, _ in dict.fromkeys(
        (kind, name.replace("LMHeadModel", "ForCausalLM"), "") for kind, name, _ in CAUSAL if kind in TAGGERS
    )
]
BODIES = [
    (
        kind,
        name.replace("ForSequenceClassification", "Model").replace("LMHead", "").replace("ForCausalLM", "Model"),
        other,
    )
    for kind, name, other in (*ENCODERS, *CAUSAL)
    if kind != "gemma3_text"
]
BODIES.append(("gemma3_text", "Gemma3TextModel", {}))
PLAIN = [("causal_lm", *entry) for entry in CAUSAL] + [("seq_cls", *entry) for entry in ENCODERS]
PLAIN += [("token_cls", *entry) for entry in TAGGERS_OF]
PLAIN += [("embedding", *entry) for entry in BODIES]
ALL = PLAIN + [("seq_cls", *entry) for entry in DECODERS_AS_CLASSIFIERS]
ARGUMENTS = ("task", "kind", "class_name", "other")


def named(value):
    return str(value) if value else ""


def build(kind, class_name, other, layers, folder):
    """A small random model, and the folder with its config.json."""
    config_class = type(AutoConfig.for_model(kind))
    known = {field.name for field in fields(config_class)}
    wanted = {**SMALL, "num_hidden_layers": layers, **other}
    named = {key if key in known else config_class.attribute_map.get(key, key): value for key, value in wanted.items()}
    config = config_class(**{key: value for key, value in named.items() if key in known})
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config).eval()
    config.save_pretrained(folder)
    return model


def lora_for(task, **settings):
    return LoraConfig(r=3, task_type=TASK_TYPES[task], **settings)


def without_pooler(lora, model):
    """Of a body by itself, which embeds texts and does not pass its pooler."""
    return replace(lora, exclude_modules=["pooler.dense"]) if hasattr(model, "pooler") else lora


def kinds(report):
    """How often each kind of matrix occurs: (last part of the name, d, k, r)."""
    return Counter((m.name.rpartition(".")[2], m.d, m.k, m.r) for m in report.matrices)


@pytest.mark.parametrize(ARGUMENTS, ALL, ids=named)
def test_matrices_and_parameters_are_those_that_inject_reports(task, kind, class_name, other, tmp_path):
    model = build(kind, class_name, other, 2, tmp_path)
    planned = read_shape(tmp_path, task).adapted(lora_for(task))
    found = rankwise.inject_(model, without_pooler(lora_for(task), model))
    assert kinds(planned) == kinds(found)
    assert {m.name for m in planned.matrices} == {m.name for m in found.matrices}
    assert planned.total_parameters == found.total_parameters
    assert planned.trainable_parameters == found.trainable_parameters


def test_decoders_that_transformers_has_token_classifiers_of_are_known():
    there = transformers.AutoModelForTokenClassification._model_mapping
    assert {kind for kind in (*LLAMAS, *_FAMILIES) if type(AutoConfig.for_model(kind)) in there} == set(TAGGERS)


@pytest.mark.parametrize(ARGUMENTS, [("seq_cls", *entry) for entry in ENCODERS], ids=named)
def test_an_encoder_takes_rows_of_as_many_tokens_as_planned(task, kind, class_name, other, tmp_path):
    model = build(kind, class_name, {**other, "pad_token_id": 1}, 1, tmp_path)
    most = read_shape(tmp_path, task).positions
    model(torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, most + 1), 5))


@pytest.mark.parametrize("dora", [False, True])
def test_magnitudes_are_those_that_inject_reports(dora, tmp_path):
    model = build("llama", "LlamaForCausalLM", {}, 2, tmp_path)
    lora = lora_for("causal_lm", use_dora=dora)
    planned, found = read_shape(tmp_path, "causal_lm").adapted(lora), rankwise.inject_(model, lora)
    assert planned.extra == found.extra
    assert planned.trainable_parameters == found.trainable_parameters


def kept_numbers(task, kind, class_name, other, layers, folder, lora):
    """(numbers that autograd keeps for a batch, the batch's tokens as the engine runs them, whether it packs)."""
    model = build(kind, class_name, other, layers, folder)
    rankwise.inject_(model, without_pooler(lora, model))
    generator = torch.Generator().manual_seed(0)
    rows = [tuple(torch.randint(4, 90, (length,), generator=generator).tolist()) for length in (20, 28)]
    if task == "seq_cls":
        examples = [LabelExample(row, 0, "") for row in rows]
    elif task == "embedding":
        examples = [PairExample(*rows, (), "")]
    elif task == "token_cls":
        examples = [TagExample(row, (1, 4, 9), (0, 1, 0), "") for row in rows]
    else:
        examples = [TextExample(row, (False,) * (len(row) - 4) + (True,) * 4, "") for row in rows]
    engine = engine_for(task, model, 0, examples)
    return numbers_kept(engine, examples), 48 if engine.packs else 56, engine.packs


@pytest.mark.parametrize(ARGUMENTS, PLAIN, ids=named)
def test_a_block_keeps_what_autograd_saves(task, kind, class_name, other, tmp_path, monkeypatch):
    # Long streams count, which have no attention in one call.
    monkeypatch.setattr("rankwise.engine.attention._ONE_CALL", 0)
    attention_outputs = ("o_proj", "c_proj", "dense", "out_proj", "out_lin")
    shape = read_shape(_config(kind, class_name, other, tmp_path), task)
    for targets, dora in product(("all-linear", rf".*\.({'|'.join(attention_outputs)})"), (False, True)):
        lora = lora_for(task, target_modules=targets, use_dora=dora)
        (two, tokens, packs), (three, _, _) = (
            kept_numbers(task, kind, class_name, other, layers, tmp_path, lora) for layers in (2, 3)
        )
        assert packs == (shape.attention == "packed")
        ranks = {m.name: m.r for m in shape.adapted(lora).matrices}
        [run] = unshared_batch([20, 28], 4, packs).runs
        assert run.computed == tokens
        assert three - two == shape.stacks[0].kept_in_block(ranks, 1, run, dora)


def _config(kind, class_name, other, folder):
    build(kind, class_name, other, 2, folder)
    return folder


def test_a_model_of_vectors_has_no_layer_to_adapt_as_inject_says(tmp_path):
    config = AutoConfig.for_model(
        "llama",
        hidden_size=1,
        intermediate_size=1,
        num_attention_heads=1,
        head_dim=1,
        num_hidden_layers=1,
        vocab_size=9,
    )
    config.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for adapted in (
        partial(read_shape(tmp_path, "causal_lm").adapted, LoraConfig(r=1)),
        partial(rankwise.inject_, model, LoraConfig(r=1)),
    ):
        with pytest.raises(TargetError, match="has no linear layer to adapt"):
            adapted()
