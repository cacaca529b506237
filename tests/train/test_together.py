"""Several adapters in one pass over the base, in fp64: each must become what it becomes in a training of its own."""

import random
from pathlib import Path

import pytest
import torch
from conftest import randomise_adapter, tiny
from torch import nn

from rankwise import LoraConfig, TrainConfig, activate_, inject_
from rankwise.data.examples import TextExample
from rankwise.data.labelled import LabelExample
from rankwise.engine.classifiers import ClassifierEngine
from rankwise.engine.language import LanguageEngine
from rankwise.errors import ConfigError
from rankwise.train.loop import Training
from rankwise.train.together import train_together

SHARED = tuple(range(20, 45))
"""What some rows begin with: long enough for the engine to compute it once."""


def texts(count, seed):
    """Rows of different lengths; every second one begins as others do."""
    draw = random.Random(seed)
    made = []
    for n in range(count):
        prompt = (SHARED if n % 2 else ()) + tuple(draw.randrange(3, 96) for _ in range(draw.randrange(2, 7)))
        answer = tuple(draw.randrange(3, 96) for _ in range(draw.randrange(1, 5)))
        made.append(TextExample(prompt + answer, (False,) * len(prompt) + (True,) * len(answer), f"data:{n}"))
    return made


def labelled(count, seed):
    draw = random.Random(seed)
    return [
        LabelExample(tuple(draw.randrange(3, 96) for _ in range(draw.randrange(2, 9))), draw.randrange(5), f"data:{n}")
        for n in range(count)
    ]


def settings(**changes):
    plain = {"batch_size": 8 if "batch_tokens" in changes else 3, "lr": 0.02, "seed": 3}
    return TrainConfig(model="m", data=(Path("d"),), out=Path("o"), **{**plain, **changes})


def base(family):
    model = tiny(family)
    # transformers' own RMSNorm rounds to fp32 inside, in the backward pass too, whatever the model's type.
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon))
    if family != "bert":
        model.lm_head.weight.data *= 30
    return model


