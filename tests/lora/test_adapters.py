"""Many adapters over one base: each against the adapter alone, sums and mixtures against the definition."""

import pytest
import torch
from conftest import randomise_adapter, tiny
from torch import nn

from rankwise import (
    LoraConfig,
    activate_,
    adapter_names,
    adapters_by_row,
    adapters_off,
    combine_adapters_,
    delete_adapter_,
    eject_,
    inject_,
    load_adapter_,
    merge_,
    save_adapter,
    unmerge_,
)
from rankwise.errors import ConfigError, MergeError
from rankwise.lora.inject import injection, trainable_parameters
from rankwise.lora.places import named_lora_layers

IDS = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6], [1, 1, 2, 2]])
CONFIGS = {
    "one": LoraConfig(r=2, target_modules=["q_proj", "up_proj"]),
    "two": LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    "three": LoraConfig(r=3, use_dora=True, target_modules=["v_proj", "q_proj"]),
}


def alone(name):
    model = tiny("llama", torch.float64)
    inject_(model, CONFIGS[name])
    randomise_adapter(model, seed=len(name))
    return model


def together(*names):
    model = tiny("llama", torch.float64)
    for name in names:
        inject_(model, CONFIGS[name], adapter=name)
        randomise_adapter(model, seed=len(name))
    return model


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def deltas(model, adapter):
    """Everything that an adapter changes in each weight, dense."""
    return {n: layer.delta(adapter, torch.float64) for n, layer in named_lora_layers(model) if adapter in layer.shares}


def test_each_adapter_computes_what_it_does_alone_and_the_last_one_in_is_at_work():
    model = together("one", "two", "three")
    assert adapter_names(model) == ["one", "two", "three"]
    close(model(IDS).logits, alone("three")(IDS).logits)
    for name in CONFIGS:
        activate_(model, name)
        close(model(IDS).logits, alone(name)(IDS).logits)


def test_a_weighted_sum_of_adapters_is_the_sum_of_their_changes_in_the_weights():
    weights = {"one": 0.5, "two": -2.0, "three": 1.5}
    model, plain = together(*weights), tiny("llama", torch.float64)
    activate_(model, weights)
    for name, weight in weights.items():
        for module, delta in deltas(model, name).items():
            plain.get_submodule(module).weight.data += weight * delta
    close(model(IDS).logits, plain(IDS).logits)
    merge_(model)
    close(model(IDS).logits, plain(IDS).logits)


def test_rows_of_one_batch_use_their_own_adapters_in_training_too():
    model = together("one", "two", "three")
    rows = ["two", None, "three"]
    with adapters_by_row(model, rows):
        logits = model(IDS).logits
        logits[0].sum().backward()
    for index, name in enumerate(rows):
        expected = alone(name) if name else tiny("llama", torch.float64)
        close(logits[index], expected(IDS[index : index + 1]).logits[0])
    by_name = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert by_name
    assert all(".two." in name for name in by_name)
    solo = alone("two")
    solo(IDS[:1]).logits.sum().backward()
    activate_(model, "two")
    for ours, theirs in zip(trainable_parameters(model), trainable_parameters(solo), strict=True):
        close(ours.grad, theirs.grad)


