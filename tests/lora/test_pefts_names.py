"""What PEFT's settings mean by a name: heads, attention's projections, bare parameters, blocks; there and back."""

import json
from collections import OrderedDict
from copy import deepcopy
from functools import partial

import peft
import pytest
import torch
from conftest import randomise_adapter, tiny
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    XLNetConfig,
    XLNetModel,
)

from rankwise import (
    LoraConfig,
    adapters_by_row,
    inject_,
    load_adapter_,
    merge_,
    read_adapter,
    save_adapter,
    swap_adapter_,
    unmerge_,
)
from rankwise.errors import CheckpointError, ConfigError, TargetError

IDS = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])


def distilbert():
    torch.manual_seed(0)
    size = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "vocab_size": 20}
    return DistilBertForSequenceClassification(DistilBertConfig(**size)).double().eval()


def mixtral():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 20}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    config = MixtralConfig(**size, **heads, experts_implementation="eager")  # The other one takes no fp64.
    return MixtralForCausalLM(config).double().eval()


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.att = nn.MultiheadAttention(8, 2, batch_first=True)
        self.double().eval()

    def forward(self, x):
        return self.att(x, x, x)[0]


def output(model, inputs):
    result = model(inputs)
    return getattr(result, "logits", result)


def there_and_back(build, inputs, tmp_path, exact=True, **settings):
    """PEFT's adapter loaded here, ours saved again and loaded in PEFT: the same outputs, and the same tensors."""
    theirs = peft.get_peft_model(build(), peft.LoraConfig(r=2, init_lora_weights=False, **settings))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) / 10)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = build()
    load_adapter_(ours, tmp_path / "theirs")
    if exact:
        torch.testing.assert_close(output(ours, inputs), output(theirs, inputs), rtol=1e-10, atol=1e-10)
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    torch.testing.assert_close(output(again, inputs), output(theirs, inputs), rtol=1e-10, atol=1e-10)
    own, other = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert own.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in own.items())
    return ours


def test_distilberts_two_heads_train_as_in_peft(tmp_path):
    there_and_back(distilbert, IDS, tmp_path, task_type="SEQ_CLS", target_modules=["q_lin"])
    ours = distilbert()
    inject_(ours, LoraConfig(r=2, task_type="SEQ_CLS"))  # All linear layers, which PEFT cannot adapt here.
    randomise_adapter(ours)
    save_adapter(ours, tmp_path / "all")
    theirs = peft.PeftModel.from_pretrained(distilbert(), tmp_path / "all").eval()
    torch.testing.assert_close(output(theirs, IDS), output(ours, IDS), rtol=1e-10, atol=1e-10)


def test_an_entry_of_modules_to_save_needs_no_dot_before_it(tmp_path):
    build = partial(tiny, "llama", torch.float64)
    ours = there_and_back(build, IDS, tmp_path, target_modules=["q_proj"], modules_to_save=["norm"])
    assert ours.model.layers[0].input_layernorm.adapters() == {"default"}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]},
    ],
)
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
def test_a_bare_parameter_may_be_named_by_one_word(settings, tmp_path):
    there_and_back(mixtral, IDS, tmp_path, **settings)


@pytest.mark.parametrize("pattern", [{"alpha_pattern": {"att": 32}}, {"rank_pattern": {"att": 3}}])
def test_an_attentions_output_projection_has_the_attentions_rank_and_scale(pattern, tmp_path):
    theirs = peft.get_peft_model(
        Attending(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["att"], init_lora_weights=False, **pattern)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Attending()
    load_adapter_(ours, tmp_path / "theirs")
    wrapped = theirs.base_model.model.att
    for layer, own in ((wrapped, ours.att), (wrapped.base_layer.out_proj, ours.att.base.out_proj)):
        update = own.update("default")
        assert (update.r, update.scale) == (layer.r["default"], layer.scaling["default"])
        assert torch.equal(update.lora_A, layer.lora_A["default"].weight)
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Attending(), tmp_path / "ours").base_model.model.att
    assert again.base_layer.out_proj.scaling == wrapped.base_layer.out_proj.scaling


