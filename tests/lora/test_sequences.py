"""Sequences of calls, each of which works by itself: several adapters and models, merges, blocks, other frameworks."""

import warnings

import peft
import pytest
import torch
from conftest import randomise_adapter, tiny
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune, weight_norm
from transformers import BartConfig, BartForSequenceClassification

from rankwise import (
    LoraConfig,
    activate_,
    adapters_by_row,
    adapters_off,
    delete_adapter_,
    eject_,
    inject_,
    load_adapter_,
    merge_,
    register_layer,
    reset_adapter_,
    save_adapter,
    start_from_data_,
    start_from_original_,
    trainable_parameters,
    unmerge_,
)
from rankwise.errors import ConfigError, MergeError, TargetError
from rankwise.lora import kinds
from rankwise.lora.adapters import adapters_by_part
from rankwise.lora.linear import LoraLinear

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
LIN = {"r": 2, "target_modules": ["lin"]}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x):
        return self.lin(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.block, self.head = nn.Linear(8, 8), Block(), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.block(torch.tanh(self.lin(x))))


def adapted(*configs, model=None):
    """A model with adapters "a", "b", …, all with random numbers; the last is at work."""
    model = Model() if model is None else model
    for name, config in zip("abc", configs, strict=False):
        inject_(model, LoraConfig(**{**LIN, **config}), adapter=name)
        randomise_adapter(model, seed=ord(name), std=0.3)
    return model


def with_(modules):
    model = nn.Sequential()
    for name, module in modules.items():
        model.add_module(name, module)
    return model


def training(model):
    return {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def alone(tmp_path):
    """A process group of this one process."""
    distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def of_a_part():
    model = adapted({})
    return model, model.block


def of_a_model_that_shares():
    encoder = Block()
    first, second = with_({"enc": encoder, "own": nn.Linear(8, 8)}), with_({"enc": encoder, "own": nn.Linear(8, 8)})
    inject_(second, LoraConfig(r=2, target_modules=["own"]))
    return adapted({}, model=first), second


@pytest.mark.parametrize("other", [of_a_part, of_a_model_that_shares])
@pytest.mark.parametrize("change", [lambda m: inject_(m, LoraConfig(**LIN), adapter="b"), eject_])
def test_layers_that_another_model_adapts_are_left_alone(other, change):
    model, second = other()
    before = model(X)
    with pytest.raises(ConfigError, match=r"an adapter was put into another model|carries no adapter"):
        change(second)
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_eject_while_merged_leaves_the_very_base_with_biases_of_both_kinds(bias):
    state = Model().state_dict()
    model = adapted({"lora_bias": True, "bias": bias})
    merge_(model)
    eject_(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_copy_of_a_module_starts_from_the_bases_own_bias():
    model, base = adapted({"bias": "all"}), Model()
    inject_(model, LoraConfig(**LIN, modules_to_save=["head"]), adapter="b")
    assert torch.equal(model(X), base(X))
    randomise_adapter(model)
    activate_(model, "a")
    before = model(X)
    reset_adapter_(model, "b")
    assert torch.equal(model(X), before)
    activate_(model, "b")
    assert torch.equal(model(X), base(X))


def test_a_tie_is_seen_under_a_merged_head():
    model = tiny("llama-tied")
    inject_(model, LoraConfig(r=2, target_modules=["lm_head"]), adapter="a")
    randomise_adapter(model)
    merge_(model)
    before = model(torch.arange(3, 9)[None]).logits
    with pytest.raises(ConfigError, match=r"lm_head uses the table of model\.embed_tokens"):
        inject_(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3]), adapter="b")
    assert torch.equal(model(torch.arange(3, 9)[None]).logits, before)


