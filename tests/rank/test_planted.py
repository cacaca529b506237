"""A planted rank comes back: a layer learns to be itself plus an update of known rank, with real adapters."""

import numpy as np
import pytest
import torch
from torch import nn

from rankwise import LoraConfig, eject_, trainable_parameters
from rankwise.rank.runs import RunResult
from rankwise.rank.start import inject_nested_
from rankwise.rank.sweep import sweep

RANKS = [1, 2, 4, 8]
HELD_OUT = 100


def planted(rank):
    """run(rank, seed, factor) that trains adapters of a 12 × 10 layer towards base + ΔW*, with noise on the targets."""
    generator = torch.Generator().manual_seed(rank)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    model = nn.Sequential(nn.Linear(10, 12))
    update = torch.linalg.qr(normal(12, rank)).Q @ torch.linalg.qr(normal(10, rank)).Q.T
    x = normal(400 + HELD_OUT, 10)
    with torch.no_grad():
        model[0].weight.copy_(normal(12, 10))
        y = model(x) + x @ update.T + 0.05 * normal(400 + HELD_OUT, 12)

    def run(r, seed, factor):
        inject_nested_(model, LoraConfig(r=max(r, 1), target_modules=["0"]), max(RANKS), seed)
        parameters = trainable_parameters(model) if r else []
        order = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(parameters or [torch.zeros(1)], lr=0.02 * factor, weight_decay=0.0)
        for step in range(120 if r else 0):
            optimizer.param_groups[0]["lr"] = 0.02 * factor * (1 - step / 120)
            rows = torch.randint(400, (32,), generator=order)
            optimizer.zero_grad()
            (model(x[rows]) - y[rows]).square().sum(1).mean().backward()
            optimizer.step()
        with torch.no_grad():
            losses = (model(x[400:]) - y[400:]).square().sum(1).double().numpy()
        eject_(model)
        return RunResult(losses, np.ones(HELD_OUT), 0.0, sum(p.numel() for p in parameters))

    return run


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_sweep_returns_the_rank_that_was_planted(rank):
    found = sweep(planted(rank), RANKS, range(3)).comparisons
    assert found.sufficient == rank
    assert found.saturates
    assert all(comparison.outcome == "worse" for comparison in found.ranks if comparison.rank < rank)
