"""Starts, trained rows and biases, bare parameters, patterns: each against its definition."""

import json

import peft
import pytest
import torch
from conftest import randomise_adapter, tiny
from torch import nn
from torch.nn import functional as F

from rankwise import (
    LoraConfig,
    eject_,
    inject_,
    load_adapter_,
    merge_,
    reset_adapter_,
    save_adapter,
    start_from_data_,
    start_from_original_,
)
from rankwise.errors import CheckpointError, ConfigError, TargetError
from rankwise.lora import start as start_module
from rankwise.lora.inject import adapters_off, trainable_parameters
from rankwise.lora.places import named_lora_layers

IDS = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])
LINEAR = ["q_proj", "up_proj"]


def close(ours, theirs, tolerance=1e-11):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def next_token_loss(model):
    return lambda ids: F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_8", "olora", "orthogonal", "gaussian", True])
@pytest.mark.parametrize("dora", [False, True])
def test_every_start_begins_as_the_base_which_keeps_its_bits(start, dora, tmp_path):
    model = tiny("llama", torch.float64)
    before = model(IDS).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject_(model, LoraConfig(r=4, target_modules=LINEAR, init_lora_weights=start, use_dora=dora))
    close(model(IDS).logits, before)
    with adapters_off(model):
        assert torch.equal(model(IDS).logits, before)
    randomise_adapter(model)
    trained = model(IDS).logits
    assert (trained - before).abs().max() > 1e-3
    save_adapter(model, tmp_path)
    merge_(model)
    close(model(IDS).logits, trained)
    eject_(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    again = tiny("llama", torch.float64)
    load_adapter_(again, tmp_path)
    close(again(IDS).logits, trained)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_with_dropout_too_a_start_from_the_base_begins_as_the_base(start):
    model = tiny("llama", torch.float64)
    before = model(IDS).logits
    inject_(model, LoraConfig(r=4, target_modules=LINEAR, init_lora_weights=start, lora_dropout=0.5))
    close(model.train()(IDS).logits, before)


def test_a_start_from_the_base_is_saved_as_plain_lora_of_twice_the_rank(tmp_path):
    model = tiny("llama")
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=LINEAR,
        init_lora_weights="pissa",
        use_rslora=True,
        rank_pattern={"up_proj": 2},
    )
    inject_(model, config)
    randomise_adapter(model)
    save_adapter(model, tmp_path)
    saved = peft.LoraConfig.from_pretrained(tmp_path)
    assert (saved.r, saved.rank_pattern, saved.init_lora_weights) == (8, {"up_proj": 4}, True)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, theirs, rtol=1e-5, atol=1e-5)


def test_pissa_takes_the_largest_singular_values():
    weight = tiny("llama", torch.float64).model.layers[0].mlp.up_proj.weight
    model = tiny("llama", torch.float64)
    inject_(model, LoraConfig(r=4, lora_alpha=8, target_modules=["up_proj"], init_lora_weights="pissa"))
    update = model.model.layers[0].mlp.up_proj.update("default")
    left = torch.linalg.svdvals(weight - update.scale * update.lora_B @ update.lora_A)
    close(left[: len(left) - 4], torch.linalg.svdvals(weight)[4:])
    close(left[len(left) - 4 :], torch.zeros(4, dtype=torch.float64))


def test_eva_starts_in_the_directions_of_the_inputs_and_keeps_the_sum_of_ranks():
    model = tiny("llama", torch.float64)
    before = model(IDS).logits
    inject_(model, LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="eva"))
    seen = []
    handle = model.model.layers[0].self_attn.q_proj.base.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    ranks = start_from_data_(model, [IDS, IDS + 1], next_token_loss(model))
    handle.remove()
    assert sum(ranks.values()) == 4 * len(ranks)
    assert {layer.update("default").r for _, layer in named_lora_layers(model)} == set(ranks.values())
    close(model(IDS).logits, before)
    x = torch.cat(seen).flatten(0, 1)
    A = model.model.layers[0].self_attn.q_proj.update("default").lora_A
    best = torch.linalg.svd(x, full_matrices=False).Vh[: len(A)]
    close(A.T @ A, best.T @ best, 1e-6)
    assert [p.requires_grad for p in trainable_parameters(model)] == [True] * 2 * len(ranks)


def test_lora_ga_moves_the_weights_as_full_fine_tuning_would_along_its_directions():
    model = tiny("llama", torch.float64)
    before = model(IDS).logits
    inject_(model, LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights="lora_ga"))
    loss = next_token_loss(model)
    start_from_data_(model, [IDS], loss)
    close(model(IDS).logits, before)
    plain = tiny("llama", torch.float64)
    next_token_loss(plain)(IDS).backward()
    gradient = plain.model.layers[0].mlp.up_proj.weight.grad
    update = model.model.layers[0].mlp.up_proj.update("default")
    # What one gradient step on A and B moves: its projection on the gradient is that of the 2r main directions.
    loss(IDS).backward()
    moved = update.lora_B @ update.lora_A.grad + update.lora_B.grad @ update.lora_A
    cosine = F.cosine_similarity(moved.detach().flatten(), gradient.flatten(), dim=0)
    energy = torch.linalg.svdvals(gradient).square()
    assert cosine.item() == pytest.approx((energy[:8].sum() / energy.sum()).sqrt().item(), abs=1e-6)


