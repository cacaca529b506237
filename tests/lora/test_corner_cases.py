"""Modules that stand twice, tables that several modules share, groups, experts, biases: each against its definition."""

import json
from copy import deepcopy
from dataclasses import replace

import peft
import pytest
import torch
from conftest import randomise_adapter, tiny
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from rankwise import (
    LoraConfig,
    activate_,
    adapters_by_row,
    combine_adapters_,
    delete_adapter_,
    eject_,
    inject_,
    load_adapter_,
    lora_optimizer,
    merge_,
    merge_and_remove_,
    reset_adapter_,
    save_adapter,
    swap_adapter_,
    trainable_parameters,
    unmerge_,
)
from rankwise.errors import CheckpointError, ConfigError, MergeError, TargetError
from rankwise.lora.inject import adapters_off

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def near(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.att = nn.MultiheadAttention(4, 2)
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.att(x, x, x)[0])


def test_a_module_in_two_places_is_adapted_once_in_both_and_comes_back():
    linear = nn.Linear(4, 4).double()
    model = nn.ModuleDict({"a": nn.Sequential(linear), "b": nn.Sequential(linear)})
    before = linear.weight.detach().clone()
    report = inject_(model, LoraConfig(r=2, target_modules=["0"]))
    randomise_adapter(model)
    assert [matrix.name for matrix in report.matrices] == ["a.0"]
    assert model["a"][0] is model["b"][0]
    expected = model["b"](X)
    merge_(model)
    near(model["b"](X), expected)
    near(model["a"](X), expected)
    unmerge_(model)
    eject_(model)
    assert model["a"][0] is linear
    assert model["b"][0] is linear
    assert torch.equal(linear.weight, before)


def test_the_keys_of_a_pattern_keep_their_order_in_the_file(tmp_path):
    model = tiny("llama")
    patterns = {"q_proj": 2, ".*_proj": 3}
    inject_(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern=patterns, alpha_pattern=patterns))
    randomise_adapter(model)
    save_adapter(model, tmp_path)
    assert list(json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]) == list(patterns)
    again = tiny("llama")
    load_adapter_(again, tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_trained_rows_work_in_every_module_that_shares_their_table(kind, tmp_path):
    torch.manual_seed(0)
    if kind == "t5":
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=40, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
        )
    else:
        layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "scale_embedding": True}
        model = BartForConditionalGeneration(BartConfig(vocab_size=40, d_model=16, **layers, **heads))
    model = model.double().eval()
    plain = deepcopy(model)
    tokens = {"input_ids": torch.tensor([[3, 4, 5]]), "decoder_input_ids": torch.tensor([[5, 3]])}
    inject_(
        model, LoraConfig(r=2, target_modules=["q_proj" if kind == "bart" else "q"], trainable_token_indices=[3, 5])
    )
    randomise_adapter(model)
    save_adapter(model, tmp_path)
    rows = load_file(tmp_path / "adapter_model.safetensors")
    [own] = [tensor for name, tensor in rows.items() if "trainable_tokens" in name]
    in_peft = peft.PeftModel.from_pretrained(deepcopy(plain), tmp_path).eval()
    near(model(**tokens).logits, in_peft(**tokens).logits)
    without = {name: tensor for name, tensor in rows.items() if "lora" in name}
    assert len(without) + 1 == len(rows)
    with torch.no_grad():
        plain.get_input_embeddings().weight[[3, 5]] = own.double()
    inject_(plain, LoraConfig(r=2, target_modules=["q_proj" if kind == "bart" else "q"]))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora" in name:
                parameter.copy_(dict(model.named_parameters())[name])
    near(model(**tokens).logits, plain(**tokens).logits)


