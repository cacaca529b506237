"""Generated cases, each run here and in real PEFT: outputs, gradients, merged outputs, files, both ways.

What a case holds is drawn from its number, so a failure can be repeated by itself. Cases that PEFT cannot do, or does
wrongly, are not drawn here; test_where_peft_is_wrong.py shows those from the definition.
"""

import random
import warnings
from copy import deepcopy

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankwise import eject_, load_adapter_, merge_, save_adapter, unmerge_
from rankwise.lora.checkpoint import _slots
from rankwise.lora.places import named_wrappers

CASES, CASES_FROM_DATA, CASES_IN_BF16 = 600, 100, 100
IDS = torch.tensor([[3, 0, 7, 7, 1, 9], [2, 2, 5, 10, 4, 8]])
LAYERS = ["table", "up", "down", "gate", "mix", "hf", "conv1", "conv2", "conv3"]


class Experts(nn.Module):
    """A mixture of all experts, whose weights are one parameter."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 12, 12) / 6)

    def forward(self, x):
        return sum(x @ weight for weight in self.weights)


class Zoo(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 12)
        self.up = nn.Linear(12, 10)
        self.down = nn.Linear(10, 12, bias=False)
        self.norm = nn.LayerNorm(12)
        self.body = nn.ModuleDict()
        self.body["blocks"] = nn.ModuleList(nn.ModuleDict({"gate": nn.Linear(12, 12)}) for _ in range(2))
        self.experts = Experts()
        self.mix = nn.MultiheadAttention(12, 3, batch_first=True)
        self.hf = Conv1D(9, 12)
        self.conv1 = nn.Conv1d(9, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(8, 6, (3, 1), padding=(1, 0), bias=False)
        self.conv3 = nn.Conv3d(6, 5, (2, 1, 1))
        self.score = nn.Linear(5, 3)

    def forward(self, ids):
        x = self.table(ids)
        x = self.norm(x + self.down(torch.tanh(self.up(x))))
        for block in self.body["blocks"]:
            x = x + torch.tanh(block["gate"](x))
        x = x + torch.tanh(self.experts(x))
        x = x + self.mix(x, x, x, need_weights=False)[0]
        x = self.conv1(torch.tanh(self.hf(x)).transpose(1, 2))
        x = self.conv2(torch.tanh(x)[..., None])
        x = self.conv3(torch.tanh(x)[..., None])
        return self.score(torch.tanh(x).mean((2, 3, 4)))


def zoo(dtype):
    torch.manual_seed(0)
    return Zoo().to(dtype).eval()


def draw(number):
    """(configuration, dtype) of a case."""
    rng = random.Random(number)
    start = rng.choice([True] * 4 + [False, "gaussian", "orthogonal", "pissa", "olora"])
    from_base = start in ("pissa", "olora")
    # PEFT's starts from the base know fp32 and nn.Linear only.
    layers = ["up", "down", "gate"] if isinstance(start, str) and start != "gaussian" else LAYERS
    targets = rng.sample(layers, rng.randrange(1, len(layers) + 1))
    config = {"target_modules": targets, "r": rng.choice([2, 4]), "lora_alpha": rng.choice([4, 8, 32])}
    if from_base:
        # PEFT stores W0 less the start in fp32; a scale far above 1 would compare that rounding and nothing else.
        config["lora_alpha"] = config["r"]
    config["init_lora_weights"] = start
    config["use_rslora"] = rng.random() < 0.3
    config["use_dora"] = not from_base and "mix" not in targets and rng.random() < 0.35
    if rng.random() < 0.3:
        config["rank_pattern"] = {rng.choice([targets[0], f"{targets[0][:-1]}."]): 4 if start == "orthogonal" else 3}
    if rng.random() < 0.3:
        config["alpha_pattern"] = {targets[-1]: 5}
    config["bias"] = rng.choice(["none"] * 3 + ["all", "lora_only"])
    if start in (True, False) and not config["use_dora"] and not {"table", "mix"} & {*targets}:
        config["lora_bias"] = rng.random() < 0.3
    if rng.random() < 0.2:
        config["modules_to_save"] = ["score"]
    if "table" not in targets and rng.random() < 0.3:
        config["trainable_token_indices"] = {"table": [7, 0]}
    if len(targets) > 1 and rng.random() < 0.2:
        config["exclude_modules"] = [targets[1]]
        config.pop("alpha_pattern", None)
    if "gate" in targets and rng.random() < 0.5:
        # The other targets stand in no block.
        config["layers_to_transform"] = rng.choice([1, [0], [0, 1]])
        config["layers_pattern"] = rng.choice([None, "blocks"])
        named = ("rank_pattern", "alpha_pattern", "exclude_modules")
        config = {"target_modules": ["gate"]} | {k: v for k, v in config.items() if k not in (*named, "target_modules")}
    # PEFT trains parameters beside neither DoRA, biases in the update, dropout, other starts nor a Conv1D.
    plain = start in (True, False) and not config["use_dora"] and not config.get("lora_bias")
    if plain and "hf" not in config["target_modules"] and rng.random() < 0.5:
        config["target_parameters"] = ["experts.weights"]
    config["lora_dropout"] = 0.0 if "target_parameters" in config else rng.choice([0.0, 0.1])
    # PEFT believes it for the output projection of an attention, and turns that update round.
    turned = {"target_parameters"} & {*config} or "mix" in config["target_modules"]
    config["fan_in_fan_out"] = not turned and rng.random() < 0.2
    dtype = torch.float32 if from_base or rng.random() < 0.4 else torch.float64
    return config, dtype


def draw_from_data(number):
    """The same for starts that need data, or a conversion when they are saved."""
    rng = random.Random(number)
    start = rng.choice(["eva", "corda", "lora_ga", "pissa", "olora"])
    targets = rng.sample(["up", "down", "gate"], rng.randrange(1, 4))
    config = {"target_modules": targets, "r": rng.choice([2, 4]), "init_lora_weights": start}
    config["lora_alpha"] = config["r"]
    config["use_rslora"] = rng.random() < 0.3
    if start == "eva":
        config["eva_config"] = peft.EvaConfig(rho=rng.choice([1.0, 2.0]))
        config["use_dora"] = rng.random() < 0.35
        config["bias"] = rng.choice(["none", "all", "lora_only"])
        if rng.random() < 0.3:
            config["modules_to_save"] = ["score"]
        return config, rng.choice([torch.float32, torch.float64])
    # PEFT's conversion keeps A and B alone, and no patterns beside rsLoRA.
    if not config["use_rslora"] and rng.random() < 0.5:
        config["rank_pattern"] = {targets[0]: 3}
        config["alpha_pattern"] = {targets[-1]: 3}
    if start == "corda":
        config["corda_config"] = CordaConfig(corda_method=rng.choice(["ipm", "kpm"]))
    if start == "lora_ga":
        directions = ["ArBr", "A2rBr", "ArB2r", "random"]
        config["lora_ga_config"] = peft.LoraGAConfig(direction=rng.choice(directions), scale="gd_scale")
    return config, torch.float32


def in_peft(config, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        model = peft.get_peft_model(zoo(dtype), peft.LoraConfig(**config)).eval()
    return trained(model, dtype)


def trained(model, dtype):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # bias="all" unfreezes the original of a head too, which nothing uses.
            if parameter.requires_grad and "original_module" not in name:
                if "out_proj.lora_B" in name:  # An attention's output: PEFT counts its update twice.
                    parameter.zero_()
                    continue
                parameter += torch.randn(parameter.shape, generator=generator).to(dtype) * 0.05
    return model


def in_peft_from_data(config, dtype, folder):
    """Started, saved as it started where that has to be known later, trained, and saved as "theirs"."""
    start, base = config["init_lora_weights"], zoo(dtype)
    settings = peft.LoraConfig(**config)
    rows = torch.arange(88).view(8, 11).remainder(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        if start == "corda":
            preprocess_corda(base, settings, run_model=lambda: [base(row[None]) for row in rows])
        if start == "lora_ga":
            preprocess_loraga(base, settings, lambda: upstream(base(rows)).backward())
        model = peft.get_peft_model(base.eval(), settings).eval()
        if start == "eva":
            peft.initialize_lora_eva_weights(
                model,
                [{"ids": rows}] * 4,
                prepare_model_inputs_fn=None,
                prepare_layer_inputs_fn=lambda x, *_: (x[0] if isinstance(x, tuple) else x).flatten(0, -2),
                show_progress_bar=False,
            )
            trained(model, dtype).save_pretrained(folder / "theirs", save_embedding_layers=False)
            return model
        # Else PEFT would take the start out of the base once more when it loads it for the conversion.
        settings.init_lora_weights = True
        model.save_pretrained(folder / "start")
        settings.init_lora_weights = start
        converted = {"path_initial_model_for_weight_conversion": str(folder / "start")}
        trained(model, dtype).save_pretrained(folder / "theirs", **converted)
    return model


def loaded_in_peft(folder, dtype, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(zoo(dtype), folder, **options).eval()


def peft_gradients(model, output):
    """By name in the file, flattened."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(upstream(output), list(named.values()), allow_unused=True)
    clean = [
        name.removeprefix("base_model.model.")
        .replace("modules_to_save.default.", "")
        .replace(".default", "")
        .replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        for name in named
    ]
    return {name: g.flatten() for name, g in zip(clean, grads, strict=True) if g is not None}