def test_corda_takes_what_the_inputs_use_most():
    model = tiny("llama", torch.float64)
    before = model(IDS).logits
    inject_(model, LoraConfig(r=4, lora_alpha=4, target_modules=["up_proj"], init_lora_weights="corda"))
    seen = []
    handle = model.model.layers[0].mlp.up_proj.base.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    start_from_data_(model, [IDS], next_token_loss(model))
    handle.remove()
    close(model(IDS).logits, before)
    x = torch.cat(seen).flatten(0, 1)
    weight = model.model.layers[0].mlp.up_proj.base.weight
    update = model.model.layers[0].mlp.up_proj.update("default")
    left = (weight - update.lora_B @ update.lora_A) @ (x.T @ x)
    values = torch.linalg.svdvals(weight @ (x.T @ x))
    close(left.norm(), values[4:].norm(), 1e-4)


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_a_reset_takes_a_start_from_data_away(start, tmp_path):
    model = tiny("llama", torch.float64)
    before = model(IDS).logits
    config = LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=start)
    inject_(model, config)
    start_from_data_(model, [IDS], next_token_loss(model))
    reset_adapter_(model, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(IDS).logits, before)
    other = tiny("llama", torch.float64)
    inject_(other, config, torch.Generator().manual_seed(0))
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4


def test_a_start_from_the_original_takes_the_place_of_one_from_the_base():
    model = nn.Sequential(nn.Linear(6, 5).double())
    inject_(model, LoraConfig(r=5, lora_alpha=5, target_modules=["0"], init_lora_weights="pissa"))
    original = {"0.weight": torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    start_from_original_(model, original)
    close(model[0].base.weight + model[0].delta("default", torch.float64), original["0.weight"])


def test_a_start_from_data_that_cannot_be_is_refused():
    model = tiny("llama")
    inject_(model, LoraConfig(r=2))
    with pytest.raises(ConfigError, match="eva, corda, lora_ga"):
        start_from_data_(model, [IDS], next_token_loss(model))
    eject_(model)
    inject_(model, LoraConfig(r=2, init_lora_weights="eva"))
    with pytest.raises(ConfigError, match="did not reach"):
        start_from_data_(model, [], next_token_loss(model))


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_only_the_rows_of_the_chosen_tokens_train_and_a_tied_head_uses_them(family, tmp_path):
    model = tiny(family)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject_(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 90]))
    before = model(IDS).logits
    torch.testing.assert_close(before, tiny(family)(IDS).logits)
    randomise_adapter(model, std=0.5)
    ours = model(IDS).logits
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path)(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    again = tiny(family)
    load_adapter_(again, tmp_path)
    assert torch.equal(again(IDS).logits, ours)
    eject_(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_copies_that_adapters_off_takes_away(bias, tmp_path):
    model = tiny("gpt2")
    before = model(IDS).logits
    report = inject_(model, LoraConfig(r=2, target_modules=["c_attn"], bias=bias))
    assert report.trainable_parameters == sum(p.numel() for p in trainable_parameters(model))
    randomise_adapter(model, std=0.2)
    ours = model(IDS).logits
    with adapters_off(model):
        assert torch.equal(model(IDS).logits, before)
    assert torch.equal(model(IDS).logits, ours)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("gpt2"), tmp_path)(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    eject_(model)
    assert torch.equal(model(IDS).logits, before)


class Experts(nn.Module):
    """A mixture's fused weights as transformers keeps them."""

    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        shapes = ((3, 8, 12), (3, 6, 8)) if is_transposed else ((3, 12, 8), (3, 8, 6))
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x):
        first, second = self.gate_up_proj, self.down_proj
        if not self.is_transposed:
            first, second = first.mT, second.mT
        gate, up = (x @ first).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ second


def experts(is_transposed):
    torch.manual_seed(0)
    return nn.ModuleDict({"experts": Experts(is_transposed)}).double()


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("names", [["experts.gate_up_proj"], ["experts.gate_up_proj", "experts.down_proj"]])
def test_the_fused_weights_of_experts_get_an_update_each_as_in_peft(names, is_transposed, tmp_path):
    base = experts(is_transposed)
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=[], target_parameters=names, init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    x = torch.randn(3, 5, 8).double()
    expected = theirs.base_model.model["experts"](x)
    model = experts(is_transposed)
    report = load_adapter_(model, tmp_path / "theirs", trainable=True)
    assert {m.count for m in report.matrices} == {3}
    close(model["experts"](x), expected)
    gradient = torch.autograd.grad(model["experts"](x).sum(), trainable_parameters(model))
    assert all(g.abs().max() > 0 for g in gradient)
    save_adapter(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(experts(is_transposed), tmp_path / "ours")
    close(back.base_model.model["experts"](x), expected)
    merge_(model)
    close(model["experts"](x), expected)
    eject_(model)
    assert torch.equal(model["experts"](x), experts(is_transposed)["experts"](x))


def test_blocks_and_exclusions_choose_modules_as_in_peft():
    for config in (
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj", "layers.1.mlp.up_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"},
    ):
        theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(**config)).targeted_module_names
        ours = inject_(tiny("llama"), LoraConfig(**config)).matrices
        assert sorted(m.name for m in ours) == sorted(theirs)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"rank_pattern": {"q_porj": 2}}, ConfigError, r"rank_pattern key 'q_porj' matches no .*nearest: 'q_proj'"),
        ({"alpha_pattern": {"lm_head": 2}}, ConfigError, "alpha_pattern key 'lm_head' matches no"),
        ({"rank_pattern": {"q_proj": 40}}, ConfigError, "r = 40 is larger"),
        ({"exclude_modules": ["nothing"]}, TargetError, "exclude_modules: 'nothing' matches no module"),
        ({"layers_to_transform": [1, 7]}, TargetError, r"blocks \[7\] \(there are: 0 to 1\)"),
        ({"target_parameters": ["gate_up_proj"]}, TargetError, "target_parameters 'gate_up_proj' matches none"),
        ({"trainable_token_indices": [96]}, TargetError, r"there are no rows \[96\]"),
    ],
)
def test_a_setting_that_matches_nothing_is_an_error_and_nothing_changes(config, error, message):
    model = tiny("llama")
    with pytest.raises(error, match=message):
        inject_(model, LoraConfig(**{"r": 2, **config}))
    assert model.state_dict().keys() == tiny("llama").state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


