"""Training is what a plain loop does, in fp64: padded batches, torch's own AdamW, everything written out here."""

import random
from math import ceil, cos, pi
from pathlib import Path

import pytest
import torch
from conftest import randomise_adapter, tiny
from torch import nn

from rankwise import LoraConfig, TrainConfig, inject_, trainable_parameters
from rankwise.data.examples import TextExample
from rankwise.engine.language import LanguageEngine
from rankwise.train.batches import planned_steps
from rankwise.train.loop import Training
from rankwise.train.progress import Reporter
from rankwise.train.run import run_training
from rankwise.train.run_folder import RunFolder
from rankwise.train.watch import EVALUATION_BUDGET, EVALUATIONS, FEWEST_ROWS, FORWARD_SHARE, evaluations


def rows(count, seed):
    """Rows of different lengths, with one to four trained tokens each."""
    draw = random.Random(seed)
    made = []
    for n in range(count):
        prompt, answer = draw.randrange(2, 7), draw.randrange(1, 5)
        ids = tuple(draw.randrange(3, 96) for _ in range(prompt + answer))
        made.append(TextExample(ids, (False,) * prompt + (True,) * answer, f"data:{n}"))
    return made


TRAIN, HELD_OUT = rows(11, 1), rows(5, 2)
HEAD = 30
"""A random head gives logits too small to tell tokens apart, whatever the adapter does."""


def model(**changes):
    made = tiny("llama")
    # transformers' own RMSNorm rounds to fp32 inside, in the backward pass too, whatever the model's type.
    for name, module in list(made.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            made.set_submodule(name, nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon))
    made.lm_head.weight.data *= HEAD
    torch.manual_seed(0)
    inject_(made, LoraConfig(r=2, **changes))
    made = made.double()
    # From B = 0, a relative noise of 1e-14 in the gradients grows to 4e-9 of the loss within 24 steps at lr 0.05.
    randomise_adapter(made)
    return made


def settings(out="o", **changes):
    plain = {"batch_size": 3, "lr": 0.02, "seed": 3, "eval_steps": 0}
    return TrainConfig(model="m", data=Path("d"), out=Path(out), **{**plain, **changes})


def loss_sum(model, batch, smoothing=0.0):
    """(summed loss, number of trained tokens) from the padded forward pass of transformers."""
    longest = max(len(row.ids) for row in batch)
    ids = torch.tensor([[*row.ids, *[0] * (longest - len(row.ids))] for row in batch])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in batch])
    logits = model(input_ids=ids, attention_mask=mask).logits
    total, count = torch.zeros((), dtype=torch.float64), 0
    for index, row in enumerate(batch):
        for place in range(1, len(row.ids)):
            if row.trained[place]:
                log_shares = logits[index, place - 1].log_softmax(-1)
                total = total - (1 - smoothing) * log_shares[row.ids[place]] - smoothing * log_shares.mean()
                count += 1
    return total, count