def our_gradients(model, output):
    slots = _slots(model, "default", named_wrappers(model))
    leaves = {name: slot if slot._base is None else slot._base for name, slot in slots.items()}
    grads = torch.autograd.grad(upstream(output), list(leaves.values()), allow_unused=True)
    return {name: g.flatten() for name, g in zip(leaves, grads, strict=True) if g is not None}


def in_double(folder):
    """The gradients of an adapter in fp64, ours and PEFT's."""
    model = zoo(torch.float32).double()
    load_adapter_(model, folder, trainable=True)
    # Loaded anew: the weights of PEFT's attention move a little with each forward pass.
    theirs = loaded_in_peft(folder, torch.float32, is_trainable=True).double()
    return our_gradients(model.double(), model(IDS)), peft_gradients(theirs, theirs(IDS))


def farthest(ours, theirs):
    return max((ours[name] - gradient).abs().max() for name, gradient in theirs.items())


def with_dropout(model):
    """The output in training; the masks are those of one seed, drawn layer by layer."""
    torch.manual_seed(7)
    output = model.train()(IDS)
    model.eval()
    return output


def distance(found, exact):
    """‖found - exact‖ / ‖exact‖, over all tensors together."""
    off = sum((found[name].double() - value).square().sum() for name, value in exact.items())
    return (off / sum(value.square().sum() for value in exact.values())).sqrt().item()


