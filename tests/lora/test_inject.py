from dataclasses import replace

import peft
import pytest
import torch
from conftest import randomise_adapter, tiny
from torch import nn
from torch.nn import functional as F
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

from rankwise import (
    LoraConfig,
    TaskType,
    adapters_off,
    eject_,
    inject_,
    merge_,
    register_layer,
    trainable_parameters,
)
from rankwise.errors import ConfigError, TargetError
from rankwise.lora import kinds
from rankwise.lora.convolution import LoraConv

IDS = torch.arange(3, 19).view(2, 8)
FAMILIES = ["llama", "llama-tied", "gpt2", "gpt-neox", "bloom"]


def targets_with_embedding(family):
    names = {
        "llama": ["embed_tokens", "q_proj", "down_proj"],
        "llama-tied": ["embed_tokens", "q_proj"],
        "gpt2": ["wte", "c_attn", "c_fc"],
        "gpt-neox": ["embed_in", "query_key_value"],
        "bloom": ["word_embeddings", "query_key_value"],
    }
    return names[family]


@pytest.mark.parametrize("family", ["gpt-neox", "bloom"])
def test_the_snippet_of_the_ecosystem_runs_as_it_stands(family):
    model = tiny(family)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        inference_mode=False,
        r=8,
        lora_alpha=32,
        lora_dropout=0.1,
        target_modules=["query_key_value"],
    )
    report = inject_(model, config)
    assert [m.name.rpartition(".")[2] for m in report.matrices] == ["query_key_value"] * 2
    assert sum(p.numel() for p in trainable_parameters(model)) == report.trainable_parameters == 2 * 8 * (96 + 32)
    assert all(p.requires_grad == (id(p) in {id(t) for t in trainable_parameters(model)}) for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_computes_exactly_as_the_base(family):
    model = tiny(family)
    before = model(IDS).logits
    inject_(model, LoraConfig(target_modules=targets_with_embedding(family), lora_dropout=0.5))
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_off_is_the_base_and_eject_gives_it_back_bit_for_bit(family):
    model = tiny(family)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    before = model(IDS).logits
    inject_(model, LoraConfig(target_modules=targets_with_embedding(family)))
    randomise_adapter(model)
    assert not torch.equal(model(IDS).logits, before)
    with adapters_off(model):
        assert torch.equal(model(IDS).logits, before)
    eject_(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert torch.equal(model(IDS).logits, before)


def test_adapters_come_back_on_after_an_error_inside_adapters_off():
    model = tiny("llama")
    inject_(model, LoraConfig())
    randomise_adapter(model)
    adapted = model(IDS).logits
    with pytest.raises(ZeroDivisionError), adapters_off(model):
        raise ZeroDivisionError
    assert torch.equal(model(IDS).logits, adapted)


def test_a_layer_computes_the_definition_of_lora():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Embedding(7, 4)).double()
    inject_(model, LoraConfig(r=3, lora_alpha=12, target_modules=["0", "1"]))
    randomise_adapter(model)
    x, ids = torch.randn(2, 6, dtype=torch.float64), torch.tensor([3, 0, 3])
    linear, embedding = model[0], model[1]
    one, other = linear.update("default"), embedding.update("default")
    expected = F.linear(x, linear.base.weight, linear.base.bias) + 4 * (x @ one.lora_A.T @ one.lora_B.T)
    torch.testing.assert_close(linear(x), expected, rtol=1e-12, atol=1e-12)
    one_hot = F.one_hot(ids, 7).double()
    expected = one_hot @ embedding.base.weight + 4 * (one_hot @ other.lora_A.T @ other.lora_B.T)
    torch.testing.assert_close(embedding(ids), expected, rtol=1e-12, atol=1e-12)


def test_dropout_acts_on_the_input_of_the_adapter_path_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 3, bias=False))
    inject_(model, LoraConfig(r=2, lora_alpha=2, lora_dropout=0.25, target_modules=["0"]))
    randomise_adapter(model)
    layer, x = model[0].train(), torch.ones(1, 400)
    update = layer.update("default")
    torch.manual_seed(5)
    mask = F.dropout(x, 0.25)
    assert mask.unique().tolist() == pytest.approx([0, 1 / 0.75])
    torch.manual_seed(5)
    expected = layer.base(x) + mask @ update.lora_A.T @ update.lora_B.T
    torch.testing.assert_close(layer(x), expected)
    layer.eval()
    torch.testing.assert_close(layer(x), layer.base(x) + x @ update.lora_A.T @ update.lora_B.T)