def test_a_pattern_that_means_the_output_projection_alone_matches_nothing():
    with pytest.raises(ConfigError, match="rank_pattern key 'out_proj' matches no adapted module"):
        inject_(Attending(), LoraConfig(r=2, target_modules=["att"], rank_pattern={"out_proj": 3}))


def test_ranks_above_a_matrixs_own_come_from_files(tmp_path):
    build = partial(tiny, "llama", torch.float64)
    theirs = peft.get_peft_model(build(), peft.LoraConfig(r=64, target_modules=["q_proj"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = build()
    load_adapter_(ours, tmp_path / "theirs")
    torch.testing.assert_close(output(ours, IDS), output(theirs, IDS), rtol=1e-10, atol=1e-10)
    started = build()
    inject_(started, LoraConfig(r=20, target_modules=["q_proj"], init_lora_weights="pissa"))
    save_adapter(started, tmp_path / "started")
    again = build()
    load_adapter_(again, tmp_path / "started")
    torch.testing.assert_close(output(again, IDS), output(started, IDS), rtol=1e-10, atol=1e-10)


def test_a_rank_that_the_file_does_not_hold_takes_no_memory(tmp_path):
    model = tiny("llama")
    inject_(model, LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(model, tmp_path)
    settings = tmp_path / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"r": 10**12}))
    with pytest.raises(CheckpointError, match="r = 1000000000000 is larger"):
        load_adapter_(tiny("llama"), tmp_path)


@pytest.mark.parametrize("kind", [nn.Conv1d(64, 64, 4, groups=64), nn.Conv1d(64, 64, 1, groups=16)])
def test_a_convolution_with_groups_may_have_the_rank_of_all_groups(kind):
    model = nn.Sequential(kind)
    inject_(model, LoraConfig(r=64, target_modules=["0"]))
    randomise_adapter(model)
    x = torch.randn(2, 64, 9)
    expected = model(x)
    merge_(model)
    torch.testing.assert_close(model(x), expected)
    unmerge_(model)
    with pytest.raises(ConfigError, match="r = 128 is larger"):
        inject_(model, LoraConfig(r=128, target_modules=["0"]), adapter="b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_base_tables_that_peft_stores_are_this_models_in_any_type(dtype, tmp_path):
    theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed_tokens" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    load_adapter_(tiny("llama", dtype), tmp_path)
    other = tiny("llama", dtype)
    with torch.no_grad():
        other.model.embed_tokens.weight[3] += 1
    with pytest.raises(CheckpointError, match="the model has no place for it"):
        load_adapter_(other, tmp_path)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys", "ignore:You have passed exclude_modules")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "query"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["query"]},
        {"target_modules": ["q_proj"], "rank_pattern": {"query": 4}, "alpha_pattern": {"key": 8}},
        {"target_modules": ["q_proj"], "modules_to_save": ["classifier", "norm"]},
    ],
)
def test_names_that_nothing_has_are_no_fault_of_a_file(settings, tmp_path):
    there_and_back(partial(tiny, "llama", torch.float64), IDS, tmp_path, **settings)
    with pytest.raises((TargetError, ConfigError), match="match"):
        inject_(tiny("llama"), LoraConfig(r=2, **settings))


def test_a_file_for_another_model_is_told(tmp_path):
    model = tiny("llama")
    inject_(model, LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(model, tmp_path)
    with pytest.raises(CheckpointError, match="'q_proj' matches no module"):
        load_adapter_(tiny("gpt2"), tmp_path)


def test_no_blocks_named_means_all_blocks(tmp_path):
    build = partial(tiny, "llama", torch.float64)
    there_and_back(build, IDS, tmp_path, target_modules=["q_proj"], layers_to_transform=[])
    assert len(inject_(build(), LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[])).matrices) == 2