def test_merging_one_adapter_leaves_the_other_at_work_and_unmerging_brings_back_every_bit():
    model = together("one", "two")
    activate_(model, {"one": 1.0, "two": 1.0})
    before = model(IDS).logits
    state = {name: tensor.clone() for name, tensor in tiny("llama", torch.float64).state_dict().items()}
    merge_(model, ["one"])
    close(model(IDS).logits, before)
    activate_(model, "one")
    close(model(IDS).logits, alone("one")(IDS).logits)
    unmerge_(model)
    eject_(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_dora_adapter_beside_a_merged_one_is_refused_and_nothing_changes():
    model = together("one", "three")
    activate_(model, {"one": 1.0, "three": 1.0})
    before = model(IDS).logits
    with pytest.raises(MergeError, match="DoRA"):
        merge_(model, ["one"])
    assert torch.equal(model(IDS).logits, before)


def test_a_deleted_adapter_is_gone_and_the_last_one_leaves_the_very_base():
    model = together("one", "two")
    delete_adapter_(model, "two")
    assert adapter_names(model) == ["one"]
    activate_(model, "one")
    close(model(IDS).logits, alone("one")(IDS).logits)
    delete_adapter_(model, "one")
    assert model.state_dict().keys() == tiny("llama").state_dict().keys()
    assert torch.equal(model(IDS).logits, tiny("llama", torch.float64)(IDS).logits)


def test_each_adapter_is_saved_and_loaded_by_itself(tmp_path):
    model = together("one", "two")
    for name in ("one", "two"):
        save_adapter(model, tmp_path / name, adapter=name)
    with pytest.raises(ConfigError, match="which adapter"):
        save_adapter(model, tmp_path / "any")
    again = tiny("llama", torch.float64)
    for name in ("one", "two"):
        load_adapter_(again, tmp_path / name, adapter=name)
        with pytest.raises(ConfigError, match="already carries an adapter named"):
            load_adapter_(again, tmp_path / name, adapter=name)
        assert torch.equal(again(IDS).logits, alone(name)(IDS).logits)


@pytest.mark.parametrize("r", [None, 6, 3])
def test_a_combined_adapter_is_the_weighted_sum_at_its_rank(r):
    model = together("one", "two")
    weights = {"one": 0.7, "two": -1.3}
    parts = {name: deltas(model, name) for name in weights}
    report = combine_adapters_(model, weights, "mix", r=r)
    for module, delta in deltas(model, "mix").items():
        exact = sum(weight * parts[name][module] for name, weight in weights.items() if module in parts[name])
        rank = report.ranks[module]
        best = torch.linalg.svdvals(exact)[rank:].norm()
        assert (delta - exact).norm() <= best + 1e-12
        assert report.lost[module] == pytest.approx((best / exact.norm()).item(), abs=1e-7)
    if r is None:
        assert report.most_lost == 0


def test_a_combined_dora_adapter_counts_with_all_that_it_changes():
    model = together("one", "three")
    with pytest.raises(ConfigError, match="r is needed"):
        combine_adapters_(model, {"one": 1.0, "three": 1.0}, "mix")
    both = {name: deltas(model, name) for name in ("one", "three")}
    combine_adapters_(model, {"one": 1.0, "three": 1.0}, "mix", r=16)
    for module, delta in deltas(model, "mix").items():
        exact = sum(part[module] for part in both.values() if module in part)
        assert (delta - exact).norm() <= torch.linalg.svdvals(exact)[16:].norm() + 1e-12


def test_ties_and_dare_follow_their_definitions():
    model = together("one", "two")
    module = "model.layers.0.self_attn.q_proj"
    one, two = (deltas(model, name)[module] for name in ("one", "two"))
    combine_adapters_(model, {"one": 1.0, "two": 1.0}, "kept", r=16, method="dare", density=1.0)
    exact = one + two
    assert (deltas(model, "kept")[module] - exact).norm() <= torch.linalg.svdvals(exact)[16:].norm() + 1e-12

    def trimmed(delta):
        least = delta.abs().flatten().sort(descending=True).values[round(0.2 * delta.numel()) - 1]
        return torch.where(delta.abs() >= least, delta, 0)

    first, second = trimmed(one), trimmed(two)
    sign = (first + second).sign()
    agree = [torch.where((part.sign() == sign) & (part != 0), part, 0) for part in (first, second)]
    ties = sum(agree) / sum((part != 0).double() for part in agree).clamp_min(1)
    combine_adapters_(model, {"one": 1.0, "two": 1.0}, "ties", r=32, method="ties", density=0.2)
    close(deltas(model, "ties")[module], ties)


@pytest.mark.parametrize("weights", [["one", "two"], {"one": "x"}, {"one": float("nan")}, {"one": None}, 5])
def test_weights_that_are_no_numbers_are_told(weights):
    model = together("one", "two")
    before = model(IDS).logits
    with pytest.raises(ConfigError, match="finite numbers, found"):
        activate_(model, weights)
    with pytest.raises(ConfigError, match="finite numbers, found"):
        combine_adapters_(model, weights, "mix", r=2)
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("block", [adapters_off, lambda model: adapters_by_row(model, ["one", None, "two"])])
def test_what_works_cannot_change_in_a_block_that_would_undo_it(block):
    model = together("one", "two")
    before = model(IDS).logits
    changes = [
        lambda: activate_(model, "one"),
        lambda: inject_(model, CONFIGS["three"], adapter="three"),
        lambda: delete_adapter_(model, "one"),
        lambda: eject_(model),
        lambda: merge_(model),
        lambda: unmerge_(model),
    ]
    with block(model), adapters_off(model):
        for change in changes:
            with pytest.raises(ConfigError, match="after the block"):
                change()
    assert torch.equal(model(IDS).logits, before)
    activate_(model, "one")
    torch.testing.assert_close(model(IDS).logits, alone("one")(IDS).logits)


def test_biases_stay_off_until_the_outer_block_ends():
    model = tiny("qwen2")
    base = model(IDS).logits
    inject_(model, LoraConfig(r=2, bias="all"))
    randomise_adapter(model)
    with adapters_off(model):
        with adapters_off(model):
            pass
        assert torch.equal(model(IDS).logits, base)
    assert not torch.equal(model(IDS).logits, base)


def test_a_string_names_one_adapter_to_merge():
    model = together("one", "two")
    activate_(model, {"one": 1.0, "two": 1.0})
    before = model(IDS).logits
    merge_(model, "one")
    assert {name for _, layer in named_lora_layers(model) for name in layer.merged} == {"one"}
    torch.testing.assert_close(model(IDS).logits, before)
    with pytest.raises(ConfigError, match=r"^none: not at work"):
        merge_(together("one"), "none")


def test_a_combined_adapter_has_no_higher_rank_than_its_matrix():
    model = nn.ModuleDict({"small": nn.Linear(4, 4), "large": nn.Linear(8, 8), "conv": nn.Conv2d(4, 8, 2, groups=2)})
    model.double()
    for seed, name in enumerate(("one", "two", "three")):
        inject_(model, LoraConfig(r=2, target_modules=["small", "large", "conv"]), adapter=name)
        randomise_adapter(model, seed=seed)
    layers = dict(named_lora_layers(model))
    weights = {"one": 1.0, "two": 0.5, "three": -1.0}
    expected = {n: sum(w * layer.delta(a, torch.float64) for a, w in weights.items()) for n, layer in layers.items()}
    report = combine_adapters_(model, weights, "mix", r=7)
    assert report.ranks == {"small": 4, "large": 6, "conv": 6}
    assert report.most_lost < 1e-10
    for name, layer in layers.items():
        torch.testing.assert_close(layer.delta("mix", torch.float64), expected[name])


def test_what_cannot_be_is_refused_before_anything_changes():
    model = together("one")
    before = model(IDS).logits
    with pytest.raises(ConfigError, match=r"no adapter named 'oen' \(nearest: 'one'\)"):
        activate_(model, "oen")
    with pytest.raises(ConfigError, match="already carries an adapter named 'one'"):
        inject_(model, CONFIGS["two"], adapter="one")
    with pytest.raises(ConfigError, match="cannot name an adapter"):
        inject_(model, CONFIGS["two"], adapter="a.b")
    with pytest.raises(ConfigError, match=r"r must be a whole number of at least 1[\s\S]*density"):
        combine_adapters_(model, {"one": 1.0}, "mix", r=0, density=2.0)
    with pytest.raises(ConfigError, match=r"even"):
        inject_(model, LoraConfig(r=3, init_lora_weights="orthogonal"), adapter="odd")
    assert adapter_names(model) == ["one"]
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [
        ("bert", {"task_type": "SEQ_CLS"}, {"task_type": "SEQ_CLS", "target_modules": ["query"]}),
        ("qwen2", {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"], "r": 3}),
        ("llama-tied", {"trainable_token_indices": [3, 9]}, {"trainable_token_indices": [5, 3], "r": 3}),
        ("qwen2", {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}}, {"target_modules": ["q_proj"]}),
    ],
)
def test_heads_and_rows_of_embeddings_that_train_differ_by_row(family, first, second):
    model = tiny(family, torch.float64)
    ids = torch.tensor([[3, 4, 5], [9, 3, 5], [3, 4, 5], [5, 9, 3]])
    inject_(model, LoraConfig(**{"r": 2, **first}), adapter="one")
    randomise_adapter(model)
    inject_(model, LoraConfig(**{"r": 2, **second}), adapter="two")
    randomise_adapter(model, seed=2)
    expected, gradients = {}, {}
    for name in ("one", "two"):
        activate_(model, name)
        expected[name] = model(ids).logits
        parameters = trainable_parameters(model)
        rows = [index for index, own in enumerate(("two", None, "one", "one")) if own == name]
        gradients[name] = torch.autograd.grad(expected[name][rows].square().sum(), parameters, allow_unused=True)
    with adapters_off(model):
        expected[None] = model(ids).logits
    by_row = ("two", None, "one", "one")
    activate_(model, "one")
    with adapters_by_row(model, by_row):
        together = model(ids).logits
        for index, name in enumerate(by_row):
            torch.testing.assert_close(together[index], expected[name][index], rtol=1e-10, atol=1e-10)
        own = trainable_parameters(model)
    found = torch.autograd.grad(together.square().sum(), own, allow_unused=True)
    assert len(found) == len(gradients["one"])
    for one, other in zip(found, gradients["one"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(ids).logits, expected["one"])


def test_a_combined_adapter_names_the_base_and_the_task_on_which_its_sources_agree():
    model = nn.Sequential(nn.Linear(6, 6))
    for name, base in (("one", "org/base"), ("two", None), ("other", "org/other")):
        config = LoraConfig(r=2, task_type="CAUSAL_LM", base_model_name_or_path=base)
        inject_(model, config, adapter=name)
    combine_adapters_(model, {"one": 1.0, "two": 0.5}, "same")
    combine_adapters_(model, {"one": 1.0, "other": 0.5}, "mixed")
    same, mixed = (injection(model).configs[name] for name in ("same", "mixed"))
    assert (same.base_model_name_or_path, same.task_type) == ("org/base", "CAUSAL_LM")
    assert (mixed.base_model_name_or_path, mixed.task_type) == (None, "CAUSAL_LM")
