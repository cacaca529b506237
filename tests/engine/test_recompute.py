"""Activations that are computed again give the very bits of those that are kept."""

import random

import pytest
import torch
from conftest import randomise_adapter, tiny
from test_engine import adapted, conversations, gradients, reference_loss
from test_model_types import CAUSAL, CLASSIFIERS, build
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rankwise import LoraConfig, inject_
from rankwise.data.labelled import LabelExample
from rankwise.engine.blocks import blocks_of
from rankwise.engine.classifiers import ClassifierEngine
from rankwise.engine.language import LanguageEngine
from rankwise.lora.inject import set_adapter_training
from rankwise.lora.prepared import shared_inputs


def kept_bytes(engine, examples):
    """Bytes of all that the backward pass finds kept, weights left out."""
    weights = {p.data_ptr() for p in engine.model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        engine.loss(examples)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def both_ways(engine, examples):
    results = []
    for engine.recomputes in (False, True):
        torch.manual_seed(0)
        loss = engine.loss(examples)
        results.append((loss, gradients(engine.model, loss)))
    return results


@pytest.mark.usefixtures("in_fp64")
@pytest.mark.parametrize("kind", CAUSAL)
def test_loss_and_gradients_on_conversations_keep_their_bits(kind):
    model = build(AutoModelForCausalLM, kind, {**CAUSAL[kind], "num_hidden_layers": 3}, 2)
    examples = conversations(5, 18, 1)
    engine = LanguageEngine(model, 0, examples)
    (loss, gradient), (again, gradient_again) = both_ways(engine, examples)
    assert torch.equal(loss, again)
    assert torch.equal(gradient, gradient_again)
    expected = reference_loss(model, examples)
    theirs = gradients(model, expected)
    torch.testing.assert_close(again, expected, rtol=1e-10, atol=0)
    assert (gradient_again - theirs).abs().max() <= 1e-10 * theirs.abs().max()
    assert kept_bytes(engine, examples) < 0.7 * kept_bytes_without(engine, examples)


def kept_bytes_without(engine, examples):
    engine.recomputes = False
    return kept_bytes(engine, examples)


@pytest.mark.usefixtures("in_fp64")
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_loss_and_gradients_on_texts_keep_their_bits(kind):
    model = build(AutoModelForSequenceClassification, kind, CLASSIFIERS[kind], 3, num_labels=4)
    draw = random.Random(0)
    texts = [LabelExample(tuple(draw.randrange(3, 96) for _ in range(9)), draw.randrange(4), "") for _ in range(4)]
    (loss, gradient), (again, gradient_again) = both_ways(ClassifierEngine(model, 0, texts), texts)
    assert torch.equal(loss, again)
    assert torch.equal(gradient, gradient_again)


def test_dropout_drops_the_same_numbers_again_and_layers_that_share_their_input_do_so_again():
    model, examples = tiny("llama"), conversations(5, 18)
    inject_(model, LoraConfig(r=4, lora_dropout=0.4, target_modules=["v_proj", "down_proj"]))
    inject_(model, LoraConfig(r=4), adapter="plain")
    randomise_adapter(model)
    engine = LanguageEngine(model, 2, examples)
    with shared_inputs(model, lambda: engine.logits(examples)):
        (_, gradient), (_, again) = both_ways(engine, examples)
    assert torch.equal(gradient, again)
    dropping = tiny("llama")
    inject_(dropping, LoraConfig(r=4, lora_dropout=0.4))
    randomise_adapter(dropping)
    set_adapter_training(dropping, True)
    (loss, gradient), (_, again) = both_ways(LanguageEngine(dropping, 2, examples), examples)
    assert torch.equal(gradient, again)
    set_adapter_training(dropping, False)
    assert loss != LanguageEngine(dropping, 2, examples).loss(examples)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_transformers_would_compute_again_is_packed_and_keeps_its_gradients(family):
    model, examples = adapted(family), conversations(5, 3)
    expected = gradients(model, reference_loss(model, examples))
    plain = kept_bytes(LanguageEngine(model, 2, examples), examples)
    model.activation_checkpointing_enable()
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    engine = LanguageEngine(model, 2, examples)
    assert engine.padded_because is None
    ours = gradients(model, engine.loss(examples))
    assert (ours - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert kept_bytes(engine, examples) < 0.7 * plain
    assert all(block.gradient_checkpointing for block in blocks_of(model))


def test_a_block_with_hooks_runs_once():
    model, examples = adapted("llama"), conversations(3, 0)
    engine, calls = LanguageEngine(model, 2, examples), []
    engine.recomputes = True
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(0))
    engine.loss(examples).backward()
    assert calls == [0]


def test_the_blocks_are_back_in_their_places_also_after_an_error():
    model, examples = adapted("llama"), conversations(3, 0)
    engine, before = LanguageEngine(model, 2, examples), list(model.model.layers)
    engine.recomputes = True
    engine.loss(examples).backward()
    assert list(model.model.layers) == before
    attention = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"):
        _stopped(engine, examples)
    assert list(model.model.layers) == before
    assert model.config._attn_implementation == attention


def _stopped(engine, examples):
    def stop(*_):
        raise RuntimeError("stop")

    with engine.model.model.layers[-1].self_attn.register_forward_pre_hook(stop):
        engine.loss(examples)
