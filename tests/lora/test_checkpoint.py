"""Adapter folders, with real PEFT as the other side."""

import json
import pickle
from copy import deepcopy

import peft
import pytest
import torch
from conftest import ROOT, randomise_adapter, tiny
from safetensors.torch import load_file, save_file
from torch import nn

from rankwise import (
    LoraConfig,
    TrainConfig,
    eject_,
    inject_,
    load_adapter_,
    merge_,
    read_adapter,
    save_adapter,
    swap_adapter_,
)
from rankwise.errors import CheckpointError, ConfigError, StorageError
from rankwise.finetune import finetune
from rankwise.models.adapted import read_labels
from rankwise.models.load import load_model, load_tokenizer

IDS = torch.arange(3, 19).view(2, 8)
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
CASES = {
    "llama": {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    "llama-tied": {"target_modules": ["embed_tokens", "q_proj"], "task_type": "CAUSAL_LM"},
    "gpt2": {"target_modules": ["c_attn", "wte"], "task_type": "CAUSAL_LM"},
    "bloom": {"target_modules": ["query_key_value"], "task_type": "CAUSAL_LM"},
    "bert": {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
}


@pytest.fixture
def folder(tmp_path):
    """An adapter of the tiny Llama on disk."""
    model = tiny("llama")
    inject_(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    randomise_adapter(model)
    return save_adapter(model, tmp_path / "adapter")


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("family", CASES)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_written_here_computes_the_same_in_peft(family, tmp_path):
    model = tiny(family, torch.float64)
    inject_(model, LoraConfig(r=4, lora_alpha=10, **CASES[family]))
    randomise_adapter(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(family, torch.float64), tmp_path).eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", CASES)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_written_by_peft_computes_the_same_here(family, tmp_path):
    theirs = peft.get_peft_model(
        tiny(family, torch.float64), peft.LoraConfig(r=4, lora_alpha=10, **CASES[family])
    ).eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.05
    theirs.save_pretrained(tmp_path)
    model = tiny(family, torch.float64)
    load_adapter_(model, tmp_path)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-12, atol=1e-12)


def relative_error(logits, expected):
    """Relative to the largest entry."""
    return ((logits - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module", params=["smollm2", "minilm"])
def trained(request, tmp_path_factory):
    """A real model's name, its bare form, and an adapter that was trained on it for a few steps."""
    causal = request.param == "smollm2"
    name, task, data = ("smollm2-135m", "causal_lm", "text_to_sql") if causal else ("minilm-l6", "seq_cls", "intents")
    folder = tmp_path_factory.mktemp(request.param)
    finetune(
        TrainConfig(
            model=name,
            task=task,
            data=ROOT / "examples" / data / "train.jsonl",
            out=folder / "run",
            eval_fraction=0,
            max_steps=6 if causal else 60,
            batch_size=2 if causal else 32,
            lr=2e-3,
        )
    )

    def bare():
        torch.manual_seed(0)
        return load_model(name, task, read_labels(folder / "run/adapter")[0] if not causal else [])

    return bare, folder / "run" / "adapter"


@pytest.mark.filterwarnings("ignore")
def test_a_trained_adapter_of_a_real_model_computes_the_same_in_peft_merged_and_not(trained, tmp_path):
    bare, folder = trained
    model = bare()
    # Real text: random tokens blow rounding up through the layers as no use of the model does.
    causal = not hasattr(model, "classifier")
    tokenizer = load_tokenizer("smollm2-135m" if causal else "minilm-l6")
    ids = tokenizer(
        "Which player of the team from Toronto scored most in the season of 2003?", return_tensors="pt"
    ).input_ids
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        base = model(ids).logits
        load_adapter_(model, folder)
        ours = model(ids).logits
        assert relative_error(ours, base) > 0.05, "the adapter must have learnt something"
        theirs = peft.PeftModel.from_pretrained(bare(), folder).eval()
        assert relative_error(theirs(ids).logits, ours) < 1e-5
        merge_(model)
        assert relative_error(model(ids).logits, ours) < 1e-5
        eject_(model)
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        theirs.save_pretrained(tmp_path / "theirs")
        load_adapter_(model, tmp_path / "theirs")
        assert relative_error(model(ids).logits, theirs(ids).logits) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_a_rank_above_that_of_a_gate_loads_from_peft_though_it_cannot_be_asked_for(tmp_path):
    gate, x = nn.Sequential(nn.Linear(6, 1)).double(), torch.randn(3, 6).double()
    theirs = peft.get_peft_model(
        deepcopy(gate),
        peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False),
        autocast_adapter_dtype=False,
    )
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="r = 4 is larger"):
        inject_(gate, LoraConfig(r=4, target_modules=["0"]))
    load_adapter_(gate, tmp_path)
    assert relative_error(gate(x), theirs(x)) < 1e-12


def test_saving_the_same_adapter_twice_gives_the_same_bytes(tmp_path):
    model = tiny("llama")
    inject_(model, LoraConfig())
    first, second = save_adapter(model, tmp_path / "a"), save_adapter(model, tmp_path / "b")
    assert [(p.name, p.read_bytes()) for p in sorted(first.iterdir())] == [
        (p.name, p.read_bytes()) for p in sorted(second.iterdir())
    ]


def test_the_saved_target_modules_match_the_adapted_modules_alone(tmp_path):
    model = tiny("llama")
    inject_(model, LoraConfig(target_modules=r".*\.1\.self_attn\.q_proj|.*v_proj"))
    settings = json.loads((save_adapter(model, tmp_path) / SETTINGS).read_text())
    assert settings["target_modules"] == ["1.self_attn.q_proj", "v_proj"]


def test_an_adapter_is_read_without_a_model(folder):
    adapter = read_adapter(folder)
    update = adapter.low_rank["model.layers.1.self_attn.v_proj"]
    assert (update.rank, update.shape, update.scale) == (4, (16, 32), 8.0)
    torch.testing.assert_close(update.delta(), 8.0 * update.B @ update.A)


def test_all_that_is_wrong_with_the_tensors_is_one_message_and_the_model_stays_as_it_was(folder):
    def damage(tensors):
        prefix = "base_model.model.model.layers."
        del tensors[prefix + "0.self_attn.q_proj.lora_B.weight"]
        tensors[prefix + "0.self_attn.v_proj.lora_A.weight"] = torch.zeros(4, 31)
        tensors[prefix + "1.self_attn.q_proj.lora_A.weight"][0, 0] = float("nan")
        tensors[prefix + "1.self_attn.k_proj.lora_A.weight"] = torch.zeros(4, 32)
        tensors[prefix + "1.self_attn.k_proj.lora_B.weight"] = torch.zeros(16, 4)

    edit(folder, damage)
    model = tiny("llama")
    with pytest.raises(CheckpointError) as error:
        load_adapter_(model, folder)
    message = str(error.value)
    for part in (
        "layers.0.self_attn.q_proj.lora_B.weight: missing",
        "layers.0.self_attn.v_proj.lora_A.weight: the model needs [4, 32], the file holds [4, 31]",
        "layers.1.self_attn.q_proj.lora_A.weight: 1 of 128 values are not finite",
        "layers.1.self_attn.k_proj.lora_A.weight: the model has no place for it",
    ):
        assert part in message
    assert not any(hasattr(m, "lora_A") for m in model.modules())


def test_a_folder_made_for_another_model_says_so(folder):
    with pytest.raises(CheckpointError, match=r"made for another model[\s\S]*'q_proj' matches no module"):
        load_adapter_(tiny("gpt2"), folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_bdlora", True),
        ("alora_invocation_tokens", [5]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "corda"),
        ("layer_replication", [[0, 1]]),
        ("peft_type", "IA3"),
        ("a_field_of_the_future", {"on": 1}),
    ],
)
def test_a_setting_that_is_not_supported_is_named(folder, field, value):
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps({**settings, field: value}))
    with pytest.raises(CheckpointError, match=field):
        read_adapter(folder)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "LOHA"])