@pytest.mark.parametrize("indices", [{"embed_tokens": [3, 5], "lm_head": [5, 7, 1]}, {"lm_head": [2]}])
def test_rows_of_an_output_head_train_as_in_peft(indices, tmp_path):
    config = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": indices}
    ids = torch.tensor([[3, 4, 5, 7]])
    ours = tiny("llama", torch.float64)
    plain = ours(ids).logits
    report = inject_(ours, LoraConfig(**config))
    assert report.extra == {
        f"{'model.' if name == 'embed_tokens' else ''}{name}: {len(rows)} rows": len(rows) * 32
        for name, rows in indices.items()
    }
    near(ours(ids).logits, plain)
    randomise_adapter(ours)
    save_adapter(ours, tmp_path / "ours")
    in_peft = peft.PeftModel.from_pretrained(tiny("llama", torch.float64), tmp_path / "ours").eval()
    near(in_peft(ids).logits, ours(ids).logits)
    in_peft.save_pretrained(tmp_path / "theirs")
    again = tiny("llama", torch.float64)
    load_adapter_(again, tmp_path / "theirs", trainable=True)
    near(again(ids).logits, ours(ids).logits)
    gradients = torch.autograd.grad(again(ids).logits.sum(), trainable_parameters(again))
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    merge_and_remove_(again)
    near(again(ids).logits, ours(ids).logits)
    eject_(ours)
    assert torch.equal(ours(ids).logits, plain)


def test_a_head_on_the_embeddings_table_trains_the_same_rows_or_is_told(tmp_path):
    both = {"embed_tokens": [3, 5], "lm_head": [3, 5]}
    tied = tiny("llama-tied")
    report = inject_(tied, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=both))
    assert report.extra == {"model.embed_tokens: 2 rows": 64}
    with pytest.raises(TargetError, match=r"lm_head: it shares its table with model\.embed_tokens; give both the same"):
        inject_(
            tiny("llama-tied"),
            LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=both | {"lm_head": [3]}),
        )


def test_a_file_of_experts_does_not_depend_on_the_other_adapters(tmp_path):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 4))
            self.down_proj = nn.Parameter(torch.randn(3, 4, 4))

        def forward(self, x):
            return torch.einsum("bk,edk->bd", x, self.gate_up_proj)[:, :4] @ self.down_proj[0]

    model = nn.ModuleDict({"experts": Experts()})
    inject_(model, LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"]), adapter="a")
    randomise_adapter(model)
    save_adapter(model, tmp_path / "alone", "a")
    down = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    with pytest.raises(ConfigError, match="lora_dropout"):
        inject_(model, replace(down, lora_dropout=0.1), adapter="b")
    inject_(model, down, adapter="b")
    save_adapter(model, tmp_path / "beside", "a")
    alone, beside = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "beside"))
    assert alone.keys() == beside.keys()
    again = nn.ModuleDict({"experts": Experts()})
    load_adapter_(again, tmp_path / "beside")