def upstream(output):
    return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum()


def assert_same(ours, theirs, dtype):
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-3)


def assert_same_gradients(grads, theirs, dtype, folder):
    """`grads` are those of PEFT's model, whose adapter the folder holds."""
    expected = peft_gradients(theirs, theirs(IDS))
    assert grads.keys() == expected.keys()
    tolerance = (1e-6 if dtype == torch.float32 else 1e-12) * max(g.abs().max() for g in expected.values())
    if dtype == torch.float32 and farthest(grads, expected) > tolerance:
        # Where rounding alone moves PEFT's own gradients farther than this on some processors: the same in fp64, and
        # from there about as far in fp32.
        exact, theirs_exact = in_double(folder)
        assert farthest(exact, theirs_exact) <= 1e-12 * max(g.abs().max() for g in theirs_exact.values())
        assert farthest(grads, exact) <= 4 * farthest(expected, exact)
    else:
        assert farthest(grads, expected) <= tolerance


def assert_same_file(folder):
    ours_file = load_file(folder / "ours" / "adapter_model.safetensors")
    their_file = load_file(folder / "theirs" / "adapter_model.safetensors")
    twice = {name for name in their_file if "original_module" in name or "modules_to_save" in name}
    assert ours_file.keys() == their_file.keys() - twice
    assert all(torch.equal(tensor, their_file[name]) for name, tensor in ours_file.items())


