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
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankwise import eject_, load_adapter_, merge_, save_adapter, unmerge_
from rankwise.lora.checkpoint import _slots

CASES = 600
IDS = torch.tensor([[3, 0, 7, 7, 1, 9], [2, 2, 5, 10, 4, 8]])
LAYERS = ["table", "up", "down", "gate", "hf", "conv1", "conv2", "conv3"]


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
    config["use_dora"] = not from_base and rng.random() < 0.35
    if rng.random() < 0.3:
        config["rank_pattern"] = {rng.choice([targets[0], f"{targets[0][:-1]}."]): 4 if start == "orthogonal" else 3}
    if rng.random() < 0.3:
        config["alpha_pattern"] = {targets[-1]: 5}
    config["bias"] = rng.choice(["none"] * 3 + ["all", "lora_only"])
    if start in (True, False) and not config["use_dora"] and "table" not in targets:
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
    config["fan_in_fan_out"] = "target_parameters" not in config and rng.random() < 0.2
    dtype = torch.float32 if from_base or rng.random() < 0.4 else torch.float64
    return config, dtype


def in_peft(config, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        model = peft.get_peft_model(zoo(dtype), peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # bias="all" unfreezes the original of a head too, which nothing uses.
            if parameter.requires_grad and "original_module" not in name:
                parameter += torch.randn(parameter.shape, generator=generator).to(dtype) * 0.05
    return model


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
    slots = _slots(model, "default")
    leaves = {name: slot if slot._base is None else slot._base for name, slot in slots.items()}
    grads = torch.autograd.grad(upstream(output), list(leaves.values()), allow_unused=True)
    return {name: g.flatten() for name, g in zip(leaves, grads, strict=True) if g is not None}


def in_double(folder):
    """The gradients of an adapter in fp64."""
    model = zoo(torch.float32).double()
    load_adapter_(model, folder, trainable=True)
    return our_gradients(model.double(), model.double()(IDS))


def farthest(ours, theirs):
    return max((ours[name] - gradient).abs().max() for name, gradient in theirs.items())


def upstream(output):
    return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum()


def assert_same(ours, theirs, dtype):
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-3)


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

    grads, expected = our_gradients(ours, ours_output), peft_gradients(theirs, output)
    assert grads.keys() == expected.keys()
    tolerance = (1e-6 if dtype == torch.float32 else 1e-12) * max(g.abs().max() for g in expected.values())
    if dtype == torch.float32 and farthest(grads, expected) > tolerance:
        # Where rounding alone moves PEFT's own gradients farther than this on some processors: the same in fp64, and
        # from there about as far in fp32.
        exact = in_double(tmp_path / "theirs")
        theirs_exact = peft_gradients(theirs.double(), theirs(IDS))
        assert farthest(exact, theirs_exact) <= 1e-12 * max(g.abs().max() for g in theirs_exact.values())
        assert farthest(grads, exact) <= 4 * farthest(expected, exact)
    else:
        assert farthest(grads, expected) <= tolerance

    save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(zoo(dtype), tmp_path / "ours").eval()
    assert_same(back(IDS), output, dtype)
    if config["init_lora_weights"] not in ("pissa", "olora"):
        ours_file = load_file(tmp_path / "ours" / "adapter_model.safetensors")
        their_file = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
        twice = {name for name in their_file if "original_module" in name or "modules_to_save" in name}
        assert ours_file.keys() == their_file.keys() - twice
        assert all(torch.equal(tensor, their_file[name]) for name, tensor in ours_file.items())

    if "lora_bias" not in config or not config["lora_bias"] or "down" not in config["target_modules"]:
        merged = deepcopy(ours)
        merge_(merged)
        assert_same(merged(IDS), output, dtype)
        unmerge_(merged)
        assert torch.equal(merged(IDS), ours_output)
    eject_(ours)
    assert all(torch.equal(t, zoo(dtype).state_dict()[name]) for name, t in ours.state_dict().items())
