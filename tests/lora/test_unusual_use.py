"""Beyond the plain case: masks of padding, layers that are elsewhere, copies in a block, settings of a wrong type."""

from copy import deepcopy

import pytest
import torch
from conftest import randomise_adapter, tiny
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from transformers import LlamaForCausalLM, Wav2Vec2Config, Wav2Vec2Model, XLNetConfig, XLNetForSequenceClassification

from rankwise import (
    LoraConfig,
    activate_,
    adapters_by_row,
    adapters_off,
    combine_adapters_,
    eject_,
    inject_,
    load_adapter_,
    merge_,
    reset_adapter_,
    save_adapter,
    start_from_data_,
    trainable_parameters,
    unmerge_,
)
from rankwise.errors import ConfigError, MergeError, TargetError
from rankwise.lora.inject import injection
from rankwise.lora.narrow import NarrowLinear, compute_in_

IDS = torch.tensor([[3, 4, 5, 6]])


def near(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()


def test_an_adapted_attention_gives_zeros_where_the_base_does_for_a_query_that_sees_no_key():
    model = encoder()
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    padding = torch.tensor([[True, True, False, False], [False, False, False, False]])
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    base = model(x, mask=causal, src_key_padding_mask=padding)
    assert torch.isfinite(base).all()
    inject_(model, LoraConfig(r=2, target_modules=["self_attn"]))
    near(model(x, mask=causal, src_key_padding_mask=padding), base)
    randomise_adapter(model)
    output = model(x, mask=causal, src_key_padding_mask=padding)
    output.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in trainable_parameters(model))
    merge_(model)
    near(model(x, mask=causal, src_key_padding_mask=padding), output)


def test_an_encoders_attention_with_a_bias_of_B_serves_single_rows_and_dropout():
    model = encoder().eval()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    base = model(x)
    inject_(model, LoraConfig(r=2, target_modules=["self_attn"], lora_bias=True, lora_dropout=0.5))
    randomise_adapter(model)
    alone = model(x)
    with adapters_by_row(model, ["default", None]):
        mixed = model(x)
    near(mixed[0], alone[0])
    near(mixed[1], base[1])
    for layer in model.layers:
        layer.self_attn.shares.train()
    assert not torch.equal(model(x), model(x))


def test_adapters_of_a_task_without_its_head_combine():
    size = {"vocab_size": 20, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "num_labels": 2}
    model = XLNetForSequenceClassification(XLNetConfig(**size))
    for name in ("one", "two"):
        inject_(model, LoraConfig(r=2, target_modules=["layer_1"]), adapter=name)
        injection(model).configs[name] = LoraConfig(r=2, target_modules=["layer_1"], task_type="SEQ_CLS")
    combine_adapters_(model, {"one": 1.0, "two": 1.0}, "both")
    assert injection(model).configs["both"].task_type is None


@pytest.mark.parametrize("stored", ["bf16 throughout", "bf16, computed in fp32"])
def test_lora_ga_starts_over_a_narrow_base_from_gradients_summed_in_fp32(stored):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6)).bfloat16()
    x = torch.randn(5, 8)
    if stored == "bf16 throughout":
        x = x.bfloat16()
    else:
        compute_in_(model, torch.float32)
        assert isinstance(model[0], NarrowLinear)
    inject_(model, LoraConfig(r=2, init_lora_weights="lora_ga"))
    assert start_from_data_(model, [x, 2 * x], lambda x: model(x).float().square().mean()) == {"0": 2}
    update = model[0].update("default")
    assert update.lora_A.dtype == torch.float32
    length = update.lora_A[0].square().sum().item()
    torch.testing.assert_close(update.lora_A @ update.lora_A.T, torch.eye(2) * length)


def test_a_start_from_data_takes_inputs_by_name_and_single_vectors():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(input=x)

    model = Named()
    inject_(model, LoraConfig(r=2, init_lora_weights="eva"))
    model.linear.update("default").lora_A.requires_grad_(False)
    assert start_from_data_(model, [torch.randn(4), torch.randn(4)], lambda x: model(x).sum()) == {"linear": 2}
    # What was frozen before stays so, and the rest trains.
    assert trainable_parameters(model) == [model.linear.update("default").lora_B]


def test_vmap_over_adapters_works_without_gradients():
    models = [nn.Sequential(nn.Linear(4, 3)) for _ in range(3)]
    for seed, model in enumerate(models):
        inject_(model, LoraConfig(r=2))
        randomise_adapter(model, seed=seed)
    x = torch.randn(5, 4)
    parameters, buffers = stack_module_state(models)
    with torch.no_grad():
        together = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
        alone = torch.stack([model(x) for model in models])
    torch.testing.assert_close(together, alone)


def test_nested_tensors_train():
    model = nn.Sequential(nn.Linear(4, 3)).double()
    inject_(model, LoraConfig(r=2))
    randomise_adapter(model)
    rows = [torch.randn(length, 4, dtype=torch.float64) for length in (2, 5)]
    output = model(torch.nested.nested_tensor(rows, layout=torch.jagged))
    sum(row.square().sum() for row in output.unbind()).backward()
    found = [parameter.grad.clone() for parameter in trainable_parameters(model)]
    model.zero_grad()
    sum(model(row).square().sum() for row in rows).backward()
    for one, other in zip(found, trainable_parameters(model), strict=True):
        near(one, other.grad)


