"""Adapters whose names or settings in the file are out of the ordinary: the same here, in PEFT, and read again."""

import json
from collections import OrderedDict

import peft
import pytest
import torch
from conftest import randomise_adapter
from safetensors.torch import load_file
from torch import nn

from rankwise import (
    LoraConfig,
    activate_,
    combine_adapters_,
    inject_,
    load_adapter_,
    read_adapter,
    save_adapter,
    swap_adapter_,
)
from rankwise.errors import CheckpointError

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(2, 8, 8) / 3) for _ in range(2))
        self.gate = nn.Linear(8, 2)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = x + self.attn(x, x, x, need_weights=False)[0]
        gates = self.gate(x).softmax(-1)
        each = [torch.tanh(x @ up.T) @ down.T for up, down in zip(self.up, self.down, strict=True)]
        return sum(gates[..., i, None] * result for i, result in enumerate(each))


class Model(nn.Module):
    """Its own bias, experts with a layer inside, and `lin` beside `block.lin`."""

    def __init__(self):
        super().__init__()
        self.lin, self.block, self.experts = nn.Linear(8, 8), nn.Sequential(OrderedDict(lin=nn.Linear(8, 8))), Experts()
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.experts(self.block(torch.tanh(self.lin(x)))) + self.bias


def build(kind=Model):
    torch.manual_seed(0)
    return kind().double().eval()


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def adapted(tmp_path, kind=Model, **settings):
    """A model with an adapter that is not at its start, and the folder that holds it."""
    model = build(kind)
    inject_(model, LoraConfig(r=2, **settings))
    randomise_adapter(model)
    return model, save_adapter(model, tmp_path / "ours")


def keys(folder):
    return set(load_file(folder / "adapter_model.safetensors"))