def assert_works_in_peft_merges_and_leaves(ours, output, dtype, folder, merges):
    """`ours`, saved as "ours" in the folder, is the same in PEFT; it merges, unmerges and leaves the base as it was."""
    before = ours(IDS)
    assert_same(loaded_in_peft(folder / "ours", dtype)(IDS), output, dtype)
    if merges:
        merged = deepcopy(ours)
        merge_(merged)
        assert_same(merged(IDS), output, dtype)
        unmerge_(merged)
        assert torch.equal(merged(IDS), before)
    eject_(ours)
    assert all(torch.equal(t, zoo(dtype).state_dict()[name]) for name, t in ours.state_dict().items())


@pytest.mark.parametrize("number", range(CASES))
def test_adapters_of_peft_and_ours_are_the_same(number, tmp_path):
    config, dtype = draw(number)
    theirs = in_peft(config, dtype)
    output = theirs(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = zoo(dtype)
    load_adapter_(ours, tmp_path / "theirs", trainable=True)
    ours_output = ours(IDS)
    assert_same(ours_output, output, dtype)

    assert_same_gradients(our_gradients(ours, ours_output), theirs, dtype, tmp_path / "theirs")

    # PEFT drops nothing for embeddings and attention, and more for DoRA (test_where_peft_is_wrong.py). What a start
    # takes from the base it drops nothing of; here that is a part of the update (docs/variants.md).
    from_base = config["init_lora_weights"] in ("pissa", "olora")
    dropped_alike = not from_base and not config["use_dora"] and not {"table", "mix"} & {*config["target_modules"]}
    if config["lora_dropout"] and dropped_alike:
        assert_same(with_dropout(ours), with_dropout(theirs), dtype)

    save_adapter(ours, tmp_path / "ours")
    if not from_base:
        assert_same_file(tmp_path)
    biased = config.get("lora_bias") and "down" in config["target_modules"]  # a layer that has no bias to merge into
    assert_works_in_peft_merges_and_leaves(ours, output, dtype, tmp_path, merges=not biased)


@pytest.mark.parametrize("number", range(CASES_IN_BF16))
def test_over_a_bf16_base_ours_is_as_near_to_the_exact_value_as_pefts(number, tmp_path):
    """PEFT computes the update in fp32 and ours in bf16, whose result either rounds to bf16."""
    config, _ = draw(number)
    if config["init_lora_weights"] in ("orthogonal", "pissa", "olora"):
        config["init_lora_weights"] = True
    # Far above 1 the scale saturates each tanh, and rounding decides which.
    config = {key: value for key, value in config.items() if key != "alpha_pattern"} | {"lora_alpha": config["r"]}
    theirs = in_peft(config, torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours, exact = zoo(torch.bfloat16), zoo(torch.bfloat16).double()
    for model in (ours, exact):
        load_adapter_(model, tmp_path, trainable=True)
    outputs = [{"": model(IDS)} for model in (ours, theirs, exact)]
    gradients = [
        find(model, output[""])
        for find, model, output in zip(
            (our_gradients, peft_gradients, our_gradients), (ours, theirs, exact), outputs, strict=True
        )
    ]
    for of_ours, of_theirs, of_exact in (outputs, gradients):
        assert of_ours.keys() == of_theirs.keys() == of_exact.keys()
        assert distance(of_ours, of_exact) <= 2 * distance(of_theirs, of_exact) + torch.finfo(torch.bfloat16).eps / 4


@pytest.mark.parametrize("number", range(CASES_FROM_DATA))
def test_adapters_that_peft_starts_from_data_are_the_same(number, tmp_path):
    """Those that change the base PEFT saves as plain LoRA of twice the rank: what was trained, less the start."""
    config, dtype = draw_from_data(number)
    theirs = in_peft_from_data(config, dtype, tmp_path)
    output = theirs(IDS)
    ours = zoo(dtype)
    load_adapter_(ours, tmp_path / "theirs", trainable=True)
    ours_output = ours(IDS)
    assert_same(ours_output, output, dtype)

    loaded = loaded_in_peft(tmp_path / "theirs", dtype, is_trainable=True)
    assert_same_gradients(our_gradients(ours, ours_output), loaded, dtype, tmp_path / "theirs")

    save_adapter(ours, tmp_path / "ours")
    assert_same_file(tmp_path)
    assert_works_in_peft_merges_and_leaves(ours, output, dtype, tmp_path, merges=True)
