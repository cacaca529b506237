"""Cases in which PEFT 0.21 computes something else than LoRA; here the definition is the reference, in fp64."""

import math

import pytest
import torch
from conftest import randomise_adapter
from torch import nn
from torch.nn import functional as F

from rankwise import (
    LoraConfig,
    adapters_by_row,
    combine_adapters_,
    eject_,
    inject_,
    merge_,
    start_from_original_,
    unmerge_,
)
from rankwise.errors import ConfigError
from rankwise.lora.places import named_lora_layers


def double(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return nn.Sequential(module).double().eval()


def adapted(module, **config):
    model = double(module)
    inject_(model, LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["0"], **config}))
    randomise_adapter(model, std=0.3)
    return model


def with_dense_update(model):
    """The base with every ΔW added to its weight, as the definition says."""
    changes = {name: layer.delta("default", torch.float64) for name, layer in named_lora_layers(model)}
    updates = {name: layer.update("default") for name, layer in named_lora_layers(model)}
    for name, change in changes.items():
        A, B = updates[name].lora_A.flatten(1), updates[name].lora_B.flatten(1)
        if A.shape[0] == B.shape[1]:
            torch.testing.assert_close(change, updates[name].scale * B @ A, rtol=1e-12, atol=1e-12)
    eject_(model)
    for name, change in changes.items():
        module = model.get_submodule(name)
        weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
        weight.data += change.view(weight.shape)
    return model


def assert_is_the_definition(model, *inputs):
    ours = model(*inputs)
    merge_(model)
    merged = model(*inputs)
    unmerge_(model)
    expected = with_dense_update(model)(*inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(merged, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_keep_dilation_padding_mode_and_groups(kind, padding_mode, groups):
    module = kind(4, 6, 3, stride=2, padding=1, dilation=2, groups=groups, padding_mode=padding_mode)
    x = torch.randn(2, 4, *[9] * len(module.kernel_size), dtype=torch.float64)
    assert_is_the_definition(adapted(module), x)


def test_a_pointwise_conv3d_can_be_merged():
    assert_is_the_definition(adapted(nn.Conv3d(4, 6, 1)), torch.randn(2, 4, 3, 3, 3, dtype=torch.float64))


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)

    def forward(self, query, memory, mask=None, padding=None):
        output, weights = self.attention(query, memory, memory, key_padding_mask=padding, attn_mask=mask)
        itself, _ = self.attention(query, query, query, need_weights=False)
        return output.sum() + itself.square().sum(), output, weights, itself


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_counts_its_output_projection_once(options, masked):
    torch.manual_seed(0)
    model = Attention(**options).double().eval()
    inject_(model, LoraConfig(r=2, target_modules=["attention"]))
    randomise_adapter(model, std=0.2)
    shape = (2, 5, 8) if options.get("batch_first") else (5, 2, 8)
    query, memory = torch.randn(shape).double(), torch.randn(shape).double()
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if masked else None
    padding = torch.tensor([[False] * 4 + [True], [False] * 5]) if masked else None
    ours = model(query, memory, mask, padding)
    expected = with_dense_update(model)(query, memory, mask, padding)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_attention_in_a_transformer_layer_is_not_bypassed_in_inference():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).double().eval()
    inject_(model, LoraConfig(r=2, target_modules=["self_attn"]))
    randomise_adapter(model, std=0.3)
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        ours = model(x)
        expected = with_dense_update(model)(x)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-11)


def test_dropout_acts_on_embeddings_too():
    model = adapted(nn.Embedding(5, 4), lora_dropout=0.5)
    layer = model[0]
    layer.shares.train()
    torch.manual_seed(1)
    seen = torch.stack([model(torch.tensor([3])) - layer.base(torch.tensor([3])) for _ in range(50)])
    kept = layer.delta("default", torch.float64)[:, 3] / 0.5
    dropped = (seen == 0).all(-1).flatten()
    assert dropped.any()
    assert not dropped.all()
    torch.testing.assert_close(seen[~dropped].flatten(0, -2), kept.expand(int((~dropped).sum()), -1))


def test_a_sum_of_adapters_keeps_the_scale_of_rslora():
    model = double(nn.Linear(6, 5))
    for name in ("one", "two"):
        config = LoraConfig(r=2, lora_alpha=6, use_rslora=True, target_modules=["0"])
        inject_(model, config, adapter=name)
        randomise_adapter(model, seed=len(name) + ord(name[0]))
    layer = model[0]
    exact = layer.delta("one", torch.float64) + 2 * layer.delta("two", torch.float64)
    combine_adapters_(model, {"one": 1.0, "two": 2.0}, "mix")
    torch.testing.assert_close(layer.delta("mix", torch.float64), exact, rtol=1e-12, atol=1e-12)


