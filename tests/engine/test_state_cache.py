"""Passes that begin at the lowest block that trains, with states from the disk."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import randomise_adapter, tiny
from test_engine import conversations, gradients
from test_model_types import CAUSAL, CLASSIFIERS, PACKED, build
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rankwise
from rankwise import LoraConfig, TrainConfig, inject_, trainable_parameters
from rankwise.data.labelled import LabelExample
from rankwise.engine import state_cache
from rankwise.engine.classifiers import ClassifierEngine
from rankwise.engine.language import LanguageEngine
from rankwise.engine.state_cache import plan_states, states_kept
from rankwise.rank.nested import NestedEngine
from rankwise.train.loop import Training


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path))
    return tmp_path / "states"


def texts(count=5):
    draw = random.Random(0)
    return [LabelExample(tuple(draw.randrange(3, 96) for _ in range(9)), draw.randrange(4), "") for _ in range(count)]


def adapted_above(model, lowest, **config):
    blocks = range(lowest, model.config.num_hidden_layers)
    inject_(model, LoraConfig(r=3, layers_to_transform=list(blocks), **config))
    randomise_adapter(model)
    return model


def assert_the_same_from_states(engine, examples, blocks_below):
    expected = engine.loss(examples)
    theirs = gradients(engine.model, expected)
    for engine.recomputes in (False, True):
        with states_kept(engine, examples, 1e9):
            assert engine.states.depth == blocks_below
            loss = engine.loss(examples)
            ours = gradients(engine.model, loss)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()
    assert engine.states is None


@pytest.mark.usefixtures("in_fp64")
@pytest.mark.parametrize("kind", sorted(PACKED & CAUSAL.keys()))
def test_loss_and_gradients_on_conversations_are_those_of_whole_passes(kind, monkeypatch):
    monkeypatch.setattr(state_cache, "GROUP_TOKENS", 60)
    model = build(AutoModelForCausalLM, kind, {**CAUSAL[kind], "num_hidden_layers": 3}, 2)
    rankwise.eject_(model)
    examples = conversations(5, 18, 1)
    assert_the_same_from_states(LanguageEngine(adapted_above(model, 2), 0, examples), examples, 2)


@pytest.mark.usefixtures("in_fp64")
@pytest.mark.parametrize("kind", sorted(PACKED & CLASSIFIERS.keys()))
def test_loss_and_gradients_on_texts_are_those_of_whole_passes(kind):
    model = build(AutoModelForSequenceClassification, kind, CLASSIFIERS[kind], 3, num_labels=4)
    rankwise.eject_(model)
    engine = ClassifierEngine(adapted_above(model, 1, task_type="SEQ_CLS"), 0, texts())
    assert_the_same_from_states(engine, texts(), 1)


def test_blocks_below_run_once_for_each_row_and_the_bits_do_not_depend_on_what_was_on_the_disk(cache, monkeypatch):
    examples = conversations(6, 18)
    config = TrainConfig(model="m", data=("d",), out="o", batch_size=2, epochs=3, lr=0.01)
    runs, passes = [], []
    for _ in range(2):
        # In fp64: AdamW divides by gradients that are almost zero, and makes much of their rounding.
        model = adapted_above(tiny("llama", torch.float64), 1)
        engine = LanguageEngine(model, 2, examples)
        seen = []
        model.model.layers[0].mlp.gate_proj.register_forward_hook(
            lambda _, args, __, seen=seen: seen.append(args[0].shape[1])
        )
        list(Training(engine, examples, config).steps())
        runs.append(torch.cat([p.detach().flatten() for p in trainable_parameters(model)]))
        passes.append(Counter(seen))
    assert torch.equal(*runs)
    stream = sum(stream.ids.shape[1] for _, stream in plan_states(engine, examples, 1e9).groups)
    assert passes[0] - passes[1] == Counter([stream])
    assert passes[1] - passes[0] == Counter()
    # What is left are the short passes that compare before training.
    assert passes[1].total() < 9
    without = adapted_above(tiny("llama", torch.float64), 1)
    list(
        Training(LanguageEngine(without, 2, examples), examples, TrainConfig(**{**vars(config), "cache_gb": 0})).steps()
    )
    expected = torch.cat([p.detach().flatten() for p in trainable_parameters(without)])
    assert (runs[0] - expected).abs().max() <= 1e-9 * expected.abs().max()


def kept(engine, examples, limit=1e9):
    with states_kept(engine, examples, limit):
        return engine.states is not None


def test_another_rank_finds_the_states_and_another_base_does_not(cache):
    examples = conversations(4, 0)
    for model, files in ((tiny("llama"), 1), (tiny("llama"), 1), (tiny("llama-tied"), 2)):
        assert kept(LanguageEngine(adapted_above(model, 1), 2, examples), examples)
        assert len(list(cache.iterdir())) == files
    moved = tiny("llama")
    moved.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    assert kept(LanguageEngine(adapted_above(moved, 1), 2, examples), examples)
    assert len(list(cache.iterdir())) == 3
    # What lies above decides nothing below.
    above = tiny("llama")
    above.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    assert kept(LanguageEngine(adapted_above(above, 1), 2, examples), examples)
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", "cut"])
def test_a_damaged_file_is_written_anew(cache, damage):
    examples = conversations(4, 0)
    engine = LanguageEngine(adapted_above(tiny("llama"), 1), 2, examples)
    assert kept(engine, examples)
    [path] = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-7] if damage == "cut" else damage)
    assert kept(engine, examples)
    assert path.read_bytes() == whole


def test_the_folder_stays_within_its_limit_and_loses_what_was_not_used_for_longest(cache):
    first, second, third = (conversations(4, 0, seed) for seed in (1, 2, 3))
    engine = LanguageEngine(adapted_above(tiny("llama"), 1), 2, first)
    assert kept(engine, first)
    [old] = cache.iterdir()
    size = plan_states(engine, first, 1e9).bytes
    assert np.load(old).nbytes == size
    assert kept(engine, second)
    [other] = set(cache.iterdir()) - {old}
    assert kept(engine, first)
    limit = plan_states(engine, third, 1e9).bytes + old.stat().st_size
    assert kept(engine, third, limit)
    assert old.exists()
    assert not other.exists()
    assert "more than --cache-gb" in plan_states(engine, first, size - 1)
    assert not kept(engine, first, size - 1)


def test_why_nothing_is_kept_is_said(monkeypatch):
    examples = conversations(4, 0)
    whole = tiny("llama")
    inject_(whole, LoraConfig(r=2))
    assert (
        plan_states(LanguageEngine(whole, 2, examples), examples, 1e9)
        == "the lowest block trains, or what lies below it"
    )
    upper = LanguageEngine(adapted_above(tiny("llama"), 1), 2, examples)
    assert plan_states(upper, examples, 0) == "--cache-gb is 0, its default where no row runs twice"
    padded = LanguageEngine(adapted_above(tiny("bloom"), 1), 2, examples)
    assert plan_states(padded, examples, 1e9) == "it needs packed streams"
    head = tiny("llama")
    inject_(head, LoraConfig(r=2, target_modules=["embed_tokens"]))
    assert (
        plan_states(LanguageEngine(head, 2, examples), examples, 1e9)
        == "the lowest block trains, or what lies below it"
    )


def test_a_nested_run_takes_its_states_from_the_disk_too():
    examples, found = conversations(6, 18), []
    for gigabytes in (1, 0):
        model = adapted_above(tiny("llama"), 1)
        engine = NestedEngine(LanguageEngine(model, 2, examples), [1, 2, 3], seed=0)
        config = TrainConfig(model="m", data=("d",), out="o", batch_size=2, lr=0.01, cache_gb=gigabytes)
        for step in Training(engine, examples, config).steps():
            found.append(step.loss)
            assert (engine.inner.states is not None) == bool(gigabytes)
    assert found[:3] == pytest.approx(found[3:], rel=1e-5)
