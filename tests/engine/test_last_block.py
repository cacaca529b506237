"""The last block at the tokens that are read: against the definition, and that it computes no others."""

import random
from contextlib import contextmanager

import pytest
import torch
from conftest import tiny
from test_engine import a_tree_of_conversations, conversations, reference_loss
from test_model_types import CAUSAL, CLASSIFIERS, PACKED, assert_same, build
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rankwise.data.examples import TextExample
from rankwise.data.labelled import LabelExample
from rankwise.engine.batch import pack, rounded_up
from rankwise.engine.blocks import blocks_of
from rankwise.engine.classifiers import ClassifierEngine
from rankwise.engine.language import LanguageEngine
from rankwise.lora.places import named_base_modules

pytestmark = pytest.mark.usefixtures("in_fp64")
DECODERS = ["llama", "gpt2", "mistral", "opt", "phi", "qwen2"]


def one_answer(count, common=0, seed=0):
    """Rows of a prompt and a short answer, so that few of the tokens are read; one of the answers is a single token."""
    draw = random.Random(seed)
    start = tuple(draw.randrange(3, 96) for _ in range(common))
    lengths = [(draw.randrange(8, 14), 1 + index % 3) for index in range(count)]
    return [
        TextExample(
            start + tuple(draw.randrange(3, 96) for _ in range(prompt + answer)),
            (False,) * (common + prompt) + (True,) * answer,
            "here",
        )
        for prompt, answer in lengths
    ]


def texts(count=6):
    draw = random.Random(0)
    return [
        LabelExample(tuple(draw.randrange(3, 96) for _ in range(draw.randrange(3, 12))), draw.randrange(4), "here")
        for _ in range(count)
    ]