def test_all_linear_means_every_linear_layer_but_the_output_head():
    for family, head in (("llama", "lm_head"), ("gpt2", "lm_head"), ("gpt-neox", "lm_head"), ("bert", "classifier")):
        model = tiny(family)
        linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
        task = TaskType.SEQ_CLS if family == "bert" else TaskType.CAUSAL_LM
        adapted = {m.name for m in inject_(model, LoraConfig(task_type=task, r=2)).matrices}
        assert adapted == linear - {head}


def test_the_report_counts_what_the_formula_says():
    model = tiny("llama")
    report = inject_(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj"]))
    assert [(m.d, m.k, m.full, m.trained) for m in report.matrices] == [
        (32, 32, 1024, 4 * 64),
        (16, 32, 512, 4 * 48),
    ] * 2
    assert report.factor == (1024 + 512) / (256 + 192)
    assert report.total_parameters == sum(p.numel() for p in tiny("llama").parameters())
    assert report.share == report.trainable_parameters / report.total_parameters
    assert "1,024" in str(report)


def test_target_rules_are_those_of_peft():
    for targets in (["q_proj", "mlp.up_proj"], r".*\.0\..*_proj", ["model.layers.1.self_attn.o_proj"], "all-linear"):
        theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=targets)).targeted_module_names
        ours = inject_(tiny("llama"), LoraConfig(target_modules=targets)).matrices
        assert sorted(m.name for m in ours) == sorted(theirs)


def test_every_pattern_that_matches_nothing_is_named_with_its_nearest_modules():
    model = tiny("llama")
    with pytest.raises(TargetError) as error:
        inject_(model, LoraConfig(target_modules=["q_proj", "k_porj", "gate"]))
    assert "'k_porj' matches no module (nearest: 'k_proj'" in str(error.value)
    assert "'gate'" in str(error.value)
    assert "'q_proj' matches" not in str(error.value)
    assert not any(hasattr(m, "lora_A") for m in model.modules()), "a refused injection leaves the model as it was"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_proj", r'write target_modules=\["q_proj"\]'),
        ("(", "not a regular expression"),
        (["norm"], "cannot carry an adapter"),
        ([], "target_modules is empty"),
    ],
)
def test_patterns_that_cannot_be_used_say_why(targets, message):
    with pytest.raises((TargetError, ConfigError), match=message):
        inject_(tiny("llama"), LoraConfig(target_modules=targets))


def test_a_module_whose_weight_is_read_behind_its_back_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    with pytest.raises(TargetError, match="without calling it"):
        inject_(model, LoraConfig(r=2, target_modules=["out_proj"]))
    assert [m.name for m in inject_(model, LoraConfig(r=2)).matrices] == ["out"]


