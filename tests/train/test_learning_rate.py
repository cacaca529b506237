"""The default learning rate, and `--lr auto`."""

from pathlib import Path

import pytest
import torch
from conftest import tiny

from rankwise import LoraConfig, TrainConfig, inject_, trainable_parameters
from rankwise.data.examples import TextExample
from rankwise.engine.language import LanguageEngine
from rankwise.errors import ConfigError, RankwiseError
from rankwise.train.evaluate import held_out_loss
from rankwise.train.learning_rate import default_rate
from rankwise.train.loop import Training
from rankwise.train.rate_check import best_rate

EXAMPLES = [TextExample((5, 6, 7 + n, 8, 9 + n), (False, False, True, True, True), "here") for n in range(6)]


def settings(**changes):
    return TrainConfig(model="m", data=Path("d"), out=Path("o"), **{"batch_size": 3, "max_steps": 40, **changes})


def engine():
    model = tiny("llama")
    model.lm_head.weight.data *= 30
    torch.manual_seed(0)
    inject_(model, LoraConfig(r=2, lora_dropout=0.2))
    return LanguageEngine(model, 2, EXAMPLES)


def test_the_default_is_ten_times_full_fine_tunings_and_fifteen_times_in_short_runs():
    assert (default_rate(100), default_rate(99)) == (pytest.approx(1e-3), pytest.approx(1.5e-3))
    for steps in (40, 120):
        training = Training(engine(), EXAMPLES, settings(max_steps=steps))
        assert training.rate == default_rate(steps)
    assert Training(engine(), EXAMPLES, settings(lr=0.5)).rate == 0.5


def test_a_rate_that_is_yet_to_be_found_cannot_train():
    with pytest.raises(ConfigError, match="must be found first"):
        Training(engine(), EXAMPLES, settings(lr="auto"))


@pytest.mark.parametrize("held_out", [EXAMPLES[:2], []])
def test_the_check_takes_the_rate_with_the_lowest_loss_and_leaves_no_trace(held_out):
    run, said = engine(), []
    before = [parameter.detach().clone() for parameter in trainable_parameters(run.model)]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    rate = best_rate(run, EXAMPLES, held_out, settings(lr="auto"), said.append)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(trainable_parameters(run.model), before, strict=True))
    assert all(parameter.grad is None for parameter in trainable_parameters(run.model))
    losses = {}
    for multiple in (1 / 3, 1, 3):
        other = engine()
        torch.manual_seed(5)
        training = Training(other, EXAMPLES, settings(lr=1.5e-3 * multiple, max_steps=5))
        steps = [step.loss for step in training.steps()]
        losses[multiple] = held_out_loss(other, held_out) if held_out else sum(steps[-2:]) / 2
    assert rate == pytest.approx(1.5e-3 * min(losses, key=losses.__getitem__))
    for line, loss in zip(said, losses.values(), strict=True):
        assert f"{'held-out' if held_out else 'training'} loss {loss:.4f} at step 5" in line


def test_the_check_fails_only_if_no_rate_gives_a_finite_loss():
    run = engine()
    run.model.lm_head.weight.data[:] = float("inf")
    with pytest.raises(RankwiseError, match=r"no learning rate of 0\.0005, 0\.0015, 0\.0045 gives"):
        best_rate(run, EXAMPLES, [], settings(lr="auto"))


def test_a_single_step_without_held_out_rows_shows_no_difference():
    with pytest.raises(ConfigError, match="a run of a single step without held-out rows"):
        best_rate(engine(), EXAMPLES, [], settings(lr="auto", max_steps=1))


def test_evaluations_without_held_out_data_are_refused():
    with pytest.raises(ConfigError, match="--eval-steps needs held-out data"):
        settings(eval_steps=5, eval_fraction=0)
    settings(eval_steps=0, eval_fraction=0)
