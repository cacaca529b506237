"""Shrinking: the paired test keeps its level, planted ranks are found, the smaller adapter is what was measured."""

import json
import random
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from conftest import randomise_adapter, tiny
from torch.nn import functional as F

from rankwise import LoraConfig, inject_, load_adapter_, read_adapter, save_adapter
from rankwise.cli.main import main
from rankwise.data.examples import TextExample
from rankwise.data.labelled import LabelExample
from rankwise.data.rows import Row
from rankwise.engine.classifiers import ClassifierEngine
from rankwise.engine.language import LanguageEngine
from rankwise.errors import ConfigError, DataError
from rankwise.lora.places import named_lora_layers
from rankwise.rank.ladder import Ladder
from rankwise.rank.paired import ExampleLosses, PairedTest, measure, paired_test, units
from rankwise.rank.shrink import HeldOut, shrink_, split_held_out

# ---- the paired test


def losses(sums, counts=None):
    return ExampleLosses(np.asarray(sums, float), np.ones(len(sums)) if counts is None else np.asarray(counts, float))


NOISE = {
    "symmetric": lambda draw, n: draw.normal(size=n),
    "skewed": lambda draw, n: draw.exponential(size=n) - 1,
    "strongly skewed": lambda draw, n: draw.chisquare(0.5, size=n) - 0.5,
    "lognormal": lambda draw, n: draw.lognormal(0, 1, size=n) - np.exp(0.5),
}


def most(draws):
    """The share of draws that a test at the 5 % level may pass wrongly, and three standard errors of it."""
    return 0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5


@pytest.mark.parametrize(
    ("noise", "n", "draws"),
    [
        ("symmetric", 40, 1000),
        ("skewed", 40, 1000),
        ("strongly skewed", 40, 1000),
        ("strongly skewed", 200, 300),
        ("lognormal", 120, 1000),
    ],
)
def test_a_loss_of_delta_passes_at_most_about_one_time_in_twenty(noise, n, draws):
    draw, delta, zero = np.random.default_rng(0), 0.1, losses(np.zeros(n))
    passed = [paired_test(losses(delta + NOISE[noise](draw, n)), zero).within(delta) for _ in range(draws)]
    assert np.mean(passed) <= most(draws)


def test_tokens_of_one_row_are_not_independent_and_the_bound_knows_it():
    draw, delta, passed = np.random.default_rng(1), 0.1, []
    for _ in range(1000):
        counts = draw.integers(1, 30, size=40)
        # Every token of a row is off by the same amount.
        sums = counts * (delta + draw.normal(size=40))
        passed.append(paired_test(losses(sums, counts), losses(np.zeros(40), counts)).within(delta))
    assert 0.02 <= np.mean(passed) <= most(1000)


def test_with_the_rows_that_are_said_to_be_needed_the_test_passes_four_times_in_five():
    draw, delta, difference = np.random.default_rng(2), 0.1, 0.02
    needed = PairedTest(difference, 1.0, deviation=0.25, rows=10).rows_needed(delta)
    assert needed is not None
    zero = losses(np.zeros(needed))
    passed = [paired_test(losses(draw.normal(difference, 0.25, size=needed)), zero).within(delta) for _ in range(500)]
    # Three standard errors of 500 draws.
    assert abs(np.mean(passed) - 0.8) <= 0.054
    assert PairedTest(0.2, 1.0, deviation=0.25, rows=10).rows_needed(delta) is None


@pytest.mark.parametrize("copies", [2, 10])
def test_rows_that_ask_the_same_are_one_row_of_the_test(copies):
    draw, passed = np.random.default_rng(4), []
    examples = [TextExample((1, 9, row, 7), (False, False, False, True), "") for row in range(40)] * copies
    unit = units(examples)
    assert len(set(unit)) == 40
    for _ in range(400):
        same = np.tile(draw.normal(size=40), copies)
        some = losses(0.1 + same).by_unit(unit), losses(np.zeros(len(same))).by_unit(unit)
        passed.append(paired_test(*some).within(0.1))
    assert np.mean(passed) <= most(400)