def test_all_linear_leaves_out_layers_that_take_something_else_than_one_vector():
    class Two(nn.Linear):
        def forward(self, x, y):
            return super().forward(x) + y

    class Wide(nn.Linear):
        def forward(self, x):
            return super().forward(x.view(-1, 3, self.in_features))

    report = inject_(nn.ModuleDict({"two": Two(4, 4), "wide": Wide(4, 4), "plain": nn.Linear(4, 4)}), LoraConfig(r=2))
    assert [matrix.name for matrix in report.matrices] == ["plain"]


def test_a_reset_over_weights_that_are_not_finite_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    inject_(model, LoraConfig(r=2, init_lora_weights="pissa"))
    randomise_adapter(model)
    with torch.no_grad():
        model[1].base.weight[0, 0] = torch.nan
    before = [parameter.detach().clone() for parameter in trainable_parameters(model)]
    with pytest.raises(ConfigError, match=r"not finite(.|\n)*\b1\b"):
        reset_adapter_(model)
    assert all(torch.equal(old, new) for old, new in zip(before, trainable_parameters(model), strict=True))


@pytest.mark.parametrize("wrong", [{"r": 2.5}, {"r": "4"}, {"density": None}], ids=str)
def test_settings_of_a_combination_that_are_no_numbers_are_told(wrong):
    model = nn.Sequential(nn.Linear(8, 8))
    inject_(model, LoraConfig(r=2), adapter="one")
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must"):
        combine_adapters_(model, {"one": 1.0}, "new", **{"r": 2, **wrong})


def test_adapters_that_are_not_finite_do_not_combine():
    model = nn.Sequential(nn.Linear(8, 8))
    inject_(model, LoraConfig(r=2), adapter="one")
    model[0].update("one").lora_B.data[0, 0] = torch.nan
    with pytest.raises(ConfigError, match="0: there are values that are not finite"):
        combine_adapters_(model, {"one": 1.0}, "new", r=1)


def test_a_copy_made_in_a_block_computes_as_the_base_and_can_be_changed():
    model = nn.Sequential(nn.Linear(4, 4)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    base = model(x)
    inject_(model, LoraConfig(r=2))
    randomise_adapter(model)
    output = model(x)
    with adapters_off(model):
        reference = deepcopy(model)
    near(reference(x), base)
    activate_(reference, "default")
    near(reference(x), output)
    near(eject_(reference)(x), base)


def test_a_merged_model_may_change_its_type_in_a_block_without_adapters():
    model = nn.Sequential(nn.Linear(4, 4))
    inject_(model, LoraConfig(r=2))
    randomise_adapter(model)
    merge_(model)
    with adapters_off(model):
        model.double()
    assert model(torch.randn(3, 4, dtype=torch.float64)).dtype == torch.float64
    unmerge_(model)
    assert model[0].base.weight.dtype == torch.float64


def test_dora_leaves_a_row_of_zeros_zero_when_merged():
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).double()
    with torch.no_grad():
        model[0].weight[1] = 0
    inject_(model, LoraConfig(r=2, use_dora=True))
    x = torch.randn(3, 4, dtype=torch.float64)
    output = model(x)
    merge_(model)
    near(model(x), output)
    assert not model[0].base.weight[1].any()


def test_an_adapter_woken_by_row_rests_again_when_another_is_activated():
    model = nn.Sequential(nn.Linear(4, 4))
    for name in ("one", "two"):
        inject_(model, LoraConfig(r=2), adapter=name)
    with adapters_by_row(model, ["one", "two"]):
        model(torch.randn(2, 4)).sum().backward()
    assert model[0].update("one").lora_A.requires_grad
    activate_(model, "two")
    assert not model[0].update("one").lora_A.requires_grad
    activate_(model, "one")
    assert model[0].update("one").lora_A.requires_grad


def test_layers_that_are_offloaded_to_the_disk_take_an_adapter_and_refuse_a_merge(tmp_path):
    plain = tiny("llama", torch.float32)
    plain.save_pretrained(tmp_path / "base")
    places = {"model.layers.1": "disk"}
    for name in ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"):
        places[name] = "cpu"

    def offloaded():
        return LlamaForCausalLM.from_pretrained(
            tmp_path / "base", device_map=places, offload_folder=tmp_path / "offloaded"
        ).eval()

    config = LoraConfig(r=2, target_modules=["q_proj"])
    for model in (plain, partly := offloaded()):
        inject_(model, config, torch.Generator().manual_seed(0))
        randomise_adapter(model)
    assert partly.model.layers[1].self_attn.q_proj.base.weight.is_meta
    with torch.no_grad():
        expected = plain(IDS).logits
        torch.testing.assert_close(partly(IDS).logits, expected)
    with pytest.raises(MergeError, match="offloaded"):
        merge_(partly)
    save_adapter(plain, tmp_path / "adapter")
    loaded = offloaded()
    load_adapter_(loaded, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, expected)


def test_data_parallel_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4))
    inject_(model, LoraConfig(r=2))
    with pytest.raises(ConfigError, match="DistributedDataParallel"):
        model[0]._replicate_for_data_parallel()


def test_a_model_without_an_input_embedding_and_a_quantised_head_are_told():
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    audio = Wav2Vec2Model(Wav2Vec2Config(**size, conv_dim=[8], conv_stride=[5], conv_kernel=[10]))
    with pytest.raises(TargetError, match="names no input embedding"):
        inject_(audio, LoraConfig(trainable_token_indices=[1]))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match="1 holds numbers that cannot train"):
        inject_(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))


@pytest.mark.parametrize(
    "wrong",
    [{"use_rslora": "false"}, {"use_dora": 1}, {"alpha_pattern": {"0": float("inf")}}, {"rank_pattern": {3: 2}}],
)
def test_settings_of_a_wrong_type_are_told(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LoraConfig(**wrong)