def test_of_a_folder_of_another_method_nothing_but_that_is_said(folder, kind):
    settings = {"peft_type": kind, "num_virtual_tokens": 8, "hada_rank": 4, "prompt_tuning_init": "RANDOM"}
    (folder / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(CheckpointError) as raised:
        read_adapter(folder)
    assert str(raised.value).count("  - ") == 1
    assert f'peft_type must be "LORA", found {kind!r}' in str(raised.value)


def test_damaged_and_missing_files_are_named(folder, tmp_path):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        load_adapter_(tiny("llama"), folder)
    (folder / WEIGHTS).unlink()
    (folder / SETTINGS).unlink()
    with pytest.raises(
        CheckpointError, match=r"adapter_config.json is missing[\s\S]*adapter_model.safetensors is miss"
    ):
        load_adapter_(tiny("llama"), folder)
    with pytest.raises(CheckpointError, match="no adapter folder"):
        load_adapter_(tiny("llama"), tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"rank_pattern": [["q_proj", 3]]}, "rank_pattern must map names to numbers"),
        ({"alpha_pattern": "q_proj"}, "alpha_pattern must map names to numbers"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_settings_of_another_form_are_an_error_of_the_checkpoint(folder, content, said):
    if isinstance(content, dict):
        content = json.dumps({**json.loads((folder / SETTINGS).read_text()), **content})
    (folder / SETTINGS).write_text(content)
    with pytest.raises(CheckpointError, match=said):
        read_adapter(folder)


def test_pickle_files_are_refused_unread(folder):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match="pickle"):
        load_adapter_(tiny("llama"), folder)