def test_a_rank_pattern_goes_with_bare_parameters(tmp_path):
    config = LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"], rank_pattern={"q_proj.weight": 2})
    ours = tiny("llama")
    inject_(ours, config)
    randomise_adapter(ours)
    save_adapter(ours, tmp_path)
    again = tiny("llama")
    assert {matrix.r for matrix in load_adapter_(again, tmp_path).matrices} == {2}
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(again(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("start", [True, "orthogonal", "pissa", "olora"])
def test_a_convolution_with_groups_goes_to_peft_and_back(start, tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(8, 12, 3, groups=2)).double()

    ours = model()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    plain = ours(x)
    inject_(ours, LoraConfig(r=4, target_modules=["0"], init_lora_weights=start))
    near(ours(x), plain)
    randomise_adapter(ours)
    save_adapter(ours, tmp_path)
    with pytest.warns(UserWarning, match="groups"):
        theirs = peft.PeftModel.from_pretrained(model(), tmp_path)
    near(theirs(x), ours(x))
    again = model()
    load_adapter_(again, tmp_path)
    near(again(x), ours(x))
    expected = again(x)
    merge_(again)
    near(again(x), expected)


@pytest.mark.parametrize(("padding_mode", "mode"), [("zeros", "constant"), ("circular", "circular")])
def test_a_convolution_of_peft_that_mixes_groups_works_and_trains_as_there(padding_mode, mode, tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, groups=2, padding_mode=padding_mode)).double()

    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    theirs = mixed_groups(model(), tmp_path / "theirs")
    ours = model()
    load_adapter_(ours, tmp_path / "theirs", trainable=True)
    conv, lora = theirs.base_model.model[0].base_layer, theirs.base_model.model[0]
    A, B = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    wide = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    expected = conv(x) + lora.scaling["default"] * F.conv2d(F.conv2d(wide, A), B, groups=2)
    near(ours(x), expected)
    if padding_mode == "zeros":  # PEFT pads with zeros whatever the base does.
        near(ours(x), theirs(x))
    ours(x).square().sum().backward()
    of_A, of_B = torch.autograd.grad(expected.square().sum(), (A, B))
    update = ours[0].update("default")
    near(update.lora_A.grad, of_A)
    near(update.lora_B.grad, of_B)
    save_adapter(ours, tmp_path / "ours")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    before = ours(x)
    with pytest.raises(MergeError, match="other groups"):
        merge_(ours)
    assert torch.equal(ours(x), before)


def test_a_convolution_of_peft_that_mixes_groups_cannot_have_dora(tmp_path):
    def model():
        return nn.Sequential(nn.Conv2d(8, 12, 3, groups=2))

    mixed_groups(model(), tmp_path)
    file, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = load_file(file) | {"base_model.model.0.lora_magnitude_vector": torch.ones(1, 12, 1, 1)}
    save_file(tensors, file)
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"use_dora": True}))
    base = model()
    before = dict(base.named_modules())
    with pytest.raises(CheckpointError, match=r"other groups.*DoRA"):
        load_adapter_(base, tmp_path)
    assert dict(base.named_modules()) == before


def mixed_groups(model, folder):
    """PEFT's adapter on a convolution with groups, saved; its A reads all channels for each group."""
    with pytest.warns(UserWarning, match="groups"):
        theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_the_biases_of_an_attention_have_pefts_names(bias, tmp_path):
    theirs = peft.get_peft_model(Encoder(), peft.LoraConfig(r=2, target_modules=["att"], bias=bias))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Encoder()
    load_adapter_(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    ours_file, their_file = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours_file.keys() == their_file.keys()
    assert all(torch.equal(tensor, their_file[name]) for name, tensor in ours_file.items())


def test_names_that_end_alike_are_combined_each_by_itself():
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "block": nn.ModuleDict({"proj": nn.Linear(4, 4)})}).double()
    inject_(model, LoraConfig(r=2, target_modules="proj"), adapter="a")
    inject_(model, LoraConfig(r=3, target_modules="block.proj"), adapter="b")
    randomise_adapter(model)
    both = {"proj": model["proj"].delta("a", torch.float64), "block": model["block"]["proj"].delta("b", torch.float64)}
    report = combine_adapters_(model, {"a": 1.0, "b": 1.0}, "mix")
    assert report.ranks == {"proj": 2, "block.proj": 3}
    near(model["proj"].delta("mix", torch.float64), both["proj"])
    near(model["block"]["proj"].delta("mix", torch.float64), both["block"])


def test_a_sum_of_more_ranks_than_a_matrix_has_is_exact_and_attention_is_combined():
    model = Encoder().double()
    for name in ("a", "b"):
        inject_(model, LoraConfig(r=3, target_modules=["att", "out"]), adapter=name)
    randomise_adapter(model)
    expected = sum(model.out.delta(name, torch.float64) for name in ("a", "b"))
    report = combine_adapters_(model, {"a": 1.0, "b": 1.0}, "mix")
    assert report.ranks["out"] == 4
    assert report.most_lost < 1e-12
    near(model.out.delta("mix", torch.float64), expected)
    with pytest.raises(ConfigError, match="name at least one"):
        combine_adapters_(model, {}, "none")


def test_rows_that_are_not_those_named_are_told():
    model = tiny("llama")
    inject_(model, LoraConfig(r=2))
    for rows in (torch.arange(9).view(3, 3), torch.arange(8).view(4, 2)):  # The second may have time first.
        with adapters_by_row(model, ["default", None]), pytest.raises(ConfigError, match="2 rows"):
            model(rows)
    model = nn.Sequential(nn.Linear(4, 4))
    inject_(model, LoraConfig(r=2, target_modules=["0"]))
    with adapters_by_row(model, ["default", None]), pytest.raises(ConfigError, match="2 rows"):
        model(torch.randn(6, 4))


