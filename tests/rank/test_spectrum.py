"""Singular values and truncations from the factors alone, against dense references."""

import pytest
import torch
from torch import nn

from rankwise import LoraConfig, inject_
from rankwise.lora.low_rank import LowRank
from rankwise.lora.places import named_lora_layers
from rankwise.rank.spectrum import (
    directions,
    effective_rank,
    observe,
    singular_values,
    sparkline,
    spread,
    stable_rank,
)


def random_update(d, k, r, scale=0.7, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    A, B = torch.randn(r, k, generator=draw, dtype=dtype), torch.randn(d, r, generator=draw, dtype=dtype)
    return LowRank(A, B, scale)


def random_inputs(k, n=200, seed=5):
    """Correlated inputs [n, k] of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=draw, dtype=torch.float64) * torch.logspace(0, -3, k, dtype=torch.float64)
    return torch.randn(n, k, generator=draw, dtype=torch.float64) @ mix.T


SHAPES = [(30, 20, 4), (20, 30, 8), (5, 40, 8), (40, 5, 8), (12, 12, 12), (9, 7, 1)]


@pytest.mark.parametrize(("d", "k", "r"), SHAPES)
def test_singular_values_are_those_of_the_dense_update(d, k, r):
    update = random_update(d, k, r)
    dense = torch.linalg.svdvals(update.delta(torch.float64))[: min(d, k, r)]
    torch.testing.assert_close(singular_values(update), dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("d", "k", "r"), SHAPES)
def test_a_truncation_is_the_best_of_its_rank_for_the_layers_inputs(d, k, r):
    update, x = random_update(d, k, r), random_inputs(k)
    delta = update.delta(torch.float64)
    parts = directions(update, (x @ update.A.T).T @ (x @ update.A.T) / len(x))
    # The dense reference: the singular values of ΔW·C^½, by an explicit root of C. No update of rank n can leave less
    # than what comes after the n-th of them (Eckart and Young).
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    weighted = torch.linalg.svdvals(delta @ (vectors * values.clamp_min(0).sqrt()) @ vectors.T)
    for rank in range(1, min(d, k, r) + 1):
        left = ((delta - parts.truncated(rank).delta(torch.float64)) @ x.T).square().sum() / len(x)
        torch.testing.assert_close(left, weighted[rank:].square().sum(), rtol=1e-8, atol=1e-9 * weighted[0].item() ** 2)
    torch.testing.assert_close(parts.sizes[: len(weighted)], weighted[: len(parts.sizes)], rtol=1e-6, atol=1e-6)


def test_the_best_for_the_inputs_is_another_update_than_the_best_for_all_inputs():
    update, x = random_update(30, 20, 6), random_inputs(20)
    h = x @ update.A.T
    delta = update.delta(torch.float64)
    U, S, Vh = torch.linalg.svd(delta)
    plain = U[:, :2] * S[:2] @ Vh[:2]
    left = [
        ((delta - other) @ x.T).square().sum()
        for other in (directions(update, h.T @ h).truncated(2).delta(torch.float64), plain)
    ]
    assert left[0] < 0.9 * left[1]


def test_a_truncation_has_scale_one_and_its_singular_values_in_equal_shares():
    update, x = random_update(30, 20, 6), random_inputs(20)
    cut = directions(update, (x @ update.A.T).T @ (x @ update.A.T)).truncated(3)
    sigma = singular_values(cut)
    assert cut.scale == 1.0
    torch.testing.assert_close(cut.A @ cut.A.T, torch.diag(sigma))
    torch.testing.assert_close(cut.B.T @ cut.B, torch.diag(sigma))


def test_all_directions_together_are_the_update_itself():
    update, x = random_update(30, 20, 6), random_inputs(20)
    whole = directions(update, (x @ update.A.T).T @ (x @ update.A.T)).truncated(6)
    torch.testing.assert_close(whole.delta(torch.float64), update.delta(torch.float64), rtol=1e-10, atol=1e-10)


def test_directions_that_are_rounding_errors_have_no_size():
    update = random_update(30, 20, 6)
    doubled = LowRank(torch.cat([update.A, update.A]), torch.cat([update.B, update.B], dim=1), 0.5)
    x = random_inputs(20)
    sizes = directions(doubled, (x @ doubled.A.T).T @ (x @ doubled.A.T)).sizes
    assert (sizes > 0).tolist() == [True] * 6 + [False] * 6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1, stride=2)
        self.linear = nn.Linear(6, 5)
        self.idle = nn.Linear(6, 5)

    def forward(self, ids):
        return self.linear(self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2))


def observed_net(targets):
    """(model, its layers, inputs, the gradient of the loss by the output, what was observed)"""
    torch.manual_seed(0)
    model = Net().double()
    inject_(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    layers = dict(named_lora_layers(model))
    batches = torch.randint(11, (2, 3, 10))
    slope = torch.randn(5, dtype=torch.float64)
    return model, layers, batches, slope, observe(layers, "default", ((model(ids) @ slope).sum() for ids in batches))


@pytest.mark.parametrize("name", ["embed", "conv", "linear"])
def test_sizes_are_how_far_each_direction_moves_the_output_of_every_kind_of_layer(name):
    model, layers, batches, _, seen = observed_net(["embed", "conv", "linear"])
    layer = layers[name]
    parts = directions(layer.update("default").low_rank(), seen[name].hidden)
    inputs = []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for ids in batches:
        model(ids)
    handle.remove()
    change = layer.product(layer.update("default"), torch.cat(inputs)).movedim(layer.output_dim, -1).flatten(0, -2)
    moved = (change @ parts.outputs).square().mean(0).sqrt()
    torch.testing.assert_close(moved, parts.sizes, rtol=1e-6, atol=1e-9)


def test_sensitivity_is_the_sum_of_squared_gradients_by_the_outputs():
    _, _, _, slope, seen = observed_net(["linear"])
    # 2 batches of 3 rows with 5 places each.
    assert seen["linear"].sensitivity == pytest.approx(30 * slope.square().sum().item() / 5)


def test_observing_touches_no_gradient():
    model, *_ = observed_net(["embed", "conv", "linear"])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_layer_that_the_model_does_not_call_is_refused():
    with pytest.raises(ValueError, match=r"cannot be observed: idle"):
        observed_net(["linear", "idle"])


def test_spread_keeps_the_most_worthy_of_all_layers_and_the_least_of_each():
    sizes = {"a": torch.tensor([9.0, 8.0, 1.0]), "b": torch.tensor([3.0, 2.0, 0.0]), "c": torch.tensor([0.5])}
    assert spread(sizes, 3) == {"a": 2, "b": 1, "c": 0}
    assert spread(sizes, 3, least=1) == {"a": 1, "b": 1, "c": 1}
    assert spread(sizes, 4, least=1) == {"a": 2, "b": 1, "c": 1}
    assert spread(sizes, 99) == {"a": 3, "b": 2, "c": 1}


def test_effective_and_stable_rank_of_equal_values_are_their_number():
    equal = torch.full((5,), 2.0)
    assert effective_rank(equal) == pytest.approx(5)
    assert stable_rank(equal) == pytest.approx(5)
    assert effective_rank(torch.zeros(3)) == stable_rank(torch.zeros(3)) == 0.0
    assert 1 < stable_rank(torch.tensor([2.0, 1.0])) < effective_rank(torch.tensor([2.0, 1.0])) < 2


def test_a_sparkline_falls_with_the_values():
    assert sparkline(torch.tensor([4.0, 2.0, 0.0])) == "█▅▁"
    assert sparkline(torch.zeros(3)) == ""