SETTINGS = {
    "a module in experts": {"target_modules": ["gate"], "target_parameters": ["experts.up"]},
    "two wrappers above": {"target_modules": ["gate"], "target_parameters": ["experts.up", "experts.down"]},
    "an attention in experts": {
        "target_modules": ["attn"],
        "target_parameters": ["experts.up"],
        "rank_pattern": {"attn": 3},
    },
    "biases in experts": {"target_modules": ["gate"], "target_parameters": ["experts.up"], "bias": "all"},
    "the root's bias": {"target_modules": ["lin"], "bias": "all"},
    "a name that ends another": {"target_modules": "lin"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_names_are_pefts_both_ways(tmp_path, settings):
    model, ours = adapted(tmp_path, **settings)
    theirs = peft.PeftModel.from_pretrained(build(), ours).eval()
    if settings["target_modules"] != ["attn"]:  # PEFT counts the update of an attention's output twice.
        same(theirs(X), model(X))
    theirs.save_pretrained(tmp_path / "theirs")
    assert keys(tmp_path / "theirs") == keys(ours)
    again = build()
    load_adapter_(again, tmp_path / "theirs")
    same(again(X), model(X))
    read_adapter(ours)


@pytest.mark.parametrize(
    ("targets", "written"), [("lin", "lin"), ("lin|experts.gate", r"experts\.gate|lin"), (r".*lin", ["lin"])]
)
def test_target_modules_are_a_list_unless_it_would_mean_more(tmp_path, targets, written):
    model, folder = adapted(tmp_path, target_modules=targets)
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == written
    again = build()
    report = load_adapter_(again, folder)
    same(again(X), model(X))
    assert {m.name for m in report.matrices} == set(read_adapter(folder).low_rank)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.lin = nn.Embedding(6, 8), nn.Linear(8, 8)

    def forward(self, ids):
        return self.lin(self.table(ids))


@pytest.mark.parametrize("alone", [{"trainable_token_indices": {"table": [4, 1]}}, {"modules_to_save": ["lin"]}])
def test_rows_of_an_embedding_or_modules_alone_go_to_peft_and_back(tmp_path, alone):
    ids = torch.arange(6)
    model, folder = adapted(tmp_path, Tokens, target_modules=[], **alone)
    theirs = peft.PeftModel.from_pretrained(build(Tokens), folder).eval()
    same(theirs(ids), model(ids))
    theirs.save_pretrained(tmp_path / "theirs")
    again = build(Tokens)
    load_adapter_(again, tmp_path / "theirs")
    same(again(ids), model(ids))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, groups=2, bias=False)

    def forward(self, x):
        return self.conv(x)


def of_peft(tmp_path, r):
    """A convolution's adapter whose A reads all channels for every group."""
    with pytest.warns(UserWarning, match="groups"):
        theirs = peft.get_peft_model(
            build(Grouped), peft.LoraConfig(r=r, target_modules=["conv"], init_lora_weights=False)
        ).eval()
    theirs.save_pretrained(tmp_path / f"theirs{r}")
    return theirs, tmp_path / f"theirs{r}"


def test_a_grouped_convolution_reads_as_the_change_of_its_weight(tmp_path):
    model, folder = adapted(tmp_path, Grouped, target_modules=["conv"])
    x = torch.randn(1, 4, 5, dtype=torch.float64)
    delta = read_adapter(folder).low_rank["conv"].delta(torch.float64).view(6, 2, 3)
    same(nn.functional.conv1d(x, build(Grouped).conv.weight + delta, groups=2), model(x))


def test_groups_that_an_adapter_mixes_read_as_a_convolution_without_groups(tmp_path):
    theirs, folder = of_peft(tmp_path, 2)
    x = torch.randn(1, 4, 5, dtype=torch.float64)
    delta = read_adapter(folder).low_rank["conv"].delta(torch.float64).view(6, 4, 3)
    same(nn.functional.conv1d(x, delta), theirs(x) - build(Grouped)(x))


def test_a_grouped_convolution_takes_an_adapter_of_lower_rank(tmp_path):
    small, folder = adapted(tmp_path, Grouped, target_modules=["conv"])
    model = build(Grouped)
    inject_(model, LoraConfig(r=4, target_modules=["conv"], init_lora_weights=False))
    swap_adapter_(model, folder)
    x = torch.randn(1, 4, 5, dtype=torch.float64)
    same(model(x), small(x))


def test_an_adapter_that_mixes_groups_is_refused_by_swap_with_the_reason(tmp_path):
    model = build(Grouped)
    inject_(model, LoraConfig(r=2, target_modules=["conv"]))
    with pytest.raises(CheckpointError, match=r"conv: lora_A reads the channels of other groups.*load_adapter_"):
        swap_adapter_(model, of_peft(tmp_path, 2)[1])
    theirs, folder = of_peft(tmp_path, 4)
    model = build(Grouped)
    load_adapter_(model, folder)
    swap_adapter_(model, folder)  # There is room for it where another one like it is.
    x = torch.randn(1, 4, 5, dtype=torch.float64)
    same(model(x), theirs(x))


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
def test_no_default_stands_in_for_a_null(tmp_path, name):
    _, folder = adapted(tmp_path, target_modules=["block.lin"])
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: None}))
    with pytest.raises(CheckpointError, match=f"{name} must be a number, found null"):
        read_adapter(folder)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.lin = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x):
        return self.lin(self.attn(x, x, x, need_weights=False)[0])


def test_attentions_of_another_rank_combine(tmp_path):
    model = build(Attending)
    for name in "ab":
        inject_(model, LoraConfig(r=3, rank_pattern={"attn": 2}, target_modules=["attn", "lin"]), adapter=name)
        randomise_adapter(model)
    activate_(model, {"a": 1.0, "b": 0.5})
    before = model(X)
    report = combine_adapters_(model, {"a": 1.0, "b": 0.5}, "c")
    assert report.ranks == {"attn": 4, "attn.out_proj": 4, "lin": 6}
    same(model(X), before)
    again = build(Attending)
    load_adapter_(again, save_adapter(model, tmp_path, "c"))
    same(again(X), before)