def test_settings_that_contradict_each_other_are_all_named():
    with pytest.raises(ConfigError) as error:
        LoraConfig(bias="some", init_lora_weights="magic", lora_bias=True, use_dora=True, layers_pattern="layers")
    for part in ("bias must be", "init_lora_weights 'magic'", "lora_bias goes with", "layers_pattern says"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("start", "advice"),
    [
        ("pissa_niter_4", "path_initial_model_for_weight_conversion"),
        ("corda", "path_initial_model_for_weight_conversion"),
        ("loftq", "set init_lora_weights to true"),
    ],
)
def test_a_start_that_the_file_cannot_hold_is_refused(start, advice, tmp_path):
    peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": start}))
    with pytest.raises(CheckpointError, match=advice):
        load_adapter_(tiny("llama"), tmp_path)


def test_dora_sees_base_values_that_are_loaded_after_injection():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(3, 6, dtype=torch.float64)
    inject_(model, LoraConfig(r=2, target_modules=["0"], use_dora=True))
    randomise_adapter(model)
    model(x)
    with torch.no_grad():
        model[0].base.weight.mul_(3)
    update, base = model[0].update("default"), model[0].base
    changed = base.weight + update.low_rank().delta(torch.float64)
    expected = F.linear(x, changed * (update.magnitude / changed.norm(dim=1))[:, None], base.bias)
    close(model(x), expected)


@pytest.mark.parametrize(
    ("start", "broken"),
    # EVA looks at no weight.
    [("eva", "input"), ("corda", "input"), ("lora_ga", "input"), ("corda", "weight"), ("lora_ga", "weight")],
)
def test_a_start_from_what_is_not_finite_names_the_layer_and_changes_nothing(start, broken):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    if broken == "weight":
        with torch.no_grad():
            model[1].weight[0, 0] = torch.nan
    inject_(model, LoraConfig(r=2, init_lora_weights=start))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loss(x):
        # The second layer's input, and so the first one's gradient too, is not finite.
        return model[1](model[0](x) / (0.0 if broken == "input" else 1.0)).square().mean()

    with pytest.raises(ConfigError, match=r"\b1\b.* (are|is) not finite"):
        start_from_data_(model, [torch.ones(4, 8)], loss)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_from_a_weight_that_is_not_finite_is_told_before_anything_is_changed(start):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.inf
    with pytest.raises(ConfigError, match=r"starts from the weights, and these are not finite(.|\n)*\b1\b"):
        inject_(model, LoraConfig(r=2, init_lora_weights=start))
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("broken", ["original", "base"])
def test_loftq_over_what_is_not_finite_names_the_layer_and_changes_nothing(broken):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    original = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        (original["1.weight"] if broken == "original" else model[1].weight)[0, 0] = torch.nan
    inject_(model, LoraConfig(r=2))
    before = [parameter.detach().clone() for parameter in trainable_parameters(model)]
    with pytest.raises(ConfigError, match=r"\b1\b.* not finite"):
        start_from_original_(model, original)
    assert all(torch.equal(old, new) for old, new in zip(before, trainable_parameters(model), strict=True))


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_a_start_from_data_that_fails_at_a_later_layer_changes_none(start, monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    inject_(model, LoraConfig(r=2, init_lora_weights=start))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    real, calls = getattr(start_module, start), []

    def fails_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.linalg.LinAlgError("did not converge")
        return real(*arguments)

    monkeypatch.setattr(start_module, start, fails_second)
    with pytest.raises(torch.linalg.LinAlgError):
        start_from_data_(model, [torch.randn(4, 8)], lambda x: model(x).square().mean())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