def test_a_sum_with_a_pissa_adapter_leaves_the_base_alone():
    model = double(nn.Linear(6, 5))
    weight = model[0].weight.clone()
    inject_(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"), adapter="one")
    randomise_adapter(model)
    exact = model[0].delta("one", torch.float64)
    combine_adapters_(model, {"one": 1.0}, "mix")
    assert torch.equal(model[0].base.weight, weight)
    torch.testing.assert_close(model[0].delta("mix", torch.float64), exact, rtol=1e-12, atol=1e-12)


def nearest(exact, dtype):
    """By the distances of three neighbours in fp64, a tie to the even one; numbers far from 0."""
    bits = exact.to(dtype).view(torch.int16)[None] + torch.tensor([-1, 0, 1], dtype=torch.int16)[:, None, None]
    distance = (bits.view(dtype).double() - exact).abs()
    best = torch.where(bits % 2 == 0, distance, distance + torch.finfo(torch.float64).tiny)
    return bits.view(dtype).gather(0, best.argmin(0)[None])[0]


def test_a_merge_of_half_precision_is_correctly_rounded_in_every_entry_and_a_thousand_cycles_change_no_bit():
    for dtype in (torch.bfloat16, torch.float16):
        model = nn.Sequential(nn.Linear(512, 512)).to(dtype)
        weight = model[0].weight.detach().clone()
        inject_(model, LoraConfig(r=4, target_modules=["0"]))
        randomise_adapter(model, std=0.05)
        update = model[0].update("default")
        exact = weight.double() + update.scale * (update.lora_B.double() @ update.lora_A.double())
        for _ in range(1000 if dtype == torch.bfloat16 else 10):
            merge_(model)
            unmerge_(model)
        merge_(model)
        assert torch.equal(model[0].base.weight, nearest(exact, dtype))
        eject_(model)
        assert torch.equal(model[0].weight, weight)


def test_an_adapter_may_be_named_like_a_module(tmp_path):
    from rankwise import load_adapter_, save_adapter

    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)})
    for name in ("first", "q_proj"):
        inject_(model, LoraConfig(r=2), adapter=name)
        randomise_adapter(model, seed=len(name))
    save_adapter(model, tmp_path, adapter="first")
    again = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)})
    assert len(load_adapter_(again, tmp_path).matrices) == 2


def test_dora_is_its_definition_and_its_norm_has_no_gradient():
    model = adapted(nn.Linear(6, 5), use_dora=True)
    layer, update = model[0], model[0].update("default")
    x = torch.randn(3, 6, dtype=torch.float64)
    changed = layer.base.weight + update.scale * update.lora_B @ update.lora_A
    direction = changed / changed.norm(dim=1, keepdim=True).detach()
    expected = F.linear(x, update.magnitude[:, None] * direction, layer.base.bias)
    ours = model(x)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    parameters = [update.lora_A, update.lora_B, update.magnitude]
    for one, other in zip(
        torch.autograd.grad(ours.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_a_block_of_adapters_by_row_that_raises_leaves_nothing_behind():
    model = double(nn.Linear(6, 5))
    inject_(model, LoraConfig(r=2, target_modules=["0"]), adapter="one")
    randomise_adapter(model)
    x = torch.randn(2, 6, dtype=torch.float64)
    expected = model(x)
    with pytest.raises(ValueError, match="stop"), adapters_by_row(model, [None, "one"]):
        raise ValueError("stop")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("base", [nn.Embedding(7, 5), nn.Conv1d(4, 4, 3)])
def test_a_start_from_the_original_weights_is_refused_where_it_is_not_defined(base):
    model = nn.Sequential(base)
    inject_(model, LoraConfig(r=2, target_modules=["0"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match="not a linear layer"):
        start_from_original_(model, {"0.weight": base.weight})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("setting", "value"), [("lora_alpha", 0), ("lora_alpha", math.nan), ("r", 2.5), ("r", 0)])
def test_a_rank_or_alpha_that_cannot_be_is_told(setting, value):
    with pytest.raises(ConfigError, match=setting):
        LoraConfig(**{setting: value})
