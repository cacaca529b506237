from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny

from rankwise import LoraConfig, TrainConfig, inject_, trainable_parameters
from rankwise.data.examples import TextExample
from rankwise.engine.language import LanguageEngine
from rankwise.errors import ConfigError, RankwiseError
from rankwise.train.loop import Training

EXAMPLES = [TextExample((5, 6, 7 + n, 8), (False, False, True, True), "here") for n in range(6)]


def settings(**changes):
    return TrainConfig(model="m", data=Path("d"), out=Path("o"), **{"batch_size": 3, "lr": 0.01, **changes})


def engine(**changes):
    model = tiny("llama")
    # A random head gives logits too small to tell tokens apart, whatever the adapter does.
    model.lm_head.weight.data *= 30
    torch.manual_seed(0)
    inject_(model, LoraConfig(r=2, **changes))
    return LanguageEngine(model, 2, EXAMPLES)


def test_training_on_alike_batches_sees_every_row_once_an_epoch():
    run = engine()
    config = settings(batches="alike", epochs=1)
    steps = list(Training(run, EXAMPLES, config).steps())
    assert sum(step.tokens for step in steps) == sum(len(example.ids) for example in EXAMPLES)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_lowers_the_loss_and_the_same_seed_gives_the_same_numbers(dropout):
    runs = []
    for _ in range(2):
        run = engine(lora_dropout=dropout)
        torch.manual_seed(7)
        losses = [step.loss for step in Training(run, EXAMPLES, settings(epochs=20)).steps()]
        runs.append((losses, [p.detach().clone() for p in trainable_parameters(run.model)]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    assert runs[0][0][-1] < 0.6 * runs[0][0][0]


def test_only_the_adapter_moves():
    run = engine()
    base = {n: p.clone() for n, p in run.model.named_parameters() if not p.requires_grad}
    list(Training(run, EXAMPLES, settings(epochs=2)).steps())
    assert all(torch.equal(p, base[n]) for n, p in run.model.named_parameters() if n in base)
    assert all(p.abs().max() > 0 for p in trainable_parameters(run.model))


def test_the_rate_rises_for_a_twentieth_of_the_steps_and_falls_to_nearly_zero():
    rates = [step.learning_rate for step in Training(engine(), EXAMPLES, settings(max_steps=40)).steps()]
    assert rates[0] == pytest.approx(0.005)
    assert max(rates) == rates[1] == pytest.approx(0.01)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.0003


def test_a_loss_that_is_not_finite_stops_before_the_adapter_is_spoilt():
    run = engine()
    run.model.lm_head.weight.data[:] = float("inf")
    before = [p.detach().clone() for p in trainable_parameters(run.model)]
    with pytest.raises(RankwiseError, match="not finite at step 1"):
        list(Training(run, EXAMPLES, settings()).steps())
    assert all(torch.equal(a, b) for a, b in zip(trainable_parameters(run.model), before, strict=True))


@pytest.mark.parametrize("longest", [0, 1e-3, 1e3])
def test_a_gradient_is_shortened_to_the_norm_that_is_given(longest):
    run, found = engine(), []
    training = Training(run, EXAMPLES, settings(max_steps=1, max_grad_norm=longest))

    def note(*_):
        found.append(sum(float(p.grad.square().sum()) for p in training.parameters) ** 0.5)

    training.optimizer.register_step_pre_hook(note)
    [first] = training.steps()
    assert first.gradient_norm > 1e-3
    assert found[0] == pytest.approx(1e-3 if longest == 1e-3 else first.gradient_norm, rel=1e-3)


def test_it_stops_between_two_steps():
    steps = list(Training(engine(), EXAMPLES, settings(epochs=20)).steps(lambda: True))
    assert len(steps) == 1


def test_a_classifier_has_no_alike_batches():
    with pytest.raises(ConfigError, match="--batches alike needs --task causal_lm"):
        settings(batches="alike", task="seq_cls")


def test_settings_that_cannot_be_are_all_named_at_once():
    with pytest.raises(ConfigError) as error:
        settings(
            lr=0, epochs=-1, batch_size=0, max_length=1, eval_fraction=1.0, max_steps=0, warmup=2, accumulate=0,
            label_smoothing=1.0,
        )  # fmt: skip
    wrong = ("lr", "epochs", "batch-size", "max-length", "eval-fraction", "max-steps", "warmup", "accumulate")
    for name in (*wrong, "label-smoothing"):
        assert f"--{name} must" in str(error.value)


WRONG = {
    "base_dtype": "bfloat16", "batches": "Alike", "recompute": True, "tracker": "tensorbord", "lr_schedule": "Linear",
    "task": "seqcls", "r": "8", "max_steps": 2.0, "layers_to_transform": "1", "model": 5, "out": None, "lr": "fast",
    "use_dora": 1, "seed": True, "data": 3, "columns": {"prompt": "q"}, "epochs": None,
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_another_type_is_named_beside_what_else_cannot_be(name):
    with pytest.raises(ConfigError) as error:
        TrainConfig(**{"model": "m", "data": "d", "out": "o", "lora_dropout": 2.0, name: WRONG[name]})
    assert f"--{name.replace('_', '-')} must be " in str(error.value)
    assert f", found {WRONG[name]!r}\n" in str(error.value)
    assert "--lora-dropout must lie in [0, 1), found 2.0" in str(error.value)


def test_one_value_serves_as_a_list_of_one_and_the_name_of_a_path_as_the_path():
    config = TrainConfig(
        model=Path("m"), data="d.jsonl", out="o", target_modules="q_proj", tracker="aim", layers_to_transform=1,
        columns=["prompt=q"],
    )  # fmt: skip  # pyright: ignore[reportArgumentType]
    assert (config.model, config.data, config.out) == ("m", (Path("d.jsonl"),), Path("o"))
    assert (config.target_modules, config.tracker, config.layers_to_transform) == (("q_proj",), ("aim",), (1,))
    assert config.columns == ("prompt=q",)


def test_numbers_of_numpy_and_the_users_folder_come_out_plain(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = settings(lr=np.float64(1e-3), max_steps=np.int64(7), layers_to_transform=(np.int64(1),))
    written = yaml.safe_load(replace(config, out="~/o", data="~/d").as_yaml())
    assert (written["lr"], written["max_steps"], written["layers_to_transform"]) == (1e-3, 7, [1])
    assert (written["out"], written["data"]) == (f"{tmp_path}/o", f"{tmp_path}/d")


@pytest.mark.parametrize("task", ["seq_cls", "token_cls", "embedding"])
def test_settings_without_an_effect_are_all_refused_at_once(task):
    with pytest.raises(ConfigError) as error:
        settings(
            task=task, train_on="all", eval_answers=7, metrics=True, eval_data="e.jsonl", eval_fraction=0.2,
            patience=5, eval_steps=0,
        )  # fmt: skip
    for message in (
        "--train-on all needs --task causal_lm",
        "--eval-answers needs --task causal_lm or seq2seq_lm",
        "--eval-data and --eval-fraction both say what is held out",
        "--patience 5 waits for held-out losses",
    ):
        assert message in str(error.value)
    with pytest.raises(ConfigError, match="--metrics needs held-out data"):
        settings(metrics=True, eval_fraction=0)
    with pytest.raises(ConfigError) as error:
        settings(task=task, eval_fraction=0, patience=7, eval_answers=7, batch_size=3, batch_tokens=90)
    for message in (
        "--patience 7 needs held-out data",
        "--eval-answers needs held-out data",
        "--batch-tokens and --batch-size both say how large a batch is",
    ):
        assert message in str(error.value)
    # Defaults, and what says that nothing is to be done.
    TrainConfig(model="m", data=Path("d"), out=Path("o"), eval_fraction=0, batch_tokens=90, patience=0, eval_answers=0)
    settings(task=task, eval_answers=0, eval_steps=0, eval_data="e.jsonl")
    settings(patience=0, eval_steps=0)


def test_one_target_that_is_not_a_plain_name_is_a_regular_expression():
    assert settings().targets == "all-linear"
    assert settings(target_modules=("q_proj",)).targets == ("q_proj",)
    assert settings(target_modules=("self_attn.q_proj", "up_proj")).targets == ("self_attn.q_proj", "up_proj")
    assert settings(target_modules=(r".*\.q_proj",)).targets == r".*\.q_proj"