def test_a_bias_trains_and_is_saved_under_fsdp(alone, tmp_path):
    model = adapted({"bias": "lora_only"})
    fully_shard(model)
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=1.0)
    model(X).square().sum().backward()
    optimizer.step()
    bias = dict(model.named_parameters())["lin.base.bias"].full_tensor()
    assert not torch.equal(bias, before["lin.base.bias"])
    save_adapter(model, tmp_path / "saved")
    assert torch.equal(
        load_file(tmp_path / "saved/adapter_model.safetensors")["base_model.model.lin.base_layer.bias"], bias
    )


def test_a_bias_that_fsdp_holds_cannot_be_switched(alone):
    model = adapted({}, {"bias": "lora_only"})
    fully_shard(model)
    randomise_adapter(model)
    before = model(X)
    with pytest.raises(ConfigError, match="under FSDP2 those cannot be switched"), adapters_off(model):
        pass
    with pytest.raises(ConfigError, match="under FSDP2 those cannot be switched"):
        activate_(model, "a")
    assert torch.equal(model(X), before)


def test_a_compiled_model_is_the_model(tmp_path):
    model = Model()
    compiled = torch.compile(model, backend="eager")
    adapted({}, model=compiled)
    after = model(X)
    save_adapter(compiled, tmp_path)
    eject_(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    load_adapter_(model, tmp_path)
    assert torch.equal(model(X), after)


def test_a_distributed_model_says_what_to_give_instead(alone, tmp_path):
    with pytest.raises(ConfigError, match=r"DistributedDataParallel around .* its \.module"):
        save_adapter(DistributedDataParallel(adapted({})), tmp_path)


def test_by_row_the_adapters_can_be_off_and_blocks_can_be_nested():
    ids = torch.tensor([[3, 4], [4, 5], [3, 5]])
    model = with_({"emb": nn.Embedding(10, 8), "lin": nn.Linear(8, 8), "head": nn.Linear(8, 4)})
    base = model(ids)
    adapted(*2 * [{"modules_to_save": ["head"], "trainable_token_indices": {"emb": [3, 4]}}], model=model)
    with adapters_by_row(model, ["a", "b", None]):
        before = model(ids)
        with adapters_off(model):
            assert torch.equal(model(ids), base)
        with adapters_by_row(model, ["b", "b", "b"]):
            assert not torch.equal(model(ids), before)
        assert torch.equal(model(ids), before)


def test_only_adapters_at_work_train_and_what_was_frozen_stays_so(alone):
    model = adapted({"modules_to_save": ["head"], "bias": "lora_only"}, {"target_modules": ["block.lin"]})
    ids = {id(parameter) for parameter in trainable_parameters(model)}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == ids
    wrapped = DistributedDataParallel(model)
    for _ in range(2):  # The second step fails where a parameter got no gradient in the first.
        wrapped(X).sum().backward()
    activate_(model, "a")
    model.lin.update("a").lora_A.requires_grad_(False)
    frozen = len(trainable_parameters(model))
    merge_(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    unmerge_(model)
    activate_(model, {"a": 1.0, "b": 1.0})
    assert not model.lin.update("a").lora_A.requires_grad
    assert len(trainable_parameters(model)) == frozen + len(ids)


def test_an_adapter_for_inference_stays_frozen():
    model = adapted({"inference_mode": True}, {})
    activate_(model, {"a": 1.0, "b": 1.0})
    assert training(model) == {"b"}
    with adapters_by_row(model, ["a", "a", "b"]):
        assert training(model) == {"b"}


def test_idle_adapters_train_in_the_blocks_that_use_them():
    parts = adapted({}, {})
    with adapters_by_part(parts, ["a", "b"], {3: (1, 2)}):
        parts(X).sum().backward()
    rows = adapted({}, {})
    with adapters_by_row(rows, ["a", "b", "b"]):
        out = rows(X)
    out.sum().backward()
    for model in (parts, rows):
        assert all(model.lin.update(name).lora_B.grad.any() for name in ("a", "b"))
    activate_(rows, "a")
    assert training(rows) == {"a"}


def test_inference_by_row_lets_nothing_train():
    model = adapted({}, {})
    with torch.no_grad(), adapters_by_row(model, ["a", "b", "b"]):
        model(X)
    assert training(model) == {"b"}


class NoBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_features = self.out_features = 8
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.weight.T


def by_old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weight_norm(layer)


@pytest.mark.parametrize(
    "changed",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        by_old_weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
        lambda layer: NoBias(),
    ],
)
def test_a_layer_that_cannot_keep_a_sum_is_not_merged(changed, monkeypatch):
    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))
    register_layer(NoBias, LoraLinear)
    model = with_({"plain": nn.Linear(8, 8), "changed": changed(nn.Linear(8, 8))}).eval()
    adapted({"target_modules": ["plain", "changed"], "lora_bias": True}, model=model)
    before, state = model(X), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(MergeError, match=r"changed: .* no parameter"):
        merge_(model)
    assert torch.equal(model(X), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def loss_of(model):
    return lambda batch: model(batch).sum()


@pytest.mark.parametrize(
    ("config", "change"),
    [
        ({}, lambda model: reset_adapter_(model, "a")),
        ({}, lambda model: delete_adapter_(model, "a")),
        ({"init_lora_weights": "eva"}, lambda model: start_from_data_(model, [X], loss_of(model), "a")),
        ({"init_lora_weights": "corda"}, lambda model: start_from_data_(model, [X], loss_of(model), "a")),
        ({}, lambda model: start_from_original_(model, Model().state_dict(), "a")),
    ],
)
def test_a_merged_adapter_does_not_change(config, change):
    model = adapted(config)
    merge_(model)
    before = model(X)
    with pytest.raises(ConfigError, match="'a' is merged; go back first"):
        change(model)
    assert torch.equal(model(X), before)
    unmerge_(model)
    torch.testing.assert_close(model(X), before)


def test_loftq_starts_from_the_base_beside_a_merged_adapter():
    original = {f"{name}.weight": torch.randn(8, 8) for name in ("lin", "block.lin")}
    model = adapted({})
    merge_(model)
    inject_(model, LoraConfig(**LIN), adapter="b")
    start_from_original_(model, original, "b")
    beside = model.lin.delta("b", torch.float64)
    unmerge_(model)
    start_from_original_(model, original, "b")
    assert torch.equal(model.lin.delta("b", torch.float64), beside)


def test_eva_keeps_the_scale_and_waits_for_the_end_of_a_block(tmp_path):
    model = with_({"one": nn.Linear(8, 8), "two": nn.Linear(8, 8)})
    with torch.no_grad():
        model.one.weight.copy_(torch.randn(8, 1) @ torch.randn(1, 8))
    base = model(X)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["one", "two"], init_lora_weights="eva")
    inject_(model, config, adapter="a")
    with adapters_off(model):
        with pytest.raises(ConfigError, match="after the block"):
            start_from_data_(model, [torch.randn(50, 8)], loss_of(model), "a")
        assert torch.equal(model(X), base)
    inject_(model, LoraConfig(r=2, target_modules=["one"]), adapter="b")
    ranks = start_from_data_(model, [torch.randn(50, 8)], loss_of(model), "a")
    assert len(set(ranks.values())) == 2
    assert training(model) == {"b"}
    save_adapter(model, tmp_path, "a")
    load_adapter_(model, tmp_path, adapter="again")
    for name in ("a", "again"):
        assert {layer.update(name).scale for layer in model} == {6 / 4}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        return x @ self.w[0].T