def test_the_beams_of_an_encoder_decoder_use_the_adapters_of_their_rows():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).double().eval()
    for name in ("one", "two"):
        inject_(model, LoraConfig(r=2, lora_alpha=400, target_modules=["q", "v", "wi"]), adapter=name)
        randomise_adapter(model, seed=ord(name[0]))
    ids = torch.tensor([[3, 4, 5], [3, 4, 5]])
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "output_scores": True}
    options |= {"return_dict_in_generate": True, "eos_token_id": None}
    with adapters_by_row(model, ["one", "two"]):
        both = model.generate(ids, **options)
    assert not torch.equal(both.sequences[0], both.sequences[1])
    for row, name in enumerate(("one", "two")):
        activate_(model, name)
        alone = model.generate(ids[:1], **options)
        assert torch.equal(both.sequences[row], alone.sequences[0])
        near(both.sequences_scores[row], alone.sequences_scores[0])


@pytest.mark.parametrize(
    "more", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 4]}]
)
def test_a_row_without_an_adapter_is_the_bases_whatever_is_at_work(more):
    model = tiny("qwen2", torch.float64)
    ids = torch.tensor([[3, 4, 5], [3, 4, 5]])
    base = model(ids).logits
    inject_(model, LoraConfig(r=2), adapter="plain")
    inject_(model, LoraConfig(r=2, **more), adapter="more")
    randomise_adapter(model)
    with adapters_by_row(model, ["plain", None]):
        both = model(ids).logits
    near(both[1], base[1])
    activate_(model, "plain")
    near(both[0], model(ids).logits[0])


def test_a_deleted_adapter_leaves_no_wrapper_behind():
    model = tiny("llama")
    inject_(model, LoraConfig(r=2, target_modules=["q_proj"]), adapter="a")
    names = set(model.state_dict())
    inject_(model, LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=[1]), adapter="b")
    delete_adapter_(model, "b")
    assert set(model.state_dict()) == names
    with adapters_by_row(model, ["a", None]):
        model(torch.tensor([[3, 4], [5, 6]]))


def test_biases_that_train_live_under_a_merge():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4)).double()

    ours = model()
    base = ours(X)
    inject_(ours, LoraConfig(r=2, target_modules=["0"], bias="lora_only", lora_bias=True))
    randomise_adapter(ours)
    expected = ours(X)
    merge_(ours)
    near(ours(X), expected)
    with adapters_off(ours):
        near(ours(X), base)
    near(ours(X), expected)
    unmerge_(ours)
    near(ours(X), expected)

    ours = model()
    inject_(ours, LoraConfig(r=2, target_modules=["0"], bias="lora_only"), adapter="bias")
    inject_(ours, LoraConfig(r=2, target_modules=["0"], lora_bias=True), adapter="a")
    activate_(ours, {"bias": 1.0, "a": 1.0})
    randomise_adapter(ours)
    merge_(ours, ["a"])
    with pytest.raises(MergeError, match="bias"):
        activate_(ours, "a")
    with pytest.raises(MergeError, match="bias"):
        delete_adapter_(ours, "bias")


def test_what_is_trained_in_full_is_not_weighted_and_stays_with_a_merge():
    model = tiny("llama", torch.float64)
    ids = torch.tensor([[3, 4, 5]])
    base = model(ids).logits
    inject_(model, LoraConfig(r=2, modules_to_save=["lm_head"]), adapter="a")
    inject_(model, LoraConfig(r=2), adapter="b")
    randomise_adapter(model)
    activate_(model, {"a": 0.0})
    near(model(ids).logits, base)
    with pytest.raises(ConfigError, match="can only have 1"):
        activate_(model, {"a": 0.5})
    activate_(model, {"a": 1.0, "b": 1.0})
    expected = model(ids).logits
    merge_(model, ["a"])
    activate_(model, "b")
    near(model(ids).logits, expected)


