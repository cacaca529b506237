"""The optimiser of adapters."""

import pytest
import torch
from conftest import randomise_adapter, tiny
from torch import nn

from rankwise import LoraConfig, inject_, lora_optimizer
from rankwise.errors import ConfigError
from rankwise.lora.inject import trainable_parameters
from rankwise.lora.places import named_lora_layers


def small(r=3, **config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 5)).double()
    inject_(model, LoraConfig(r=r, **{"target_modules": ["0", "1"], **config}))
    randomise_adapter(model)
    return model


def backward(model):
    x = torch.randn(9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model(x).square().sum().backward()


def updates(model):
    return [layer.update("default") for _, layer in named_lora_layers(model)]


def test_every_trained_parameter_is_in_one_group_and_only_factors_decay():
    model = tiny("bert")
    inject_(model, LoraConfig(r=2, task_type="SEQ_CLS", use_dora=True))
    optimizer = lora_optimizer(model, 1e-3, lora_plus_ratio=4, weight_decay=0.1)
    kept = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, kept)) == sorted(map(id, trainable_parameters(model)))
    settings = {
        id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    for update in updates(model):
        assert settings[id(update.lora_A)] == (1e-3, 0.1)
        assert settings[id(update.lora_B)] == (4e-3, 0.1)
        assert settings[id(update.magnitude)] == (1e-3, 0.0)


def test_the_first_step_moves_B_so_many_times_further():
    model = small()
    before = [(u.lora_A.detach().clone(), u.lora_B.detach().clone()) for u in updates(model)]
    optimizer = lora_optimizer(model, 1e-3, lora_plus_ratio=5)
    backward(model)
    optimizer.step()
    for update, (A, B) in zip(updates(model), before, strict=True):
        # Adam's first step is lr times the gradient's sign.
        torch.testing.assert_close((update.lora_A - A).abs(), torch.full_like(A, 1e-3), rtol=1e-4, atol=0)
        torch.testing.assert_close((update.lora_B - B).abs(), torch.full_like(B, 5e-3), rtol=1e-4, atol=0)


def test_weight_decay_shrinks_both_factors_alike_whatever_the_rank():
    for r in (1, 4):
        model = small(r)
        optimizer = lora_optimizer(model, 0.1, weight_decay=0.5)
        before = [u.lora_B.detach() @ u.lora_A.detach() for u in updates(model)]
        for p in trainable_parameters(model):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for update, delta in zip(updates(model), before, strict=True):
            torch.testing.assert_close(update.lora_B @ update.lora_A, delta * (1 - 0.1 * 0.5) ** 2)


def test_preconditioned_gradients_are_those_of_the_paper():
    model = small()
    optimizer = lora_optimizer(model, 1e-3, preconditioned=True)
    backward(model)
    expected = []
    for update in updates(model):
        A, B = update.lora_A.detach(), update.lora_B.detach()
        identity = 1e-6 * torch.eye(3, dtype=A.dtype)
        of_A = torch.linalg.inv(B.T @ B + identity) @ update.lora_A.grad
        of_B = update.lora_B.grad @ torch.linalg.inv(A @ A.T + identity)
        expected.append((of_A, of_B))
    optimizer.step()
    for update, (of_A, of_B) in zip(updates(model), expected, strict=True):
        torch.testing.assert_close(update.lora_A.grad, of_A, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(update.lora_B.grad, of_B, rtol=1e-6, atol=1e-9)


def test_a_preconditioned_gradient_step_is_the_same_for_every_split_into_factors(monkeypatch):
    """ΔW = B·A = (B·R)·(R⁻¹·A): the preconditioned direction of ΔW does not depend on R."""
    monkeypatch.setattr("rankwise.train.optimizer.DAMPING", 0.0)
    directions = []
    for mix in (torch.eye(3, dtype=torch.float64), torch.diag(torch.tensor([5.0, 1.0, 0.1], dtype=torch.float64))):
        model = small()
        for update in updates(model):
            update.set(torch.linalg.inv(mix) @ update.lora_A, update.lora_B @ mix)
        optimizer = lora_optimizer(model, 1e-3, preconditioned=True)
        backward(model)
        factors = [(u.lora_A.detach().clone(), u.lora_B.detach().clone()) for u in updates(model)]
        optimizer.step()
        directions.append(
            [B @ u.lora_A.grad + u.lora_B.grad @ A for u, (A, B) in zip(updates(model), factors, strict=True)]
        )
    for one, other in zip(*directions, strict=True):
        torch.testing.assert_close(one, other)


def test_a_convolution_with_groups_trains_without_preconditioner():
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)).double()
    inject_(model, LoraConfig(r=2, target_modules=["0"]))
    randomise_adapter(model)
    optimizer = lora_optimizer(model, 1e-3, preconditioned=True)
    model(torch.randn(2, 4, 5, dtype=torch.float64)).square().sum().backward()
    gradient = updates(model)[0].lora_A.grad.clone()
    optimizer.step()
    assert torch.equal(updates(model)[0].lora_A.grad, gradient)


class Experts(nn.Module):
    """Two experts' weights in one parameter, of which a pass uses the first."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 4, 4, dtype=torch.float64))

    def forward(self, x):
        return x @ self.w[0].T


def stacked(kind):
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2) if kind == "groups" else Experts()).double()
    places = {"target_modules": ["0"]} if kind == "groups" else {"target_modules": (), "target_parameters": ["0.w"]}
    inject_(model, LoraConfig(r=2, init_lora_weights=False, **places))
    return model


@pytest.mark.parametrize("kind", ["groups", "experts"])
def test_factors_of_stacked_matrices_have_their_rate_and_decay(kind):
    optimizer = lora_optimizer(stacked(kind), 1e-3, lora_plus_ratio=8.0, weight_decay=0.1)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(1e-3, 0.1), (8e-3, 0.1)]


def test_an_expert_that_no_token_met_is_not_moved_by_the_preconditioner():
    model = stacked("experts")
    optimizer = lora_optimizer(model, 1e-2, preconditioned=True)
    before = updates(model)[0].lora_A.detach().clone()
    model(torch.randn(3, 4, dtype=torch.float64)).sum().backward()
    optimizer.step()
    moved = (updates(model)[0].lora_A - before).abs().sum(1) > 0
    assert moved.tolist() == [True, True, False, False]


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"lora_plus_ratio": -1}, {"weight_decay": -0.1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match="above 0"):
        lora_optimizer(small(), **{"lr": 1e-3, **wrong})
