"""Adapters over a quantised layer, by composition: one whose weight is whole numbers with a scale for each row."""

import pytest
import torch
from torch import nn

from rankwise import (
    LoraConfig,
    eject_,
    inject_,
    load_adapter_,
    merge_,
    save_adapter,
    start_from_data_,
    start_from_original_,
)
from rankwise.errors import ConfigError, MergeError
from rankwise.lora.inject import trainable_parameters
from rankwise.lora.places import named_lora_layers


class Int8Linear(nn.Linear):
    def __init__(self, original):
        super().__init__(original.in_features, original.out_features)
        steps = original.weight.detach().abs().amax(1, keepdim=True) / 7
        self.weight = nn.Parameter((original.weight.detach() / steps).round().to(torch.int8), requires_grad=False)
        self.register_buffer("steps", steps)
        self.bias = original.bias

    def dense(self):
        return self.weight * self.steps

    def forward(self, x):
        return nn.functional.linear(x, self.dense(), self.bias)


def original():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8))


def quantised():
    return nn.Sequential(*(Int8Linear(m) if isinstance(m, nn.Linear) else m for m in original()))


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


def test_an_adapter_trains_saves_and_leaves_but_does_not_merge(tmp_path):
    model = quantised()
    before = model(X)
    report = inject_(model, LoraConfig(r=2))
    assert [(m.d, m.k) for m in report.matrices] == [(10, 12), (8, 10)]
    assert torch.equal(model(X), before)
    model(X).square().sum().backward()
    assert any(p.grad.any() for p in trainable_parameters(model))
    for layer in (layer for _, layer in named_lora_layers(model)):
        nn.init.normal_(layer.update("default").lora_B)
    save_adapter(model, tmp_path)
    other = quantised()
    load_adapter_(other, tmp_path)
    assert torch.equal(other(X), model(X))
    with pytest.raises(MergeError, match=r"0: .* cannot be read as a dense matrix(.|\n)*2: .* cannot be read"):
        merge_(model)
    eject_(model)
    assert torch.equal(model(X), before)


def test_loftq_starts_from_the_best_approximation_of_what_quantising_lost():
    model, exact = quantised(), original()
    inject_(model, LoraConfig(r=3))
    start_from_original_(model, dict(exact.named_parameters()))
    for name, layer in named_lora_layers(model):
        lost = exact.get_submodule(name).weight - layer.base.dense()
        left = lost - layer.update("default").low_rank().delta()
        rest = torch.linalg.svdvals(lost.detach())[3:].square().sum().sqrt()
        torch.testing.assert_close(left.norm(), rest)


def test_loftq_names_every_weight_that_does_not_fit():
    model = quantised()
    inject_(model, LoraConfig(r=3))
    before = [p.clone() for p in trainable_parameters(model)]
    with pytest.raises(ConfigError, match=r"0\.weight: \[10, 12\] is wanted, found \[2, 2\](.|\n)*2\.weight.*missing"):
        start_from_original_(model, {"0.weight": torch.zeros(2, 2)})
    assert all(map(torch.equal, before, trainable_parameters(model)))


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "eva"])
def test_a_start_that_needs_no_weight_goes_over_a_quantised_base(start):
    model = quantised()
    before = model(X)
    inject_(model, LoraConfig(r=2, init_lora_weights=start))
    if start == "eva":
        ranks = start_from_data_(model, [X], lambda x: model(x).sum())
        assert sum(ranks.values()) == 4
    torch.testing.assert_close(model(X), before)
    assert all(layer.update("default").lora_A.any() for _, layer in named_lora_layers(model))


@pytest.mark.parametrize(
    ("config", "named"),
    [({"init_lora_weights": name}, name) for name in ("pissa", "pissa_niter_2", "olora", "corda", "lora_ga")]
    + [({"use_dora": True}, "use_dora")],
)
def test_what_needs_the_dense_weight_says_so_over_a_quantised_base(config, named):
    model = quantised()
    before = model(X)
    message = f"{named}.* needs the dense weight.*gaussian.*start_from_original_"
    if named in ("corda", "lora_ga"):
        inject_(model, LoraConfig(r=2, **config))
        with pytest.raises(ConfigError, match=message):
            start_from_data_(model, [X], lambda x: model(x).sum())
    else:
        with pytest.raises(ConfigError, match=message):
            inject_(model, LoraConfig(r=2, **config))
    assert torch.equal(model(X), before)