def slow_loop(model, config):
    """Returns (loss of each step, held-out loss by step); the model then has the best adapter, if any was measured."""
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=config.weight_decay)
    shuffle = random.Random(config.seed)
    size = config.batch_size * config.accumulate
    total = config.max_steps or ceil(config.epochs * ceil(len(TRAIN) / size))
    warm_up = max(1, round(config.warmup * total))
    losses, measured, best, waited = [], {}, None, 0
    while len(losses) < total:
        order = list(TRAIN)
        shuffle.shuffle(order)
        for start in range(0, len(order), size):
            step = len(losses)
            if step == total or (config.patience and waited >= config.patience):
                break
            left = (total - step) / max(1, total - warm_up + 1)
            course = {"linear": left, "cosine": (1 + cos(pi * (1 - left))) / 2, "constant": 1.0}[config.lr_schedule]
            for group in optimizer.param_groups:
                group["lr"] = config.lr * ((step + 1) / warm_up if step < warm_up else course)
            summed, count = loss_sum(model, order[start : start + size], config.label_smoothing)
            optimizer.zero_grad()
            (summed / count).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append((summed / count).item())
            if config.eval_steps and ((step + 1) % config.eval_steps == 0 or step + 1 == total):
                with torch.no_grad():
                    summed, count = loss_sum(model, HELD_OUT)
                measured[step + 1] = (summed / count).item()
                if best is None or measured[step + 1] < best[0]:
                    best, waited = (measured[step + 1], [p.detach().clone() for p in parameters]), 0
                else:
                    waited += 1
        if config.patience and waited >= config.patience:
            break
    if best is not None:
        for parameter, value in zip(parameters, best[1], strict=True):
            parameter.data = value
    return losses, measured


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 3},
        {"epochs": 2.5, "seed": 4},
        {"max_steps": 9, "accumulate": 2, "batch_size": 2},
        {"epochs": 3, "accumulate": 3, "batch_size": 1, "lr_schedule": "cosine", "warmup": 0.3},
        {"max_steps": 7, "lr_schedule": "constant", "warmup": 0, "weight_decay": 0.5},
        {"max_steps": 12, "warmup": 1},
        {"epochs": 3, "eval_steps": 4, "label_smoothing": 0.1},
        {"epochs": 4, "eval_steps": 2, "patience": 0},
        {"epochs": 6, "eval_steps": 2, "patience": 2, "lr": 0.2},
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()),
)
def test_a_run_equals_the_slow_loop(tmp_path, changes):
    config = settings(tmp_path / "run", **changes)
    ours, plain = model(), model()
    training = Training(LanguageEngine(ours, 2, TRAIN), TRAIN, config)
    with RunFolder(config) as run:
        outcome = run_training(training, HELD_OUT, config, run, Reporter())
    losses, measured = slow_loop(plain, config)
    assert [step.loss for step in outcome.steps] == pytest.approx(losses, rel=1e-9)
    assert {step.number: step.eval_loss for step in outcome.steps if step.eval_loss} == pytest.approx(
        measured, rel=1e-9
    )
    for one, other in zip(trainable_parameters(ours), trainable_parameters(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    if config.eval_steps:
        assert outcome.adapter_step == min(measured, key=measured.__getitem__)
    if config.epochs == 6:
        assert outcome.stopped_early
        assert outcome.adapter_step + 2 * 2 == len(outcome.steps) < len(training.plan)


def test_batches_of_one_accumulated_equal_one_batch():
    adapters = []
    for changes in ({"batch_size": 4}, {"batch_size": 1, "accumulate": 4}):
        run = model()
        steps = list(Training(LanguageEngine(run, 2, TRAIN), TRAIN, settings(max_steps=1, **changes)).steps())
        adapters.append((steps[0].loss, steps[0].gradient_norm, steps[0].tokens))
    assert adapters[0] == pytest.approx(adapters[1], rel=1e-12)


def test_only_the_factors_decay_and_by_rate_times_decay():
    config = settings(max_steps=1, weight_decay=0.5, warmup=0, lr_schedule="constant")
    made = model(lora_bias=True)
    training = Training(LanguageEngine(made, 2, TRAIN), TRAIN, config)
    before = [parameter.detach().clone() for parameter in training.parameters]
    for parameter in training.parameters:
        parameter.grad = torch.zeros_like(parameter)
    training.optimizer.step()
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    for parameter, value in zip(training.parameters, before, strict=True):
        decays = names[id(parameter)].endswith(("lora_A", "lora_B"))
        torch.testing.assert_close(parameter.detach(), value * (1 - 0.02 * 0.5 if decays else 1))


def test_evaluations_are_a_default_only_where_they_cost_at_most_a_tenth():
    for epochs, interval in ((1, 0), (10, 8)):
        config = settings(epochs=epochs, eval_steps=None)
        plan = Training(LanguageEngine(model(), 2, TRAIN), TRAIN, config).plan
        assert evaluations(config, plan, HELD_OUT) == (interval, HELD_OUT)
        assert evaluations(config, plan, []) == (0, [])
    assert evaluations(settings(eval_steps=7), [], HELD_OUT) == (7, HELD_OUT)


def test_one_epoch_is_evaluated_often_enough_to_stop_early_on_a_part_of_the_rows():
    train, held_out = rows(900, 3), rows(200, 4)
    plan = planned_steps(train, settings(epochs=1, eval_steps=None))
    every, watched = evaluations(settings(eval_steps=None), plan, held_out)
    assert -(-len(plan) // every) == EVALUATIONS > settings().patience
    assert FEWEST_ROWS <= len(watched) < len(held_out)
    places = [held_out.index(row) for row in watched]
    assert places == sorted(set(places))
    assert places[-1] >= 0.98 * len(held_out)
    work = FORWARD_SHARE * EVALUATIONS * sum(len(row.ids) for row in watched)
    budget = EVALUATION_BUDGET * plan.tokens
    assert 0.9 * budget < work <= 1.05 * budget