def test_an_embedding_of_another_base_is_refused(tmp_path):
    model = tiny("llama-tied")
    inject_(model, LoraConfig(target_modules=["embed_tokens"]))
    save_adapter(model, tmp_path)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    edit(tmp_path, lambda tensors: tensors.update({key: model.lm_head.weight.detach().clone()}))
    load_adapter_(tiny("llama-tied"), tmp_path)
    edit(tmp_path, lambda tensors: tensors[key].add_(1))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.base_layer\.weight"):
        load_adapter_(tiny("llama-tied"), tmp_path)


def test_a_place_that_lies_in_no_folder_is_told(tmp_path):
    model = tiny("llama")
    inject_(model, LoraConfig(r=2))
    (tmp_path / "file").touch()
    for place in ("file", "file/sub"):
        with pytest.raises(StorageError, match="choose a place that lies in a folder"):
            save_adapter(model, tmp_path / place)


def test_a_full_disk_leaves_the_adapter_that_was_there(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = tiny("llama")
    inject_(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    randomise_adapter(model, seed=9)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rankwise.lora.checkpoint.serialize_file", full)
    with pytest.raises(StorageError, match="No space left"):
        save_adapter(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@torch.no_grad()
@pytest.mark.parametrize("compiled_first", [True, False])
@pytest.mark.parametrize("part", ["layers.1", "layers.1.mlp.up_proj"])
def test_names_leave_out_that_a_part_of_the_model_is_compiled(part, compiled_first, tmp_path):
    ids = torch.tensor([[3, 4, 5]])

    def compile_part(model):
        parent, _, name = f"model.{part}".rpartition(".")
        setattr(model.get_submodule(parent), name, torch.compile(model.get_submodule(f"model.{part}"), backend="eager"))

    model, plain = tiny("llama"), tiny("llama")
    base, requires_grad = model(ids).logits, [p.requires_grad for p in model.parameters()]
    if compiled_first:
        compile_part(model)
    inject_(model, LoraConfig(r=2, bias="all", target_modules="all-linear"))
    if not compiled_first:
        compile_part(model)
    randomise_adapter(model)
    expected = model(ids).logits
    save_adapter(model, tmp_path)
    load_adapter_(plain, tmp_path)
    torch.testing.assert_close(plain(ids).logits, expected)
    merge_(model)
    torch.testing.assert_close(model(ids).logits, expected)
    eject_(model)
    assert torch.equal(model(ids).logits, base)
    assert [p.requires_grad for p in model.parameters()] == requires_grad
    assert "_orig_mod" in str([name for name, _ in model.named_parameters()])
    load_adapter_(model, tmp_path)
    swap_adapter_(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, expected)
