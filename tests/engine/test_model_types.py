"""The engine on many types of models, against the definition: each example by itself, with the plain forward pass."""

import random

import pytest
import torch
from conftest import TOKENS, randomise_adapter
from test_engine import assert_same, conversations, gradients, reference_loss
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rankwise import LoraConfig, activate_, inject_
from rankwise.data.labelled import LabelExample
from rankwise.engine.classifiers import ClassifierEngine
from rankwise.engine.language import LanguageEngine
from rankwise.lora.inject import DEFAULT_ADAPTER, trainable_parameters

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "ffn_dim": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, **TOKENS,
    "pad_token_id": 0,
}  # fmt: skip
CAUSAL = {
    "bloom": {}, "cohere": {}, "falcon": {"alibi": False}, "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 6, "attn_logit_softcapping": 0.5},
    "gpt2": {}, "gpt_neox": {}, "granite": {"logits_scaling": 3.0}, "helium": {}, "llama": {}, "mistral": {},
    "nemotron": {}, "olmo": {}, "olmo2": {}, "opt": {"word_embed_proj_dim": 32}, "phi": {}, "phi3": {}, "qwen2": {},
    "qwen3": {}, "smollm3": {}, "stablelm": {}, "starcoder2": {},
}  # fmt: skip
CLASSIFIERS = {"bert": {}, "roberta": {}, "distilbert": {}, "electra": {}, "deberta-v2": {}, "modernbert": {}}
# Types that the packed path must serve; the others may take the padded one, and must say why.
PACKED = {
    "gemma",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "olmo",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "qwen2",
}
PACKED |= {"qwen3", "smollm3", "starcoder2", "cohere", "helium", "bert", "roberta", "electra"}


pytestmark = pytest.mark.usefixtures("in_fp64", "attention_each_way")


def build(auto, kind, overrides, r, **more):
    fields = type(AutoConfig.for_model(kind))().to_dict().keys()
    attributes = AutoConfig.for_model(kind).attribute_map
    small = {attributes.get(key, key): value for key, value in SMALL.items() if attributes.get(key, key) in fields}
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **{**small, **overrides, **more})).double().eval()
    inject_(model, LoraConfig(r=r, task_type="SEQ_CLS" if more else "CAUSAL_LM"))
    randomise_adapter(model)
    return model


@pytest.mark.parametrize("kind", CAUSAL)
def test_loss_and_gradients_of_conversations_are_those_of_each_by_itself(kind):
    for seed, common, r in ((0, 0, 1), (1, 18, 5)):
        model = build(AutoModelForCausalLM, kind, CAUSAL[kind], r)
        examples = conversations(5, common, seed)
        engine = LanguageEngine(model, 0, examples)
        assert engine.packs or (kind not in PACKED and engine.padded_because), engine.padded_because
        assert engine.head_unchunked_because is None, engine.head_unchunked_because
        assert_same(engine, examples, reference_loss(model, examples))


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_loss_and_gradients_of_texts_are_those_of_each_by_itself(kind):
    model = build(AutoModelForSequenceClassification, kind, CLASSIFIERS[kind], 3, num_labels=4)
    draw = random.Random(0)
    texts = [
        LabelExample(tuple(draw.randrange(3, 96) for _ in range(draw.randrange(3, 12))), draw.randrange(4), "here")
        for _ in range(6)
    ]
    engine = ClassifierEngine(model, 0, texts)
    assert engine.packs or (kind not in PACKED and engine.padded_because), engine.padded_because
    logits, labels = torch.cat([model(torch.tensor([text.ids])).logits for text in texts]), [t.label for t in texts]
    assert_same(engine, texts, F.cross_entropy(logits, torch.tensor(labels)))
    smoothed = F.cross_entropy(logits, torch.tensor(labels), label_smoothing=0.1)
    torch.testing.assert_close(engine.loss(texts, 0.1), smoothed, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", sorted(PACKED))
def test_adapters_that_share_a_pass_have_the_losses_and_gradients_of_each_by_itself(kind):
    labels = kind in CLASSIFIERS
    auto = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    model = build(auto, kind, {**CAUSAL, **CLASSIFIERS}[kind], 3, **({"num_labels": 4} if labels else {}))
    inject_(model, LoraConfig(r=2, task_type="SEQ_CLS" if labels else "CAUSAL_LM"), adapter="other")
    randomise_adapter(model, seed=2)
    rows = [LabelExample((5, 7, 9 + n), n % 4, "here") for n in range(5)] if labels else conversations(5, 18, 1)
    engine = (ClassifierEngine if labels else LanguageEngine)(model, 0, rows)
    batches = {DEFAULT_ADAPTER: rows[:3], "other": rows[2:]}
    own = []
    for adapter in batches:
        activate_(model, adapter)
        own.append(trainable_parameters(model))
    ours = engine.losses_by_adapter(batches)
    gradients_of_ours = torch.autograd.grad(sum(ours), [*own[0], *own[1]])
    for adapter, loss, parameters in zip(batches, ours, own, strict=True):
        activate_(model, adapter)
        alone = engine.loss(batches[adapter])
        torch.testing.assert_close(loss, alone, rtol=1e-10, atol=0)
        part, gradients_of_ours = gradients_of_ours[: len(parameters)], gradients_of_ours[len(parameters) :]
        expected = gradients(model, alone)
        difference = torch.cat([gradient.flatten() for gradient in part]) - expected
        assert difference.abs().max() <= 1e-10 * expected.abs().max()