def test_two_adapters_cannot_train_one_row_or_work_inside_a_copy(tmp_path):
    model = tiny("llama")
    inject_(model, LoraConfig(r=2, trainable_token_indices=[3, 4]), adapter="a")
    inject_(model, LoraConfig(r=2, trainable_token_indices=[4]), adapter="b")
    with pytest.raises(ConfigError, match=r"rows \[4\]"):
        activate_(model, {"a": 1.0, "b": 1.0})

    model = tiny("llama")
    inject_(model, LoraConfig(r=2, target_modules=["up_proj"]), adapter="a")
    names = set(model.state_dict())
    with pytest.raises(ConfigError, match="another adapter adapts"):
        inject_(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"]), adapter="b")
    assert set(model.state_dict()) == names
    save_adapter(model, tmp_path)
    merge_(model)
    with pytest.raises(ConfigError, match="merged"):
        swap_adapter_(model, tmp_path, "a")


def test_a_bias_of_an_embedding_is_told_before_anything_is_changed():
    model = tiny("llama")
    with pytest.raises(ConfigError, match="lora_bias"):
        inject_(model, LoraConfig(r=2, target_modules=["embed_tokens"], lora_bias=True))
    assert not any("base" in name for name in model.state_dict())


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("sparse", [False, True])
def test_an_embedding_gives_its_adapter_the_kind_of_gradient_that_its_table_has(sparse, padding):
    model = nn.Sequential(nn.Embedding(10, 4, padding_idx=padding, sparse=sparse))
    inject_(model, LoraConfig(r=2, target_modules=["0"]))
    randomise_adapter(model)
    ids = torch.tensor([[1, 3, 3], [1, 7, 0]])
    model(ids).square().sum().backward()
    update = model[0].update("default")
    A, B = (factor.detach().clone().requires_grad_() for factor in (update.lora_A, update.lora_B))
    # A's own gradient is that of a table of r numbers a token.
    rows = F.embedding(ids, model[0].base.weight) + update.scale * F.embedding(ids, A.T, padding) @ B.T
    rows.square().sum().backward()
    assert update.lora_A.grad.is_sparse == sparse
    torch.testing.assert_close(update.lora_A.grad.to_dense(), A.grad)
    torch.testing.assert_close(update.lora_B.grad, B.grad)
    if padding is not None:
        assert not A.grad[:, padding].any()


def test_a_sparse_embedding_trains_only_the_tokens_that_it_sees():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True))
    inject_(model, LoraConfig(r=2, target_modules=["0"]))
    randomise_adapter(model)
    A = model[0].update("default").lora_A
    before, optimizer = A.detach().clone(), torch.optim.SparseAdam([A], lr=0.1)
    model(torch.tensor([1, 3, 3])).square().sum().backward()
    optimizer.step()
    assert torch.equal((before != A).all(0), torch.isin(torch.arange(10), torch.tensor([1, 3])))


@pytest.mark.parametrize(
    "config", [{"target_modules": ["0"]}, {"target_modules": (), "trainable_token_indices": {"0": [1, 4]}}]
)
def test_a_table_that_scales_gradients_by_frequency_does_so_for_what_trains_beside_it(config):
    plain = nn.Sequential(nn.Embedding(6, 4, scale_grad_by_freq=True))
    ids = torch.tensor([1, 1, 1, 2, 0, 0])
    gradients = []
    for scales in (True, False):
        model = deepcopy(plain)
        model[0].scale_grad_by_freq = scales
        inject_(model, LoraConfig(r=2, **config))
        torch.manual_seed(0)
        randomise_adapter(model)
        model(ids).square().sum().backward()
        first = next(p for p in model.parameters() if p.requires_grad)
        gradients.append(first.grad.T if config["target_modules"] else first.grad)
    by_frequency, whole = gradients
    rows = {1: 3, 2: 1, 0: 2} if config["target_modules"] else {0: 3}
    assert whole.any()
    for row, count in rows.items():
        torch.testing.assert_close(by_frequency[row] * count, whole[row])


