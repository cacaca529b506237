"""A base kept in bf16 computes what the model with those bf16 weights widened for good computes, on every path."""

import copy
import random

import pytest
import torch
from conftest import randomise_adapter, tiny
from test_engine import conversations, gradients
from test_model_types import CAUSAL, CLASSIFIERS, build
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rankwise
from rankwise import LoraConfig, inject_
from rankwise.data.examples import Prompt
from rankwise.data.labelled import LabelExample
from rankwise.engine.classifiers import ClassifierEngine
from rankwise.engine.generate import generate
from rankwise.engine.language import LanguageEngine
from rankwise.lora import frozen_product
from rankwise.lora.narrow import NarrowEmbedding, NarrowLinear, compute_in_, is_narrow
from rankwise.models.load import base_sha256, load_model


def narrow_and_wide(plain, dtype, widened=()):
    """The model with its weights rounded to bf16, once kept as they are and once widened."""
    narrow = copy.deepcopy(plain)
    for parameter in narrow.parameters():
        parameter.data = parameter.data.bfloat16()
    wide = copy.deepcopy(narrow)
    for parameter in wide.parameters():
        parameter.data = parameter.data.to(dtype)
    compute_in_(narrow, dtype, widened)
    return narrow, wide


def adapted(models, **config):
    for model in models:
        inject_(model, LoraConfig(r=3, **config))
        randomise_adapter(model)
    return models


@pytest.mark.usefixtures("in_fp64")
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("kind", CAUSAL)
def test_loss_and_gradients_on_conversations_are_those_of_the_widened_model(kind, pack, monkeypatch):
    monkeypatch.setattr(frozen_product, "_PIECE", 300)
    plain = build(AutoModelForCausalLM, kind, CAUSAL[kind], 1)
    rankwise.eject_(plain)
    examples = conversations(5, 18, 1)
    losses, found = [], []
    for model in adapted(narrow_and_wide(plain, torch.float64)):
        engine = LanguageEngine(model, 0, examples)
        assert engine.head_unchunked_because is None, engine.head_unchunked_because
        engine.packs = engine.packs and pack
        losses.append(engine.loss(examples))
        found.append(gradients(model, losses[-1]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0)
    assert (found[0] - found[1]).abs().max() <= 1e-10 * found[1].abs().max()


@pytest.mark.usefixtures("in_fp64")
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_loss_and_gradients_on_texts_are_those_of_the_widened_model(kind):
    plain = build(AutoModelForSequenceClassification, kind, CLASSIFIERS[kind], 3, num_labels=4)
    rankwise.eject_(plain)
    draw = random.Random(0)
    texts = [LabelExample(tuple(draw.randrange(3, 96) for _ in range(9)), draw.randrange(4), "") for _ in range(4)]
    losses, found = [], []
    for model in adapted(narrow_and_wide(plain, torch.float64, ("classifier",)), task_type="SEQ_CLS"):
        losses.append(ClassifierEngine(model, 0, texts).loss(texts))
        found.append(gradients(model, losses[-1]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0)
    assert (found[0] - found[1]).abs().max() <= 1e-10 * found[1].abs().max()


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"lora_dropout": 0.3}, {"init_lora_weights": "pissa"}])
def test_other_kinds_of_updates_see_the_widened_weight(variant):
    models = narrow_and_wide(tiny("qwen2"), torch.float32)
    found = []
    for model in models:
        torch.manual_seed(3)
        inject_(model, LoraConfig(r=3, **variant))
        randomise_adapter(model)
        rankwise.lora.inject.set_adapter_training(model, True)
        found.append(gradients(model, LanguageEngine(model, 2, conversations(3, 0)).loss(conversations(3, 0))))
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[1].abs().max()


def test_what_is_loaded_in_bf16_keeps_the_file_s_ties_and_widens_norms_and_heads(tmp_path):
    tiny("llama-tied").save_pretrained(tmp_path / "causal")
    model = load_model(str(tmp_path / "causal"), "causal_lm", base_dtype="bf16")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for module in model.modules():
        own = [p.dtype for p in module.parameters(recurse=False)]
        assert (
            own == [torch.bfloat16]
            if isinstance(module, NarrowLinear | NarrowEmbedding)
            else set(own) <= {torch.float32}
        )
    wide = load_model(str(tmp_path / "causal"), "causal_lm")
    for parameter in wide.parameters():
        parameter.data = parameter.data.bfloat16().float()
    ids = torch.arange(9)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, wide(input_ids=ids).logits)
    tiny("bert").save_pretrained(tmp_path / "texts")
    classifier = load_model(str(tmp_path / "texts"), "seq_cls", list("abcde"), base_dtype="bf16")
    assert type(classifier.classifier) is torch.nn.Linear
    assert classifier.classifier.weight.dtype == torch.float32
    assert is_narrow(classifier)
    assert not is_narrow(wide)


def test_merging_rounds_once_and_going_back_gives_the_very_bits():
    [model] = adapted(narrow_and_wide(tiny("llama-tied"), torch.float32)[:1])
    before = base_sha256(model)
    layer = model.model.layers[0].mlp.gate_proj
    weight, update = layer.base.weight.detach().clone(), layer.update("default")
    exact = weight.double() + update.scale * update.lora_B.double() @ update.lora_A.double()
    rankwise.merge_(model)
    assert torch.equal(layer.base.weight, exact.bfloat16())
    rankwise.unmerge_(model)
    assert torch.equal(layer.base.weight, weight)
    assert base_sha256(model) == before


def test_the_adapter_is_saved_in_fp32_and_fits_the_plain_model(tmp_path):
    narrow, wide = narrow_and_wide(tiny("llama"), torch.float32)
    adapted([narrow])
    rankwise.save_adapter(narrow, tmp_path / "adapter")
    rankwise.load_adapter_(wide, tmp_path / "adapter")
    assert {p.dtype for p in rankwise.trainable_parameters(narrow)} == {torch.float32}
    ids = torch.arange(9)[None]
    torch.testing.assert_close(narrow(input_ids=ids).logits, wide(input_ids=ids).logits)


def test_answers_come_from_the_adapter_beside_the_weights_and_not_from_rounded_sums(tiny_llama_folder, tokenizer):
    plain = load_model(str(tiny_llama_folder), "causal_lm")
    narrow, wide = adapted(narrow_and_wide(plain, torch.float32))
    prompts = [Prompt(tuple(range(5, 20 + n)), None) for n in range(3)]
    assert generate(narrow, tokenizer, prompts, 8) == generate(wide, tokenizer, prompts, 8)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_products_by_pieces_are_those_of_the_whole_weight(rows, bias, monkeypatch):
    monkeypatch.setattr(frozen_product, "_PIECE", 25)
    torch.manual_seed(0)
    weight, x = torch.randn(13, 11).bfloat16(), torch.randn(2, rows, 11, dtype=torch.float64)
    offset = torch.randn(13, dtype=torch.float64) if bias else None
    wide, gradient = weight.double(), torch.randn(rows, 13, dtype=torch.float64)
    expected = torch.nn.functional.linear(x, wide, offset)
    torch.testing.assert_close(frozen_product.frozen_linear(x, weight, offset), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(frozen_product.frozen_product(gradient, weight), gradient @ wide, rtol=1e-12, atol=1e-12)