@contextmanager
def linear_inputs(block):
    """The number of tokens that each linear layer of a block is called on, in the order of the calls.

    Told without hooks, because a block with hooks in it is not cut.
    """
    seen = {}
    layers = {
        name: block.get_submodule(name) for name, base in named_base_modules(block) if isinstance(base, nn.Linear)
    }
    for name, layer in layers.items():

        def forward(x, *more, name=name, before=layer.forward):
            seen.setdefault(name, []).append(x.numel() // x.shape[-1])
            return before(x, *more)

        layer.forward = forward
    try:
        yield seen
    finally:
        for layer in layers.values():
            del layer.forward


@pytest.mark.parametrize("kind", [kind for kind in CAUSAL if kind in PACKED])
def test_loss_and_gradients_of_a_cut_block_are_those_of_each_conversation_by_itself(kind):
    for common in (0, 18):
        model, examples = build(AutoModelForCausalLM, kind, CAUSAL[kind], 3), one_answer(5, common)
        engine = LanguageEngine(model, 0, examples)
        assert engine.whole_last_block_because is None
        stream = pack(examples, torch.device("cpu"))
        assert stream.packing.before[:2] == (None, 0) if common else not any(stream.packing.before)
        assert engine.cuts_last_block(len(stream.targets), stream.ids.shape[1])
        assert_same(engine, examples, reference_loss(model, examples))


@pytest.mark.parametrize("kind", [*(kind for kind in CLASSIFIERS if kind in PACKED), *DECODERS])
def test_loss_and_gradients_of_a_cut_block_are_those_of_each_text_by_itself(kind):
    overrides = {**CLASSIFIERS, **CAUSAL}[kind]
    model, examples = build(AutoModelForSequenceClassification, kind, overrides, 3, num_labels=4), texts()
    engine = ClassifierEngine(model, 0, examples)
    assert engine.whole_last_block_because is None
    assert engine.cuts_last_block(len(examples), sum(len(text.ids) for text in examples))
    logits = torch.cat([model(torch.tensor([text.ids])).logits for text in examples])
    assert_same(engine, examples, F.cross_entropy(logits, torch.tensor([text.label for text in examples])))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_trees_of_conversations_and_several_stretches_of_a_row_may_be_cut(kind, seed):
    model = build(AutoModelForCausalLM, kind, CAUSAL[kind], 3)
    for examples in (a_tree_of_conversations(seed), conversations(5, 18, seed)):
        # What is trained in the middle of a segment sees no more than what stands before it.
        engine = LanguageEngine(model, 0, examples)
        engine._cuts_up_to = 1.0
        assert_same(engine, examples, reference_loss(model, examples))


def test_no_layer_behind_attention_sees_a_token_that_is_not_read():
    model, examples = build(AutoModelForCausalLM, "llama", {}, 3), one_answer(5, 18)
    engine = LanguageEngine(model, 0, examples)
    stream = pack(examples, torch.device("cpu"))
    read, tokens = len(stream.targets), stream.ids.shape[1]
    with linear_inputs(blocks_of(model)[-1]) as seen:
        engine.loss(examples)
    computed = rounded_up(read)
    projections = {f"self_attn.{name}_proj": [tokens, computed] for name in "qkv"}
    behind = {name: [computed] for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
    assert seen == projections | behind


def test_no_layer_behind_attention_sees_more_than_the_first_token_of_a_text():
    model, examples = build(AutoModelForSequenceClassification, "bert", {}, 3, num_labels=4), texts()
    engine = ClassifierEngine(model, 0, examples)
    with linear_inputs(blocks_of(model)[-1]) as seen:
        engine.loss(examples)
    behind = {name: counts for name, counts in seen.items() if "self" not in name}
    assert behind == {
        name: [rounded_up(6)] for name in ("attention.output.dense", "intermediate.dense", "output.dense")
    }


def test_the_block_runs_whole_where_most_tokens_are_read():
    model = build(AutoModelForCausalLM, "llama", {}, 3)
    examples = [TextExample(tuple(range(5, 5 + length)), (True,) * length, "here") for length in (9, 12)]
    engine = LanguageEngine(model, 0, examples)
    with linear_inputs(blocks_of(model)[-1]) as seen:
        engine.loss(examples)
    assert seen["self_attn.k_proj"] == seen["mlp.up_proj"] == [rounded_up(21)]
    assert_same(engine, examples, reference_loss(model, examples))


def test_who_watches_the_block_sees_each_layer_run_once_on_all_tokens():
    model, examples = build(AutoModelForCausalLM, "llama", {}, 3), one_answer(5)
    engine, seen = LanguageEngine(model, 0, examples), []
    tokens = sum(len(example.ids) for example in examples)
    for name in ("self_attn.k_proj", "mlp.up_proj"):
        blocks_of(model)[-1].get_submodule(name).register_forward_hook(
            lambda _, inputs, __: seen.append(inputs[0].shape[1])
        )
    engine.loss(examples)
    assert seen == [rounded_up(tokens)] * 2
    assert LanguageEngine(model, 0, examples).whole_last_block_because == "there are hooks in it"


class TwiceAttending(nn.Module):
    """A block that is called, and attends, twice."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden, **more):
        return self.block(self.block(hidden, **more), **more)


class Mixing(nn.Module):
    """A block that reads its neighbours' tokens past attention: here the mean of all that it is given."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden, **more):
        return self.block(hidden, **more) + hidden.mean(1, keepdim=True)


class NoAttention(nn.Module):
    def forward(self, hidden, **_):
        return hidden * 2


@pytest.mark.parametrize("other", [TwiceAttending, Mixing, NoAttention])
def test_a_block_that_cannot_be_cut_runs_whole_and_says_why(other, monkeypatch):
    model, examples = tiny("llama", torch.float64), one_answer(5)
    blocks = model.model.layers
    blocks[-1] = NoAttention() if other is NoAttention else other(blocks[-1])
    # The whole stream is what such a model means here, so packing itself is not put to the test.
    monkeypatch.setattr(LanguageEngine, "_why_not_packed", lambda *_: None)
    engine = LanguageEngine(model, 0, examples)
    assert engine.whole_last_block_because
    assert not engine.cuts_last_block(1, 1000)
    stream = pack(examples, torch.device("cpu"))
    with engine._packed_pass(stream, stream.predictors):
        output = model(stream.ids, position_ids=stream.positions, packing=stream.packing, use_cache=False)
    whole = output.logits[0, stream.predictors]
    torch.testing.assert_close(engine.logits(examples)[0], whole, rtol=1e-10, atol=1e-12)


def test_blocks_that_are_left_out_at_random_run_whole():
    model, examples = build(AutoModelForCausalLM, "opt", {**CAUSAL["opt"], "layerdrop": 0.1}, 3), one_answer(5)
    assert "at random" in LanguageEngine(model, 0, examples).whole_last_block_because


def test_no_hook_stays_behind_also_after_an_error():
    model, examples = tiny("llama"), one_answer(5)
    engine, block = LanguageEngine(model, 2, examples), blocks_of(model)[-1]
    engine.loss(examples)
    with pytest.raises(IndexError):
        engine.loss([TextExample((1, 1000, 3, 4), (False, False, False, True), "here")])
    assert not block._forward_hooks
    assert not block._forward_pre_hooks
