"""A new adapter in a model whose weights hold merged ones: those stay at work, and the base comes back bit for bit."""

import pytest
import torch
from conftest import randomise_adapter, tiny
from torch import nn

from rankwise import (
    LoraConfig,
    activate_,
    combine_adapters_,
    eject_,
    inject_,
    load_adapter_,
    merge_,
    save_adapter,
    trainable_parameters,
    unmerge_,
)
from rankwise.errors import CheckpointError, ConfigError, MergeError
from rankwise.lora.inject import adapters_off


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FIRST = {
    "plain": LoraConfig(r=2, target_modules=["0"]),
    "biases": LoraConfig(r=2, target_modules=["0"], bias="lora_only"),
    "both biases": LoraConfig(r=2, target_modules=["0"], bias="lora_only", lora_bias=True),
    "head": LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]),
}


@pytest.mark.parametrize("first", FIRST)
def test_a_merged_adapter_stays_at_work_beside_a_new_one_and_the_base_comes_back(first):
    model = two_layers()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject_(model, FIRST[first], adapter="a")
    randomise_adapter(model)
    merge_(model)
    merged = model(X)
    target = "0" if first == "head" else "1"
    inject_(model, LoraConfig(r=2, target_modules=[target]), adapter="b")
    torch.testing.assert_close(model(X), merged, rtol=1e-12, atol=1e-12)
    own = trainable_parameters(model)
    assert sum(parameter.numel() for parameter in own) == 2 * (4 + 4)
    with adapters_off(model):
        torch.testing.assert_close(model(X), two_layers()(X), rtol=0, atol=0)
    unmerge_(model)
    eject_(model)
    assert model.state_dict().keys() == base.keys()
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())


def test_a_load_that_fails_beside_a_merged_adapter_changes_nothing(tmp_path):
    other = two_layers()
    inject_(other, LoraConfig(r=2, target_modules=["0", "1"]))
    save_adapter(other, tmp_path)
    model = nn.Sequential(two_layers()[0], nn.Linear(4, 3)).double()
    inject_(model, FIRST["both biases"], adapter="a")
    randomise_adapter(model)
    merge_(model)
    before = model(X)
    with pytest.raises(CheckpointError):
        load_adapter_(model, tmp_path, adapter="b")
    assert torch.equal(model(X), before)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("plain", {"bias": "all"}, "the biases are merged"),
        ("plain", {"use_dora": True}, "a DoRA adapter cannot work beside a merged one"),
        ("head", {"modules_to_save": ["1"]}, "1 is trained by a merged adapter"),
    ],
)
def test_what_cannot_work_beside_a_merged_adapter_is_refused_before_anything_changes(first, second, message):
    model = two_layers()
    inject_(model, FIRST[first], adapter="a")
    randomise_adapter(model)
    merge_(model)
    before = model(X)
    with pytest.raises(ConfigError, match=message):
        inject_(model, LoraConfig(r=2, target_modules=["0"], **second), adapter="b")
    assert torch.equal(model(X), before)


def test_biases_at_work_that_are_merged_do_not_change():
    model = two_layers()
    inject_(model, LoraConfig(r=2, target_modules=["0"], lora_bias=True), adapter="a")
    inject_(model, LoraConfig(r=2, target_modules=["0"], bias="lora_only"), adapter="c")
    activate_(model, {"a": 1.0, "c": 1.0})
    randomise_adapter(model)
    merge_(model, ["a"])
    before = model(X)
    with pytest.raises(MergeError, match="a bias that another adapter trains is merged"):
        inject_(model, LoraConfig(r=2, target_modules=["1"]), adapter="b")
    assert torch.equal(model(X), before)


def test_a_classifiers_head_stays_with_its_merged_adapter():
    model = tiny("bert")
    ids = torch.tensor([[3, 4, 5, 6]])
    inject_(model, LoraConfig(r=2, task_type="SEQ_CLS"), adapter="a")
    randomise_adapter(model)
    merge_(model)
    merged = model(ids).logits
    inject_(model, LoraConfig(r=2, target_modules=["query"]), adapter="b")
    torch.testing.assert_close(model(ids).logits, merged)


def test_adapters_combine_while_another_is_merged():
    model = two_layers()
    for name in ("a", "b", "c"):
        inject_(model, LoraConfig(r=1, target_modules=["0"]), adapter=name)
        randomise_adapter(model, seed=len(name))
    activate_(model, "a")
    merge_(model)
    combine_adapters_(model, {"b": 1.0, "c": 1.0}, "sum")
    together = model(X)
    unmerge_(model)
    activate_(model, {"a": 1.0, "b": 1.0, "c": 1.0})
    torch.testing.assert_close(model(X), together, rtol=1e-10, atol=1e-10)