def test_a_start_on_a_sparse_table_has_a_dense_gradient_which_the_optimiser_takes():
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True))
    inject_(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))
    optimizer = lora_optimizer(model, lr=1e-3)
    before = model[0].update("default").lora_A.detach().clone()
    model(torch.tensor([1, 2])).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].update("default").lora_A, before)


@pytest.mark.parametrize("how", ["target_modules", "modules_to_save"])
def test_an_optimiser_that_takes_no_sparse_gradients_says_so(how):
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 4))
    inject_(model, LoraConfig(**{"r": 2, "target_modules": ["1"], how: ["0"]}))
    with pytest.raises(ConfigError, match=r"sparse=True give them: 0;.*SparseAdam"):
        lora_optimizer(model, lr=1e-3)
    eject_(model)
    inject_(model, LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [3]}))
    lora_optimizer(model, lr=1e-3)


def test_a_model_without_values_takes_no_file_and_a_reset_starts_anew(tmp_path):
    config = LoraConfig(r=2, modules_to_save=["lm_head"], trainable_token_indices=[3], bias="all")
    real = tiny("qwen2")
    inject_(real, config)
    save_adapter(real, tmp_path)
    with torch.device("meta"):
        model = tiny("qwen2")
    with pytest.raises(ConfigError, match="no values yet"):
        load_adapter_(model, tmp_path)
    inject_(model, config)
    model.to_empty(device="cpu")
    base = tiny("qwen2")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        plain = base.state_dict()
        for name, tensor in model.state_dict().items():
            if (own := name.replace(".base.", ".")) in plain:
                tensor.copy_(plain[own])
        for name, buffer in model.named_buffers():
            if (own := name.replace(".base.", ".")) in dict(base.named_buffers()):
                buffer.copy_(dict(base.named_buffers())[own])
    reset_adapter_(model, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(ids).logits, base(ids).logits)
    assert not any(parameter.is_meta for parameter in trainable_parameters(model))
    randomise_adapter(model)
    with adapters_off(model):
        assert torch.equal(model(ids).logits, base(ids).logits)


@pytest.mark.parametrize("name", ["training", "_modules", "keys"])
def test_a_name_that_a_module_needs_itself_is_told(name):
    with pytest.raises(ConfigError, match="cannot name"):
        inject_(tiny("llama"), LoraConfig(r=2), adapter=name)


def test_what_came_into_the_model_later_stays_when_adapters_go():
    model = nn.Sequential(nn.Linear(4, 4))
    inject_(model, LoraConfig(r=2, target_modules=["0"]))
    model.append(nn.Linear(4, 2))
    eject_(model)
    assert isinstance(model[0], nn.Linear)
    assert model[1].weight.requires_grad


def test_rows_of_a_table_that_is_rewritten_by_its_norm_are_refused():
    model = nn.Sequential(nn.Embedding(4, 3, max_norm=1.0))
    with pytest.raises(TargetError, match="max_norm rewrites its own weight"):
        inject_(model, LoraConfig(target_modules=(), trainable_token_indices={"0": [1]}))
    assert type(model[0]) is nn.Embedding


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("layer", "x", "config"),
    [
        (nn.Linear(4, 4), torch.randn(2, 4), {"target_modules": ["0"]}),
        (nn.Conv1d(4, 4, 1), torch.randn(2, 4, 3), {"target_modules": ["0"]}),
        (nn.Embedding(4, 4), torch.tensor([1, 2]), {"target_modules": ["0"]}),
        (nn.Embedding(4, 4), torch.tensor([1, 2]), {"target_modules": (), "trainable_token_indices": {"0": [1]}}),
    ],
    ids=["linear", "convolution", "embedding", "rows"],
)
def test_a_layer_that_is_called_by_keyword_has_its_adapter(layer, x, config, grad):
    model = nn.Sequential(deepcopy(layer))
    inject_(model, LoraConfig(r=2, **config))
    randomise_adapter(model)
    with torch.set_grad_enabled(grad):
        found = model[0](input=x)
        torch.testing.assert_close(found, model[0](x))
    assert not torch.equal(found, layer(x))