class Same(nn.Conv2d):
    """Pads as much as its input needs."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Renamed(nn.Conv2d):
    """Computes as its base."""


class Learned(nn.Embedding):
    """Looks positions up."""

    def forward(self, mask):
        return super().forward(mask.cumsum(-1))


class Scaled(nn.Embedding):
    embed_scale = 2.0

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("inner", [Same(2, 3, 3), Learned(5, 4), WeightStandardizedConv2d(2, 3, 3)], ids=str)
def test_a_layer_that_computes_in_a_way_of_its_own_is_refused_or_registered(inner):
    model = nn.ModuleDict({"inner": inner, "linear": nn.Linear(4, 4)})
    before = dict(model.named_modules())
    config = LoraConfig(r=2, target_modules=["inner", "linear"])
    with pytest.raises(
        TargetError, match=rf"inner: its class, {type(inner).__name__},.*exclude_modules.*register_layer"
    ):
        inject_(model, config)
    assert dict(model.named_modules()) == before
    report = inject_(model, replace(config, exclude_modules=["inner"]))
    assert [matrix.name for matrix in report.matrices] == ["linear"]
    if isinstance(inner, nn.Embedding):
        with pytest.raises(TargetError, match="inner: its class"):
            inject_(model, LoraConfig(r=2, trainable_token_indices={"inner": [1]}), adapter="rows")


def test_a_user_may_say_how_a_layer_of_a_way_of_its_own_is_adapted(monkeypatch):
    class LoraSame(LoraConv):
        def product(self, update, x):
            return super().product(update, F.pad(x, (1, 1, 1, 1)))

    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))
    register_layer(Same, LoraSame)
    model = nn.Sequential(Same(2, 3, 3), Renamed(3, 3, 3)).double()
    inject_(model, LoraConfig(r=2, target_modules=["0", "1"]))
    randomise_adapter(model)
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    beside = model(x)
    merge_(model)
    torch.testing.assert_close(model(x), beside)


def test_an_embedding_that_multiplies_by_its_scale_is_adapted():
    model = nn.Sequential(Scaled(5, 4)).double()
    inject_(model, LoraConfig(r=2, target_modules=["0"]))
    randomise_adapter(model)
    beside = model(torch.arange(5))
    merge_(model)
    torch.testing.assert_close(model(torch.arange(5)), beside)


def test_settings_that_cannot_be_are_all_named_at_once():
    with pytest.raises(ConfigError) as error:
        LoraConfig(r=0, lora_dropout=1.0, lora_alpha=-1)
    assert all(name in str(error.value) for name in ("r must", "lora_dropout must", "lora_alpha must"))
    for r in (-1, 2.5, True):
        with pytest.raises(ConfigError, match="r must be a whole number"):
            LoraConfig(r=r)
    with pytest.raises(ConfigError, match=r"k_proj is 16 × 32, and r = 17 is larger"):
        inject_(tiny("llama"), LoraConfig(r=17))


@pytest.mark.parametrize(
    "setting",
    [{name: 5} for name in ("target_modules", "modules_to_save", "exclude_modules", "target_parameters")]
    + [{"trainable_token_indices": wrong} for wrong in (["5"], 5, [2.5], "5", {"embed_tokens": 5}, {3: [5]})]
    + [{"layers_to_transform": 2.5}, {"target_modules": ["q_proj", 2]}],
    ids=str,
)
def test_a_setting_of_another_type_is_named(setting):
    [name] = setting
    with pytest.raises(ConfigError, match=f"{name} must .*found"):
        LoraConfig(**setting)


def test_an_orthogonal_start_says_what_must_be_even():
    with pytest.raises(ConfigError, match="r / groups, found 1"):
        inject_(
            nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)),
            LoraConfig(r=2, target_modules=["0"], init_lora_weights="orthogonal"),
        )


def test_what_is_pefts_is_told_apart():
    model = tiny("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"must be a rankwise\.LoraConfig, found peft\.tuners"):
        inject_(model, config)
    for adapter in (3, None):
        with pytest.raises(ConfigError, match=f"{adapter} cannot name an adapter"):
            inject_(model, LoraConfig(), adapter=adapter)
    theirs = peft.get_peft_model(model, config)
    for wrapped in (theirs, model):
        with pytest.raises(ConfigError, match="PEFT has put adapters into this model"):
            inject_(wrapped, LoraConfig(r=2))


def test_leaving_out_all_that_is_named_is_an_error():
    settings = {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}
    with pytest.raises(TargetError, match="exclude_modules leaves out every module that target_modules names"):
        inject_(tiny("llama"), LoraConfig(r=2, **settings))


def test_a_second_injection_is_refused():
    model = tiny("llama")
    inject_(model, LoraConfig())
    with pytest.raises(ConfigError, match="already carries an adapter"):
        inject_(model, LoraConfig())
    eject_(model)
    with pytest.raises(ConfigError, match="carries no adapter"):
        eject_(model)


def test_a_classifier_head_is_trained_as_a_copy_and_its_original_comes_back():
    model = tiny("bert")
    original = model.classifier
    weight = original.weight.clone()
    before = model(IDS).logits
    report = inject_(model, LoraConfig(task_type="SEQ_CLS"))
    assert report.heads == {"classifier": 32 * 5 + 5}
    randomise_adapter(model)
    assert not torch.equal(model(IDS).logits, before)
    with adapters_off(model):
        assert torch.equal(model(IDS).logits, before)
    eject_(model)
    assert model.classifier is original
    assert torch.equal(original.weight, weight)
    assert torch.equal(model(IDS).logits, before)