@pytest.mark.parametrize("separately", [False, True])
def test_bare_parameters_in_a_module_that_trains_in_full_are_refused(separately):
    model = with_({"lin": nn.Linear(8, 8), "mlp": with_({"experts": Experts()})})
    parameters, head = {"target_parameters": ["experts.w"]}, {"modules_to_save": ["mlp"]}
    if separately:
        adapted(head, model=model)
    with pytest.raises((ConfigError, TargetError), match=r"trains in full|matches none"):
        inject_(model, LoraConfig(**LIN, **parameters, **({} if separately else head)), adapter="b")


def test_a_copy_of_a_module_and_another_adapters_bias_of_it_have_no_sum():
    head, bias = {"modules_to_save": ["head"]}, {"bias": "all"}
    model = adapted(bias, head)
    before = model(X)
    with pytest.raises(ConfigError, match="b trains head in full and a a bias in it"):
        activate_(model, {"a": 1.0, "b": 1.0})
    assert torch.equal(model(X), before)
    model = adapted(bias)
    merge_(model)
    before = model(X)
    with pytest.raises(ConfigError, match="head has a bias that a merged adapter trains"):
        inject_(model, LoraConfig(**LIN, **head), adapter="b")
    assert torch.equal(model(X), before)


def test_a_classifier_of_a_model_without_the_tasks_head_loads(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    base = BartForSequenceClassification(BartConfig(vocab_size=50, **sizes, **heads)).eval()
    ids, state = torch.tensor([[0, 5, 6, 2]]), {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], r=2, init_lora_weights=False)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path)
    expected = theirs(ids).logits
    model = BartForSequenceClassification(base.config).eval()
    model.load_state_dict(state)
    load_adapter_(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, expected)