def test_an_adapter_in_fp8_loads(tmp_path):
    model = tiny("llama")
    inject_(model, LoraConfig(r=2, target_modules=["q_proj"]))
    randomise_adapter(model)
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}
    save_file(small, file)
    again = tiny("llama")
    load_adapter_(again, tmp_path)
    A = small["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].float()
    assert torch.equal(again.model.layers[0].self_attn.q_proj.update("default").lora_A, A)


def test_a_head_on_the_table_whose_rows_train_cannot_be_adapted_too():
    rows = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 9])
    for more in ({"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}):
        model = tiny("llama-tied")
        before = dict(model.named_modules())
        with pytest.raises(ConfigError, match=r"lm_head uses the table of model\.embed_tokens, of which rows train"):
            inject_(model, LoraConfig(**{**vars(rows), **more}))
        assert dict(model.named_modules()) == before
    model = tiny("llama-tied")
    inject_(model, LoraConfig(r=2, target_modules=["lm_head"]), adapter="a")
    before = output(model, IDS)
    with pytest.raises(ConfigError, match="of which rows train"):
        inject_(model, rows, adapter="b")
    assert torch.equal(output(model, IDS), before)


def test_a_token_that_is_named_twice_has_one_row_in_the_file(tmp_path):
    for tokens in ([5, 5, 7], {"embed_tokens": [5, 5, 7]}):
        ours = tiny("llama")
        inject_(ours, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens))
        randomise_adapter(ours)
        save_adapter(ours, tmp_path)
        theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
        torch.testing.assert_close(output(theirs, IDS), output(ours, IDS))


def test_an_adapter_goes_in_where_the_others_did():
    model = tiny("llama")
    inject_(model.model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(
        ConfigError, match=r"an adapter was put into model, a part of this model.*eject_\(model\.model\)"
    ):
        inject_(model, LoraConfig(r=2, target_modules=["q_proj"]))


def test_adapters_by_row_need_the_rows_first():
    size = {"vocab_size": 20, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}
    xlnet = XLNetModel(XLNetConfig(**size)).eval()
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    for model, target, first in ((xlnet, "layer_1", "XLNet"), (layer, "linear1", "self_attn")):
        inject_(model, LoraConfig(r=2, target_modules=[target]))
        with (
            pytest.raises(ConfigError, match=f"{first} puts time before the rows"),
            adapters_by_row(model, ["default"]),
        ):
            pass
    bert = BertModel(BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2))
    inject_(bert, LoraConfig(r=2, target_modules=["query"]))
    with adapters_by_row(bert, ["default", None]):
        bert(IDS)


def test_a_task_without_its_head_says_how_to_name_one():
    with pytest.raises(TargetError, match=r"modules_to_save names heads that are called otherwise"):
        inject_(tiny("llama"), LoraConfig(r=2, task_type="SEQ_CLS"))


class Experts(nn.Module):
    """A bare parameter, and a head below the module that holds it."""

    def __init__(self):
        super().__init__()
        self.w, self.sub = nn.Parameter(torch.randn(8, 8) / 4), nn.ModuleDict({"cls": nn.Linear(8, 8)})

    def forward(self, x):
        return self.sub["cls"](x @ self.w)


@pytest.mark.parametrize(
    ("head", "config"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), {"target_modules": ["body"], "modules_to_save": ["head"]}),
        (Experts(), {"target_modules": [], "target_parameters": ["w"], "modules_to_save": ["cls"]}),
    ],
    ids=["a head of several layers", "a head under a bare parameter"],
)
def test_biases_that_peft_writes_twice_are_taken_once(head, config, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(OrderedDict(body=nn.Linear(8, 8), head=head))
    fresh = deepcopy(base)
    theirs = peft.get_peft_model(deepcopy(base), peft.LoraConfig(r=2, bias="all", **config))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and "original_module" not in name:
                parameter += torch.randn_like(parameter) / 8
    theirs.save_pretrained(tmp_path)
    load_adapter_(base, tmp_path)
    x = torch.randn(3, 8)
    torch.testing.assert_close(base(x), peft.PeftModel.from_pretrained(fresh, tmp_path)(x))


def test_an_adapter_with_heads_of_the_user_and_the_task_is_saved_to_the_same_bytes_again(tmp_path):
    config = LoraConfig(r=2, task_type="SEQ_CLS", modules_to_save=["score", "norm"], target_modules=["up_proj"])
    first, second = (LlamaForSequenceClassification(tiny("llama").config) for _ in range(2))
    inject_(first, config)
    save_adapter(first, tmp_path / "first")
    load_adapter_(second, tmp_path / "first")
    save_adapter(second, tmp_path / "second")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_module_of_the_users_own_may_be_called_base_layer(tmp_path):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.att = nn.Linear(8, 8), Attending()

        def forward(self, x):
            return self.att(self.up(x))

    def build():
        torch.manual_seed(0)
        return nn.ModuleDict({"one": Inner(), "base_layer": Inner()}).double().eval()

    config = {
        "r": 4,
        "target_modules": ["up", "att.att"],
        "rank_pattern": {"base_layer.up": 2, "base_layer.att.att": 3},
    }
    theirs = peft.get_peft_model(build(), peft.LoraConfig(init_lora_weights=False, **config))
    for name, parameter in theirs.named_parameters():
        if "out_proj.lora_B" in name:  # PEFT adds this one's update twice.
            parameter.data.zero_()
    theirs.save_pretrained(tmp_path)
    low_rank = read_adapter(tmp_path).low_rank
    assert {name: update.rank for name, update in low_rank.items() if name.startswith("base_layer")} == {
        "base_layer.up": 2,
        "base_layer.att.att": 3,
        "base_layer.att.att.out_proj": 3,
    }
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    ours = build()
    load_adapter_(ours, tmp_path)
    swap_adapter_(ours, tmp_path)
    for name in ("one", "base_layer"):
        torch.testing.assert_close(ours[name](x), theirs.base_model.model[name](x), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Could not identify embedding layer")
@pytest.mark.parametrize("kind", ["attention", "embedding"])
def test_an_adapted_module_of_the_users_own_may_be_called_base_layer_itself(kind, tmp_path):
    def build():
        torch.manual_seed(0)
        layer = nn.MultiheadAttention(8, 2) if kind == "attention" else nn.Embedding(5, 8)
        return nn.ModuleDict({"block": nn.ModuleDict({"base_layer": layer})}).double()

    config = peft.LoraConfig(r=2, target_modules=r".*\.base_layer", init_lora_weights=False)
    theirs = peft.get_peft_model(build(), config)
    theirs.save_pretrained(tmp_path, save_embedding_layers=kind == "embedding")
    inside = ["block.base_layer", *(["block.base_layer.out_proj"] if kind == "attention" else [])]
    assert sorted(read_adapter(tmp_path).low_rank) == inside
    ours = build()
    load_adapter_(ours, tmp_path)
    save_adapter(ours, tmp_path / "again")
    swap_adapter_(ours, tmp_path / "again")
    written, again = load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "again" / "adapter_model.safetensors"
    assert all(torch.equal(written[name], tensor) for name, tensor in load_file(again).items())


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_tokens_that_were_added_load_beside_the_table_that_peft_writes(tied, tmp_path):
    def build(fill=0.0):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 20}
        config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied)
        model = LlamaForCausalLM(config).double().eval()
        size = model.config.vocab_size
        model.resize_token_embeddings(size + 2, mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[size:] = fill
        return model, size

    base, size = build()
    tokens = [size, size + 1]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens, init_lora_weights=False)
    theirs = peft.get_peft_model(base, config)
    for name, parameter in theirs.named_parameters():
        if "trainable_tokens" in name:
            parameter.data.normal_()
    # PEFT does so by itself where the folder that the base came from has fewer tokens.
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("token_adapter.base_layer.weight" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    ids = torch.tensor([[3, *tokens]])
    # The rows that train may stand in the table as anything.
    ours, _ = build(fill=1.0 if tied else 0.0)
    load_adapter_(ours, tmp_path)
    torch.testing.assert_close(output(ours, ids), output(theirs, ids), rtol=1e-10, atol=1e-10)
    other, _ = build()
    other.get_input_embeddings().weight.data[0, 0] += 1
    with pytest.raises(CheckpointError, match=r"embed_tokens.token_adapter.base_layer.weight"):
        load_adapter_(other, tmp_path)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_parts_that_are_compiled_keep_their_names_in_the_file(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))).double()

    model, x = build(), torch.randn(3, 4, dtype=torch.float64)
    for index in range(2):
        model[index] = torch.compile(model[index], backend="eager")
    report = inject_(model, LoraConfig(r=2))
    assert [matrix.name for matrix in report.matrices] == ["0.0", "1.0"]
    randomise_adapter(model)
    save_adapter(model, tmp_path)
    plain = build()
    load_adapter_(plain, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
        merge_(model)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