class Jobs:
    """Adapters, each with its settings and rows, in models of their own or in one."""

    def __init__(self, family, jobs):
        self.family = family
        self.jobs = [(LoraConfig(**lora), settings(**changes), rows) for lora, changes, rows in jobs]
        self.sample = [row for _, _, rows in self.jobs for row in rows]

    def engine(self, indices):
        model = base(self.family).double()
        for index in indices:
            inject_(model, self.jobs[index][0], adapter=f"adapter{index}")
            # From B = 0 rounding grows by much in the first steps.
            randomise_adapter(model, seed=index)
        return (ClassifierEngine if self.family == "bert" else LanguageEngine)(model, 2, self.sample)

    def training(self, engine, index):
        activate_(engine.model, f"adapter{index}")
        return Training(engine, self.jobs[index][2], self.jobs[index][1])

    def alone(self):
        """For each job (its steps, what it trained)."""
        for index in range(len(self.jobs)):
            training = self.training(self.engine([index]), index)
            torch.manual_seed(self.jobs[index][1].seed)
            yield list(training.steps()), training.parameters

    def together(self):
        """The same from one model."""
        engine = self.engine(range(len(self.jobs)))
        trainings = [self.training(engine, index) for index in range(len(self.jobs))]
        steps = {training: [] for training in trainings}
        for training, step in train_together(trainings):
            steps[training].append(step)
        return [(own, training.parameters) for training, own in steps.items()]

    def check(self):
        for (ours, our_values), (theirs, their_values) in zip(self.together(), self.alone(), strict=True):
            assert [step.number for step in ours] == [step.number for step in theirs]
            for of_step in ("loss", "gradient_norm", "learning_rate", "tokens", "of"):
                assert [getattr(s, of_step) for s in ours] == pytest.approx(
                    [getattr(s, of_step) for s in theirs], rel=1e-10
                )
            for one, other in zip(our_values, their_values, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


ALL = "all-linear"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt-neox"])
def test_each_adapter_becomes_what_it_becomes_alone(family):
    Jobs(
        family,
        [
            ({"r": 2, "target_modules": ALL}, {"epochs": 2}, texts(9, 1)),
            ({"r": 5, "target_modules": ALL}, {"epochs": 2, "lr": 0.005, "seed": 4}, texts(9, 1)),
            ({"r": 1, "target_modules": ALL, "lora_alpha": 8}, {"max_steps": 9, "lr_schedule": "cosine"}, texts(7, 2)),
        ],
    ).check()


def test_each_keeps_its_own_batches_optimiser_schedule_and_end():
    Jobs(
        "llama",
        [
            ({"r": 2, "target_modules": ALL}, {"max_steps": 2, "weight_decay": 0.5}, texts(5, 1)),
            ({"r": 3, "target_modules": ALL}, {"max_steps": 6, "accumulate": 3, "batch_size": 2}, texts(11, 2)),
            ({"r": 4, "target_modules": ALL}, {"max_steps": 4, "lora_plus_ratio": 4.0, "warmup": 0.5}, texts(6, 3)),
            (
                {"r": 2, "target_modules": ALL},
                {"max_steps": 7, "preconditioned": True, "batch_tokens": 60},
                texts(9, 4),
            ),
        ],
    ).check()


def test_adapters_of_other_modules_and_kinds_share_a_pass():
    Jobs(
        "llama",
        [
            ({"r": 2, "target_modules": ["q_proj", "up_proj"]}, {"epochs": 2}, texts(9, 1)),
            ({"r": 3, "target_modules": ["q_proj", "v_proj"], "use_dora": True}, {"epochs": 2}, texts(9, 2)),
            ({"r": 1, "target_modules": ["q_proj", "down_proj"], "lora_bias": True}, {"epochs": 2}, texts(9, 3)),
            ({"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["lm_head"]}, {"epochs": 2}, texts(9, 3)),
        ],
    ).check()


def test_dropout_draws_the_masks_of_a_run_by_itself():
    Jobs(
        "llama",
        [
            ({"r": 2, "target_modules": ALL, "lora_dropout": 0.3}, {"epochs": 2, "accumulate": 2}, texts(9, 1)),
            ({"r": 3, "target_modules": ALL, "lora_dropout": 0.1}, {"epochs": 2, "seed": 5}, texts(9, 2)),
            ({"r": 1, "target_modules": ALL}, {"epochs": 1}, texts(9, 2)),
        ],
    ).check()


@pytest.mark.parametrize("lower", [0, 1])
def test_a_pass_begins_at_the_lowest_block_that_trains_in_all_of_them(lower, monkeypatch, tmp_path):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path))
    Jobs(
        "llama",
        [
            ({"r": 2, "target_modules": ALL, "layers_to_transform": [1]}, {"epochs": 2}, texts(9, 1)),
            ({"r": 3, "target_modules": ALL, "layers_to_transform": [lower]}, {"epochs": 2}, texts(9, 2)),
        ],
    ).check()


def test_classifiers_train_their_own_heads():
    Jobs(
        "bert",
        [
            ({"r": 2, "task_type": "SEQ_CLS", "target_modules": ALL}, {"epochs": 2, "batch_size": 4}, labelled(9, 1)),
            ({"r": 3, "task_type": "SEQ_CLS", "target_modules": ALL}, {"epochs": 1, "batch_size": 1}, labelled(6, 2)),
            ({"r": 1, "task_type": "SEQ_CLS", "target_modules": ["query"]}, {"max_steps": 4}, labelled(9, 1)),
        ],
    ).check()


def test_one_that_diverges_ends_and_leaves_the_others_as_they_are():
    calm = ({"r": 2, "target_modules": ALL}, {"max_steps": 6}, texts(9, 1))
    wild = ({"r": 2, "target_modules": ALL}, {"max_steps": 6, "lr": 1e200}, texts(9, 1))
    jobs = Jobs("llama", [calm, wild, calm])
    engine = jobs.engine(range(3))
    trainings = [jobs.training(engine, index) for index in range(3)]
    numbers = [[], [], []]
    for training, step in train_together(trainings):
        numbers[trainings.index(training)].append(step.number)
    assert numbers[0] == numbers[2] == [1, 2, 3, 4, 5, 6]
    assert "not finite at step" in str(trainings[1].failed)
    assert trainings[1].done == len(numbers[1]) < 6
    for index, (_, values) in enumerate(Jobs("llama", [calm, calm, calm]).alone()):
        if index != 1:
            for one, other in zip(trainings[index].parameters, values, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_an_adapter_may_be_used_and_stays_as_it_is_once_its_training_has_ended():
    rows = texts(9, 1)
    jobs = Jobs("llama", [({"r": 2, "target_modules": ALL}, {"max_steps": steps}, rows) for steps in (2, 5)])
    engine = jobs.engine(range(2))
    trainings = [jobs.training(engine, index) for index in range(2)]
    ended = []
    for training, step in train_together(trainings):
        if step.number == step.of and training is trainings[0]:
            ended = [parameter.detach().clone() for parameter in training.parameters]
            activate_(engine.model, "adapter0")
            with torch.no_grad():
                engine.loss(rows)
    assert all(torch.equal(one, other) for one, other in zip(trainings[0].parameters, ended, strict=True))
    _, (_, alone) = jobs.alone()
    for one, other in zip(trainings[1].parameters, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("lora", "changes", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, {}, "embed_tokens is no linear layer"),
        ({"bias": "all", "target_modules": ["q_proj"]}, {}, "biases cannot share a pass"),
        ({}, {"label_smoothing": 0.1}, "the same label_smoothing"),
    ],
)
def test_what_cannot_share_a_pass_is_refused_before_any_step(lora, changes, message):
    plain = {"r": 2, "target_modules": ALL}
    jobs = Jobs("qwen2", [(plain, {}, texts(5, 1)), ({**plain, **lora}, changes, texts(5, 1))])
    engine = jobs.engine(range(2))
    trainings = [jobs.training(engine, index) for index in range(2)]
    before = [parameter.detach().clone() for training in trainings for parameter in training.parameters]
    with pytest.raises(ConfigError, match=message):
        next(train_together(trainings))
    after = [parameter for training in trainings for parameter in training.parameters]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_the_same_adapter_twice_a_sum_and_a_padded_model_are_refused():
    jobs = Jobs("llama", [({"r": 2, "target_modules": ALL}, {}, texts(5, 1))] * 2)
    engine = jobs.engine(range(2))
    one, other = (jobs.training(engine, index) for index in range(2))
    with pytest.raises(ConfigError, match="an adapter of its own, found adapter0, adapter0"):
        next(train_together([one, one]))
    activate_(engine.model, {"adapter0": 1.0, "adapter1": 0.5})
    with pytest.raises(ConfigError, match="no sum of several"):
        next(train_together([one, Training(engine, texts(5, 1), settings())]))
    with pytest.raises(ConfigError, match="one model and its engine"):
        next(train_together([one, jobs.training(jobs.engine(range(2)), 1)]))
    engine.recomputes = True
    with pytest.raises(ConfigError, match="computed again"):
        next(train_together([one, other]))
    engine.packs, engine.padded_because = False, "it is a test"
    with pytest.raises(ConfigError, match="padded: it is a test"):
        next(train_together([one, other]))
