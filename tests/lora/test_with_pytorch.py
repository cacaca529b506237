"""An adapted model beside what PyTorch and transformers do with models."""

from copy import deepcopy

import pytest
import torch
from conftest import randomise_adapter, tiny
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from rankwise import (
    LoraConfig,
    activate_,
    adapters_off,
    eject_,
    inject_,
    load_adapter_,
    merge_,
    register_layer,
    save_adapter,
    unmerge_,
)
from rankwise.lora.inject import trainable_parameters
from rankwise.lora.linear import LoraLinear
from rankwise.models.load import load_tokenizer
from rankwise.models.trainer import AdapterCheckpoints

IDS = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])


def adapted(family="llama", **config):
    model = tiny(family)
    inject_(model, LoraConfig(**{"r": 2, **config}))
    randomise_adapter(model)
    return model


def gradients(model):
    model(IDS).logits.square().sum().backward()
    found = [p.grad.clone() for p in trainable_parameters(model)]
    model.zero_grad()
    return found


# torch warns of its own way to trace an autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dora", [False, True])
def test_dynamo_captures_an_adapted_model_without_a_graph_break(dora):
    model = adapted(use_dora=dora)
    explained = torch._dynamo.explain(lambda ids: model(ids, use_cache=False).logits)(IDS)
    assert explained.graph_break_count == 0, explained.break_reasons
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = adapted()
    expected = gradients(model)
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_deep_copy_is_independent():
    model = adapted(bias="lora_only", trainable_token_indices=[5])
    before = model(IDS).logits
    copy = deepcopy(model)
    randomise_adapter(copy, seed=9)
    assert torch.equal(model(IDS).logits, before)
    assert not torch.equal(copy(IDS).logits, before)
    eject_(copy)
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_what_is_kept_outside_the_model_changes_its_type_with_it(bias):
    model = tiny("qwen2")
    own = dict(model.named_parameters())
    names = {parameter: name for name, parameter in own.items()}
    base = {name: parameter.detach().clone() for name, parameter in own.items()}
    inject_(model, LoraConfig(r=2, bias=bias), adapter="one")
    randomise_adapter(model)
    inject_(model, LoraConfig(r=2, lora_bias=True), adapter="two")
    randomise_adapter(model)
    listed = set(model.state_dict())
    for active in ("one", "two"):
        activate_(model, active)
        expected = model.float()(IDS).logits
        merge_(model)
        model.double()
        torch.testing.assert_close(model(IDS).logits, expected.double(), rtol=1e-4, atol=1e-4)
        with adapters_off(model):
            torch.testing.assert_close(model(IDS).logits, tiny("qwen2").double()(IDS).logits, rtol=1e-5, atol=1e-5)
        unmerge_(model)
        assert set(model.state_dict()) == listed
        torch.testing.assert_close(model(IDS).logits, expected.double(), rtol=1e-4, atol=1e-4)
    eject_(model.float())
    assert {parameter: name for name, parameter in model.named_parameters()} == names
    assert all(torch.equal(parameter, base[name]) for name, parameter in model.named_parameters())


def test_autocast_computes_in_the_lower_type_and_trains_in_fp32():
    model = adapted()
    full = model(IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        low = model(IDS).logits
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.02)
    low.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trainable_parameters(model))


def test_a_half_precision_base_keeps_its_type_and_the_adapter_is_fp32():
    model = tiny("llama", torch.bfloat16)
    inject_(model, LoraConfig(r=2))
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}
    assert model(IDS).logits.dtype == torch.bfloat16
    gradients(model)


def test_a_model_without_memory_can_be_adapted_and_then_materialised(tmp_path):
    trained = adapted()
    save_adapter(trained, tmp_path)
    with torch.device("meta"):
        model = LlamaForCausalLM(trained.config)
    report = inject_(model, LoraConfig(r=2))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert report.trainable_parameters == sum(p.numel() for p in trainable_parameters(trained))


def test_generation_uses_the_adapter_and_merging_does_not_change_it():
    model = adapted(lora_alpha=400)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    answer = model.generate(IDS, **options)
    assert not torch.equal(answer, tiny("llama").generate(IDS, **options))
    merge_(model)
    assert torch.equal(model.generate(IDS, **options), answer)


def test_transformers_trainer_trains_an_adapted_model_unchanged(tmp_path):
    model = tiny("llama")
    base = {name: p.clone() for name, p in model.named_parameters()}
    inject_(model, LoraConfig(r=2))
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}, {"input_ids": IDS[1], "labels": IDS[1]}]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        learning_rate=0.05,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    before = model(IDS, labels=IDS).loss.item()
    Trainer(model, arguments, train_dataset=rows).train()
    assert model(IDS, labels=IDS).loss.item() < before
    save_adapter(model, tmp_path / "adapter")
    eject_(model)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())
    load_adapter_(model, tmp_path / "adapter")