def test_what_goes_on_from_a_question_or_answers_it_otherwise_is_one_unit_and_other_questions_are_not():
    def said(ids, trained):
        return TextExample(ids, tuple(sign == "t" for sign in trained), "")

    one, otherwise = said((1, 5, 6, 20), "---t"), said((1, 5, 6, 21, 22), "---tt")
    longer = said((1, 5, 6, 20, 8, 30), "---t-t")
    other, text, same_text = said((1, 5, 7, 20), "---t"), said((1, 8, 9), "-tt"), said((1, 8, 9), "-tt")
    unit = units([one, otherwise, longer, other, text, same_text])
    assert unit[0] == unit[1] == unit[2]
    assert len(set(unit)) == 3
    assert unit[4] == unit[5]
    labels = [LabelExample((1, word), label, "") for word, label in ((5, 0), (5, 1), (6, 0))]
    assert list(units(labels)) == [0, 0, 1]


def test_equal_losses_are_equal():
    some = losses(np.arange(50.0), np.arange(1, 51))
    assert paired_test(some, some) == PairedTest(0.0, 0.0, 0.0, 50)


def test_the_whole_procedure_promises_too_little_at_most_one_time_in_twenty():
    """A simulated adapter whose true loss rises with what is cut; each time the ladder sees fresh rows of it."""
    draw, delta, zero = np.random.default_rng(3), 0.1, losses(np.zeros(40))
    slope, worse_than_delta, worse_than_bound = 0.002, 0, 0
    for _ in range(200):
        rows = {part: draw.exponential(size=40) - 1 for part in ("choice", "confirmation")}

        def test(part, total, rows=rows):
            true = slope * (200 - total)
            return paired_test(losses(true + rows[part] * true * 3), zero)

        try:
            total, at_most, _ = Ladder(test, largest=200, least=1, delta=delta).descend()
        except DataError:
            continue
        worse_than_delta += slope * (200 - total) > delta
        worse_than_bound += slope * (200 - total) > at_most
    assert worse_than_delta <= most(200) * 200
    assert worse_than_bound <= most(200) * 200


def test_the_ladder_finds_the_smallest_total_rank_within_one_rung():
    for needed in (1, 2, 3, 7, 20, 50, 199, 200):
        tried = []

        def test(part, total, needed=needed, tried=tried):
            tried.append(total)
            bound = 0.0 if total >= needed else 1.0
            return PairedTest(bound, bound, 0.0, 60)

        total, _, _ = Ladder(test, largest=200, least=1, delta=0.1).descend()
        assert needed <= total <= max(needed + 1, needed * 2 ** (1 / 8) + 1)
        assert len(tried) <= 32


def test_a_new_order_of_the_directions_goes_on_from_where_the_last_one_ended():
    observed, confirmed = [], []

    def test(part, total):
        if part == "confirmation":
            confirmed.append(total)
        bound = 0.0 if total >= (50, 12, 3, 3)[len(observed)] else 1.0
        return PairedTest(bound, bound, 0.0, 60)

    total, _, _ = Ladder(test, largest=200, least=1, delta=0.1, observe_again=observed.append).descend()
    assert observed == [50, 12, 3]
    assert total == 3
    assert confirmed == sorted(set(confirmed), reverse=True)


def test_what_the_confirmation_part_refutes_is_not_promised():
    def test(part, total):
        bound = 0.05 if part == "choice" or total > 100 else 1.0
        return PairedTest(bound, bound, 0.1, 60)

    total, at_most, _ = Ladder(test, largest=200, least=1, delta=0.1).descend()
    assert (total, at_most) == (200, 0.1)


def test_if_nothing_is_confirmed_the_reason_is_said():
    def test(part, total):
        bound = 0.05 if part == "choice" else 1.0
        return PairedTest(bound, bound, 0.1, 60)

    with pytest.raises(DataError, match="on 60 confirmation rows"):
        Ladder(test, largest=200, least=1, delta=0.1).descend()