def test_the_row_of_padding_gets_no_gradient():
    model = with_({"emb": nn.Embedding(10, 8, padding_idx=3), "lin": nn.Linear(8, 8)})
    adapted({"trainable_token_indices": {"emb": [4, 3]}}, model=model)
    model(torch.tensor([3, 4, 5])).sum().backward()
    assert model.emb.rows("a").values.grad.any(dim=1).tolist() == [True, False]


def test_the_generator_draws_all_of_an_embeddings_start():
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    models = [nn.Sequential(nn.Embedding(10, 4)) for _ in range(2)]
    for model in models:
        inject_(model, config, generator=torch.Generator().manual_seed(1))
    one, other = (model[0].update("default") for model in models)
    assert torch.equal(one.lora_A, other.lora_A)
    assert torch.equal(one.lora_B, other.lora_B)


@pytest.mark.parametrize("container", [nn.ModuleList([nn.Linear(8, 2)]), nn.ModuleDict({"a": nn.Linear(8, 2)})])
def test_a_container_of_modules_cannot_train_in_full(container):
    with pytest.raises(TargetError, match=r"heads is a Module.*name what is in it"):
        inject_(
            nn.ModuleDict({"lin": nn.Linear(8, 8), "heads": container}), LoraConfig(**LIN, modules_to_save=["heads"])
        )


def test_a_batch_norm_counts_no_rows_of_others():
    model = with_({"lin": nn.Linear(8, 8), "norm": nn.BatchNorm1d(8)})
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(6, 8)
    adapted({"modules_to_save": ["norm"]}, model=model)
    model.norm.base.eval()  # What trains is the copy.
    with adapters_by_row(model, ["a", None, "a", "a", None, "a"]):
        mixed = model(x)
    with adapters_off(model):
        torch.testing.assert_close(mixed[[1, 4]], model(x)[[1, 4]])
    model.norm.base.train()
    with adapters_by_row(model, ["a"] * 6):
        alone = model(x)
    torch.testing.assert_close(alone, model(x))
    eject_(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


class Pair(Block):
    def forward(self, x):
        return self.lin(x), None


def test_rows_that_are_none_or_have_no_tensor_are_told():
    model = adapted({"modules_to_save": ["head"]}, model=with_({"lin": nn.Linear(8, 8), "head": Pair()}))
    with pytest.raises(ConfigError, match="found none"), adapters_by_row(model, []):
        pass
    with pytest.raises(ConfigError, match="a Pair returned tuple"), adapters_by_row(model, ["a", None, None]):
        model(X)