def test_a_trainers_checkpoints_hold_the_adapter_alone(tmp_path):
    model = tiny("llama")
    inject_(model, LoraConfig(r=2))
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, learning_rate=0.05, report_to=[], use_cpu=True, disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[AdapterCheckpoints()]).train()
    for step in (1, 2):
        files = {path.name for path in (tmp_path / f"checkpoint-{step}").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= files
        kept = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert kept.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    other = tiny("llama")
    load_adapter_(other, tmp_path / "checkpoint-2")
    torch.testing.assert_close(other(IDS).logits, model(IDS).logits)


def trainer_of(config, folder, seed=0, **settings):
    """A Trainer of an adapted model whose learning rate falls over four steps, with a checkpoint after each."""
    model = tiny("qwen2")
    torch.manual_seed(seed)
    inject_(model, config)
    rows = [{"input_ids": ids, "labels": ids} for ids in (*IDS, *IDS + 1)]
    fixed = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    fixed |= {"learning_rate": 0.05, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), **fixed, **settings)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[AdapterCheckpoints()])


@pytest.mark.parametrize(
    "config",
    [
        {"lora_dropout": 0.3, "bias": "all", "modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa_niter_2", "target_modules": ["q_proj"], "use_dora": True},
    ],
    ids=["more than updates", "a start drawn at random"],
)
def test_a_trainer_that_goes_on_from_a_checkpoint_computes_what_it_would_have_without_a_break(config, tmp_path):
    config = LoraConfig(r=2, **config)
    whole = trainer_of(config, tmp_path / "whole")
    whole.train()
    resumed = trainer_of(config, tmp_path / "resumed", seed=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    state = resumed.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.model.state_dict().items())
    assert resumed.state.log_history[-1]["step"] == 4


def test_a_trainer_ends_with_the_best_adapter(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
    trainer = trainer_of(LoraConfig(r=2), tmp_path, load_best_model_at_end=True, **settings)
    trainer.train()
    assert not trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best = tiny("qwen2")
    load_adapter_(best, trainer.state.best_model_checkpoint)
    assert torch.equal(trainer.model.eval()(IDS).logits, best(IDS).logits)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # of TRL 1.16
def test_trls_trainer_trains_an_injected_model_and_keeps_the_adapter_alone(tmp_path):
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    model = tiny("llama")
    inject_(model, LoraConfig(r=2))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".shares." not in name}
    settings = {"max_steps": 2, "save_steps": 1, "learning_rate": 0.05, "report_to": [], "use_cpu": True, "bf16": False}
    SFTTrainer(
        model,
        SFTConfig(str(tmp_path), **settings, disable_tqdm=True, max_length=None),
        train_dataset=Dataset.from_list([{"input_ids": IDS[0].tolist()}] * 4),
        processing_class=load_tokenizer("smollm2-135m"),
        callbacks=[AdapterCheckpoints()],
    ).train()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in base.items())
    assert not load_file(tmp_path / "checkpoint-2" / "model.safetensors").keys() & base.keys()
    other = tiny("llama")
    load_adapter_(other, tmp_path / "checkpoint-2")
    torch.testing.assert_close(other(IDS).logits, model.eval()(IDS).logits)
    assert not torch.equal(other(IDS).logits, tiny("llama")(IDS).logits)


class Scaled(nn.Module):
    """A linear layer of somebody's own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.in_features, self.out_features, self.bias = 4, 3, None

    def forward(self, x):
        return 2 * x @ self.weight.T


def test_a_registered_layer_carries_adapters():
    class LoraScaled(LoraLinear):
        def product(self, update, x):
            return 2 * super().product(update, x)

        def forward(self, x):
            return super(LoraLinear, self).forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(Scaled())
    register_layer(Scaled, LoraScaled)
    inject_(model, LoraConfig(r=2, target_modules=["0"]))
    randomise_adapter(model)
    x = torch.randn(5, 4)
    beside = model(x)
    merge_(model)
    torch.testing.assert_close(model(x), beside)


def test_a_config_of_another_size_is_told_from_the_model(tmp_path):
    save_adapter(adapted(), tmp_path)
    other = LlamaForCausalLM(LlamaConfig(**{**tiny("llama").config.to_dict(), "hidden_size": 16}))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match="the model needs"):
        load_adapter_(other, tmp_path)
    assert other.state_dict().keys() == before.keys()