def test_if_only_a_larger_rung_is_confirmed_no_more_than_delta_is_promised():
    def test(part, total):
        passes = total >= 40 if part == "choice" else total > 42
        bound = 0.01 if passes else 1.0
        return PairedTest(bound, bound, 0.1, 60)

    total, at_most, _ = Ladder(test, largest=64, least=1, delta=0.1).descend()
    assert total > 42
    assert at_most == 0.1


# ---- per-example losses


@pytest.mark.parametrize("packs", [True, False])
def test_example_losses_are_those_of_each_example_by_itself(packs):
    model, examples = tiny("llama", torch.float64), conversations(20)
    engine = LanguageEngine(model, 2, examples)
    engine.packs = packs
    measured = measure(engine, examples)
    for index, example in enumerate(examples):
        logits = model(torch.tensor([example.ids])).logits[0]
        places = [place for place in range(1, len(example.ids)) if example.trained[place]]
        targets = torch.tensor([example.ids[place] for place in places])
        expected = F.cross_entropy(logits[[place - 1 for place in places]], targets, reduction="sum")
        assert measured.sums[index] == pytest.approx(expected.item(), rel=1e-5)
        assert measured.counts[index] == len(places)


def test_example_losses_of_a_classifier_are_those_of_each_text():
    model, draw = tiny("bert"), random.Random(0)
    examples = [
        LabelExample(tuple(draw.randrange(1, 96) for _ in range(draw.randrange(2, 9))), draw.randrange(5), "")
        for _ in range(20)
    ]
    measured = measure(ClassifierEngine(model, 0, examples), examples)
    for index, example in enumerate(examples):
        logits = model(torch.tensor([example.ids])).logits
        expected = F.cross_entropy(logits, torch.tensor([example.label]))
        assert measured.sums[index] == pytest.approx(expected.item(), rel=1e-4)
    assert measured.mean == pytest.approx(measured.sums.mean())


# ---- adapters


def conversations(count, seed=0):
    """Random conversations with trained stretches of different lengths."""
    draw, examples = random.Random(seed), []
    for _ in range(count):
        asked, answer = draw.randrange(2, 6), draw.randrange(2, 12)
        ids = [draw.randrange(3, 96) for _ in range(asked + answer)]
        examples.append(TextExample(tuple(ids), (False,) * asked + (True,) * answer, ""))
    return examples


def decided():
    """A tiny random model whose next tokens are far from equally likely, so that an update of it has much to gain."""
    model = tiny("llama")
    model.lm_head.weight.data *= 20
    return model


def spoken_by(model, count, answer=12, seed=1):
    """Conversations whose answers the model itself draws, so that it is their best model."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (count, 5), generator=draw)
    with torch.no_grad():
        for _ in range(answer):
            chances = model(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=draw)], dim=1)
    return [TextExample(tuple(row), (False,) * 5 + (True,) * answer, "") for row in ids.tolist()]


def parts_of(examples):
    n = len(examples)
    return HeldOut(examples[: n // 5], examples[n // 5 : 3 * n // 5], examples[3 * n // 5 :])


def plant(model, ranks, size=12.0, noise=1e-3, seed=1):
    """Give the layers updates of exactly these ranks (others: none), stored with noise in factors of their full r."""
    draw = torch.Generator().manual_seed(seed)
    for name, layer in named_lora_layers(model):
        update = layer.update("default")
        d, k = layer.base_matrix().shape
        U, V = (torch.linalg.qr(torch.randn(n, update.r, generator=draw)).Q for n in (d, k))
        sigma = torch.full((update.r,), noise)
        sigma[: ranks.get(name, 0)] = size
        turn = torch.linalg.qr(torch.randn(update.r, update.r, generator=draw)).Q
        root = (sigma / update.scale).sqrt()
        update.set(turn @ (root[:, None] * V.T), U * root @ turn.T)


PLANTED = {
    "model.layers.0.self_attn.q_proj": 3,
    "model.layers.0.mlp.down_proj": 5,
    "model.layers.1.self_attn.o_proj": 4,
    "model.layers.1.mlp.up_proj": 6,
}
PRECISE = 0.004
"""Nats; less than any of the planted directions spares the loss."""
STORED = LoraConfig(task_type="CAUSAL_LM", r=32, rank_pattern={"k_proj": 16, "v_proj": 16})


def planted():
    model = decided()
    inject_(model, STORED)
    plant(model, PLANTED)
    return model


@pytest.fixture(scope="module", params=["vllm", "llama.cpp"])
def shrunk(request):
    """(the model with its adapter cut, the report, the held-out parts, what will read it)"""
    model = planted()
    examples = spoken_by(model, 400)
    engine, held_out = LanguageEngine(model, 2, examples), parts_of(examples)
    return model, shrink_(engine, held_out, PRECISE, request.param), held_out, request.param


def test_planted_ranks_are_found_with_a_loss_within_delta(shrunk):
    model, report, _, _ = shrunk
    total = sum(PLANTED.values())
    assert sum(report.ranks_before.values()) == 384
    assert total <= sum(report.ranks_after.values()) <= 1.1 * total
    assert all(report.ranks_after[name] >= rank for name, rank in PLANTED.items())
    assert report.lost_at_most <= report.delta == PRECISE
    fresh = spoken_by(planted(), 100, seed=9)
    full, cut = (measure(LanguageEngine(each, 2, fresh), fresh).mean for each in (planted(), model))
    assert cut - full < report.delta


def test_the_report_is_what_is_in_the_model(shrunk):
    model, report, held_out, _ = shrunk
    layers = dict(named_lora_layers(model))
    left = {name: layer.update("default").r for name, layer in layers.items() if layer.shares}
    assert left == {name: rank for name, rank in report.ranks_after.items() if rank}
    losses_now = measure(LanguageEngine(model, 2, held_out.choice), held_out.confirmation)
    assert report.loss_shrunk == pytest.approx(losses_now.mean)
    assert report.parameters_after == sum(rank * sum(layers[name].base_matrix().shape) for name, rank in left.items())


def test_the_smaller_adapter_gives_the_same_logits_in_peft_and_in_rankwise(shrunk, tmp_path):
    model, report, held_out, _ = shrunk
    save_adapter(model, tmp_path / "small")
    ids = torch.tensor([held_out.choice[0].ids])
    with torch.no_grad():
        expected = model(ids).logits
        again = decided()
        load_adapter_(again, tmp_path / "small")
        torch.testing.assert_close(again(ids).logits, expected)
        theirs = peft.PeftModel.from_pretrained(decided(), str(tmp_path / "small"))
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-5, atol=1e-5)
    adapted = {
        name.removeprefix("base_model.model.") for name, module in theirs.named_modules() if hasattr(module, "lora_A")
    }
    assert adapted == {name for name, rank in report.ranks_after.items() if rank} != report.ranks_after.keys()


def test_the_reader_s_own_rule_for_the_scale_gives_the_update_that_was_measured(shrunk, tmp_path):
    model, _, _, reader = shrunk
    small = read_adapter(save_adapter(model, tmp_path / "small"))
    assert len({update.rank for update in small.low_rank.values()}) > 1
    for name, update in small.low_rank.items():
        # vLLM: lora_alpha / r of the whole adapter. llama.cpp: lora_alpha / the tensor's own rank.
        scale = small.config.lora_alpha / (small.config.r if reader == "vllm" else update.rank)
        measured = dict(named_lora_layers(model))[name].delta("default", torch.float32)
        torch.testing.assert_close(update.B @ update.A * scale, measured)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=16, lora_alpha=8, use_rslora=True),
        LoraConfig(r=8, rank_pattern={"q_proj": 16}, alpha_pattern={"down_proj": 5}),
        LoraConfig(r=8, target_modules=["embed_tokens", "q_proj", "lm_head"]),
        LoraConfig(r=8, target_modules=["q_proj", "up_proj"], trainable_token_indices=[5, 7]),
        LoraConfig(r=8, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"]),
    ],
    ids=["rslora", "patterns", "embedding", "token rows", "head"],
)
def test_adapters_of_every_plain_kind_shrink_and_keep_what_is_no_update(config, tmp_path):
    model = decided()
    inject_(model, replace(config, task_type="CAUSAL_LM"))
    randomise_adapter(model)
    plant(model, dict.fromkeys(dict(named_lora_layers(model)), 2))
    folder = save_adapter(model, tmp_path / "trained")
    settings = json.loads((folder / "adapter_config.json").read_text())
    for note in ("task_type", "base_model_name_or_path", "peft_type_version", "auto_mapping", "revision"):
        settings.pop(note, None)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    before = read_adapter(folder)
    again = decided()
    load_adapter_(again, folder)
    examples = spoken_by(again, 150)
    engine = LanguageEngine(again, 2, examples)
    report = shrink_(engine, parts_of(examples))
    small = read_adapter(save_adapter(again, tmp_path / "small"))
    assert report.lost_at_most <= report.delta == pytest.approx(0.05 * report.gain)
    assert sum(report.ranks_after.values()) < sum(report.ranks_before.values())
    assert {name: update.rank for name, update in small.low_rank.items()} == {
        name: rank for name, rank in report.ranks_after.items() if rank
    }
    assert small.rest.keys() == before.rest.keys()
    for name, tensor in before.rest.items():
        assert torch.equal(small.rest[name], tensor)
    theirs = peft.PeftModel.from_pretrained(decided(), str(tmp_path / "small"))
    ids = torch.tensor([examples[0].ids])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, again(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_carried_over(bias, tmp_path):
    def decided_gpt2():
        model = tiny("gpt2")
        model.lm_head.weight.data *= 20
        return model

    model = decided_gpt2()
    inject_(model, LoraConfig(task_type="CAUSAL_LM", r=8, bias=bias))
    randomise_adapter(model, std=0.3)
    examples = spoken_by(model, 150)
    report = shrink_(LanguageEngine(model, 2, examples), parts_of(examples), share=0.5)
    assert sum(report.ranks_after.values()) < sum(report.ranks_before.values())
    again = decided_gpt2()
    load_adapter_(again, save_adapter(model, tmp_path / "small"))
    ids = torch.tensor([examples[0].ids])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


# ---- refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(r=4, use_dora=True), "DoRA"),
        (LoraConfig(r=4, lora_bias=True), "lora_bias"),
    ],
)
def test_adapters_that_cannot_be_cut_are_refused(config, message):
    model = decided()
    inject_(model, replace(config, task_type="CAUSAL_LM"))
    examples = conversations(100)
    with pytest.raises(ConfigError, match=message):
        shrink_(LanguageEngine(model, 2, examples), parts_of(examples))


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("std", "delta", "message"),
    [(0.0, None, "no gain"), (0.3, 1e-7, "no smaller adapter")],
    ids=["an adapter without gain", "a delta that nothing meets"],
)
def test_a_refusal_leaves_the_model_as_it_was(std, delta, message):
    model = decided()
    inject_(model, LoraConfig(task_type="CAUSAL_LM", r=4))
    randomise_adapter(model, std=std)
    examples = spoken_by(model, 200)
    engine, before = LanguageEngine(model, 2, examples), state_of(model)
    with pytest.raises(DataError, match=message):
        shrink_(engine, parts_of(examples), delta)
    after = state_of(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_data_that_cannot_tell_says_how_many_rows_would():
    def test(part, total):
        return PairedTest(0.0, 0.5, deviation=2.0, rows=50)

    ladder = Ladder(test, largest=64, least=1, delta=0.1)
    with pytest.raises(DataError, match=r"can't tell, and about 6,\d\d\d held-out rows in all would"):
        ladder.descend()


def test_an_adapter_with_which_nothing_finite_is_computed_is_refused():
    model = tiny("llama")
    inject_(model, LoraConfig(r=4))
    randomise_adapter(model, std=1e12)
    examples = [TextExample((1, 9, row, 7), (False, False, False, True), "") for row in range(40)]
    with pytest.raises(ConfigError, match="what the model computes with this adapter is not finite"):
        shrink_(LanguageEngine(model, 2, examples), HeldOut(examples, examples, examples))


@pytest.mark.parametrize("delta", [0.0, float("inf")])
def test_a_delta_that_is_not_positive_and_finite_is_refused(delta):
    model = decided()
    inject_(model, LoraConfig(task_type="CAUSAL_LM", r=4))
    examples = conversations(100)
    with pytest.raises(ConfigError, match="delta must be a finite number of nats above 0"):
        shrink_(LanguageEngine(model, 2, examples), parts_of(examples), delta=delta)


def test_a_delta_that_is_not_below_what_is_gained_is_refused():
    model = planted()
    examples = spoken_by(model, 150)
    with pytest.raises(DataError, match=r"100\.0000 nats may be lost.* no better than none"):
        shrink_(LanguageEngine(model, 2, examples), parts_of(examples), delta=100.0)


def test_it_is_said_when_a_single_row_carries_the_bound(shrunk):
    _, report, _, _ = shrunk
    assert "a single row makes up 80%" in replace(report, heaviest=0.8).summary()
    assert "a single row" not in replace(report, heaviest=0.2).summary()
    most_lost = np.r_[np.zeros(50), 5.0]
    assert paired_test(losses(most_lost), losses(np.zeros(51))).heaviest > 0.9


def rows(count, tmp_path):
    return [Row(tmp_path / "x.jsonl", line, {"prompt": str(line), "completion": "a"}) for line in range(1, count + 1)]


def test_the_three_parts_share_no_row_and_hold_all(tmp_path):
    given = rows(100, tmp_path)
    held_out = split_held_out([*given, *given[:20]], seed=3)
    parts = [{row.line for row in part} for part in (held_out.calibration, held_out.choice, held_out.confirmation)]
    assert set.union(*parts) == {row.line for row in given}
    assert sum(map(len, parts)) == 100
    assert split_held_out(given, seed=3) == split_held_out(given, seed=3) != split_held_out(given, seed=4)


@pytest.mark.parametrize("count", [1, 74])
def test_too_few_rows_are_refused(count, tmp_path):
    with pytest.raises(DataError, match="at least 75"):
        split_held_out(rows(count, tmp_path), seed=0)


def test_copies_of_rows_do_not_count_as_more_rows(tmp_path):
    with pytest.raises(DataError, match=r"200 held-out rows, 20 of them different, are too few"):
        split_held_out(rows(20, tmp_path) * 10, seed=0)


# ---- the command


@pytest.fixture
def spoken(tiny_llama_folder, tokenizer, tmp_path):
    """(adapter folder, data file) of a tiny model on disk: rows that the adapted model answered itself."""
    from rankwise.data.examples import user_prompt
    from rankwise.engine.generate import generate
    from rankwise.models.load import load_model

    model = load_model(str(tiny_llama_folder), "causal_lm")
    inject_(model, LoraConfig(task_type="CAUSAL_LM", r=8, base_model_name_or_path=str(tiny_llama_folder)))
    plant(model, {"model.layers.0.mlp.down_proj": 2, "model.layers.1.mlp.up_proj": 1}, size=60)
    questions = [f"say {number}" for number in range(80)]
    answers = generate(model, tokenizer, [user_prompt(question, tokenizer) for question in questions], 6)
    data = tmp_path / "held_out.jsonl"
    rows = [{"prompt": q, "completion": a} for q, a in zip(questions, answers, strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return save_adapter(model, tmp_path / "trained"), data


def test_the_command_writes_the_smaller_adapter_and_what_it_promises(spoken, tmp_path, capsys):
    adapter, data = spoken
    assert main(["shrink", str(adapter), "--data", str(data), "--out", str(tmp_path / "small")]) == 0
    printed = capsys.readouterr().out
    promise = json.loads((tmp_path / "small" / "shrink.json").read_text())
    assert promise["lost_at_most"] <= promise["delta"]
    assert f"allowed: {promise['delta']:.4f}" in printed
    assert f"on {promise['rows']['confirmation']} rows by which no rank was chosen:" in printed
    small = read_adapter(tmp_path / "small")
    assert {name: update.rank for name, update in small.low_rank.items()} == {
        name: rank for name, rank in promise["ranks_after"].items() if rank
    }
    assert sum(promise["ranks_after"].values()) < sum(promise["ranks_before"].values())
    assert sum(promise["rows"].values()) == 80
    assert main(["eval", "--adapter", str(tmp_path / "small"), "--data", str(data), "--eval-answers", "0"]) == 0
    other = tmp_path / "other_names.jsonl"
    other.write_text(data.read_text().replace('"prompt"', '"question"').replace('"completion"', '"answer"'))
    named = ["--columns", "prompt=question", "completion=answer", "--out", str(tmp_path / "again")]
    assert main(["shrink", str(adapter), "--data", str(other), *named]) == 0
    assert json.loads((tmp_path / "again" / "shrink.json").read_text()) == promise


def test_rows_that_are_left_out_as_too_long_choose_and_confirm_nothing(spoken, tmp_path, capsys):
    adapter, data = spoken
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    long = [{"prompt": f"long {n} " + "word " * 200, "completion": "a"} for n in range(80)]
    options = ["--long-rows", "drop", "--max-length", "100", "--data", str(tmp_path / "mixed.jsonl")]
    command = ["shrink", str(adapter), *options, "--out"]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *long]))
    assert main([*command, str(tmp_path / "small")]) == 0
    promise = json.loads((tmp_path / "small" / "shrink.json").read_text())
    assert sum(promise["rows"].values()) == 80
    assert min(promise["rows"]["choice"], promise["rows"]["confirmation"]) >= 30
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:20], *long]))
    assert main([*command, str(tmp_path / "other")]) == 2
    assert "20 held-out rows are too few to tell what is lost" in capsys.readouterr().err


def test_wrong_inputs_of_the_command_are_named_before_anything_is_written(spoken, tmp_path, capsys):
    adapter, data = spoken
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "few.jsonl").write_text("".join(data.read_text().splitlines(keepends=True)[:30]))
    out, taken = tmp_path / "small", tmp_path / "trained"
    plain = {"adapter": str(adapter), "data": str(data), "out": str(out)}
    for change, message in (
        ({"adapter": str(tmp_path / "none")}, "no adapter folder"),
        ({"out": str(taken)}, "exists already"),
        ({"out": str(data / "small")}, f"cannot write {data}/small: Not a directory; choose a place"),
        ({"delta": "0"}, "--delta must be a finite number of nats above 0"),
        ({"delta": "-1"}, "--delta must be a finite number of nats above 0"),
        ({"delta": "inf"}, "--delta must be a finite number of nats above 0"),
        ({"data": str(tmp_path / "none.jsonl")}, "no such data file"),
        ({"data": str(tmp_path / "empty.jsonl")}, "holds no row"),
        ({"data": str(tmp_path / "few.jsonl")}, "at least 75"),
        ({"model": "smollm2-135m"}, "the model needs"),
    ):
        given = {**plain, **change}
        code = main(["shrink", given.pop("adapter"), *(f"--{key}={value}" for key, value in given.items())])
        assert code == 2, change
        assert message in capsys.readouterr().err
        assert not out.exists()
