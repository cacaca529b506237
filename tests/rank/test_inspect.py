"""What inspect says of an adapter is what is in it."""

import json

import peft
import pytest
import torch
from conftest import randomise_adapter, tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rankwise import LoraConfig, inject_, load_adapter_, save_adapter
from rankwise.cli.main import main
from rankwise.errors import CheckpointError
from rankwise.lora.places import named_lora_layers
from rankwise.models.adapted import load_adapted
from rankwise.rank.inspect import beside_base, inspect_adapter, intruders

LLAMA_CPP = "llama.cpp (convert_lora_to_gguf.py)"


def saved(tmp_path, family="llama", std=0.05, **settings):
    model = tiny(family)
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "base_model_name_or_path": "here", **settings})
    inject_(model, config)
    randomise_adapter(model, std=std)
    return model, save_adapter(model, tmp_path / "adapter")


def test_sizes_scales_and_spectra_are_those_of_the_dense_updates(tmp_path):
    model, folder = saved(tmp_path, rank_pattern={"q_proj": 8}, alpha_pattern={"up_proj": 5})
    found = inspect_adapter(folder)
    layers = dict(named_lora_layers(model))
    assert {m.name for m in found.matrices} == layers.keys()
    for matrix in found.matrices:
        update = layers[matrix.name].update("default")
        delta = layers[matrix.name].delta("default", torch.float64)
        assert (matrix.d, matrix.k) == tuple(delta.shape)
        assert (matrix.rank, matrix.scale) == (update.r, update.scale)
        sigma = torch.linalg.svdvals(delta)[: matrix.rank]
        torch.testing.assert_close(torch.tensor(matrix.sigma, dtype=torch.float64), sigma, rtol=1e-10, atol=1e-12)
        assert matrix.stable_rank == pytest.approx((delta.norm() / sigma[0]).item() ** 2)
        assert 1 <= matrix.stable_rank <= matrix.effective_rank <= matrix.rank
    stored = load_file(folder / "adapter_model.safetensors")
    assert found.numbers == sum(tensor.numel() for tensor in stored.values())
    assert found.file_bytes == (folder / "adapter_model.safetensors").stat().st_size


def test_strength_and_intruders_are_those_of_the_dense_weights(tmp_path):
    model, folder = saved(tmp_path, std=0.3)
    layers = dict(named_lora_layers(model))
    for matrix in beside_base(inspect_adapter(folder), model, "default").matrices:
        weight = layers[matrix.name].base_matrix()
        delta = layers[matrix.name].delta("default", torch.float32)
        assert matrix.strength == pytest.approx((delta.norm() / weight.norm()).item(), rel=1e-4)
        before, after = torch.linalg.svd(weight).U, torch.linalg.svd(weight + delta).U
        count = sum(all(abs(after[:, j] @ before[:, i]) < 0.5 for i in range(min(weight.shape))) for j in range(10))
        assert matrix.intruders == count


def test_of_dora_it_is_said_which_figure_is_of_which_matrix(tmp_path):
    model, folder = saved(tmp_path, use_dora=True)
    found = beside_base(inspect_adapter(folder), model, "default")
    [note] = found.notes
    assert "singular values and both ranks are those of scale·B·A alone" in note
    assert note in str(found)
    layers, matrix = dict(named_lora_layers(model)), found.matrices[0]
    plain = layers[matrix.name].update("default").low_rank().delta()
    whole = layers[matrix.name].delta("default", torch.float32)
    assert matrix.sigma[0] == pytest.approx(torch.linalg.svdvals(plain)[0].item(), rel=1e-4)
    assert matrix.strength == pytest.approx((whole.norm() / layers[matrix.name].base_matrix().norm()).item(), rel=1e-4)
    assert inspect_adapter(saved(tmp_path / "plain")[1]).notes == ()


def test_a_new_strong_direction_is_an_intruder_and_a_weak_update_has_none():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 40, generator=draw)
    # A direction outside of what the weight can give, and far stronger.
    outside = torch.linalg.svd(weight, full_matrices=True).U[:, 50]
    delta = 100 * outside[:, None] * torch.randn(40, generator=draw)
    assert intruders(weight, delta) == 1
    assert intruders(weight, 1e-4 * delta) == 0


def test_a_plain_adapter_loads_everywhere(tmp_path):
    readers = inspect_adapter(saved(tmp_path)[1], "LlamaForCausalLM").readers
    assert all(verdict.loads and not verdict.notes for verdict in readers.values())


@pytest.mark.parametrize(
    ("architecture", "loads"),
    [
        ("Qwen3ForCausalLM", True),
        ("BertForSequenceClassification", False),
        ("BertModel", False),
        ("XLMRobertaForTokenClassification", False),
        ("GPT2LMHeadModel", False),
        ("T5ForConditionalGeneration", None),
        (None, None),
    ],
)
def test_vllm_loads_by_the_architecture_of_the_base(architecture, loads, tmp_path):
    verdict = inspect_adapter(saved(tmp_path)[1], architecture).readers["vLLM"]
    assert verdict.loads is loads
    assert loads or "LoRA for" in verdict.notes[0]


def test_trained_norms_pass_llama_cpps_converter_and_other_tensors_do_not(tmp_path):
    readers = inspect_adapter(saved(tmp_path, modules_to_save=["input_layernorm", "norm"])[1]).readers
    assert readers[LLAMA_CPP].loads
    assert readers["vLLM"].loads is False


def test_an_adapter_without_any_tensor_is_said_to_hold_nothing(tmp_path):
    _, folder = saved(tmp_path)
    save_file({}, folder / "adapter_model.safetensors")
    found = inspect_adapter(folder)
    assert "nothing is in it" in str(found)
    assert "loads it" not in str(found)


@pytest.mark.parametrize(
    ("settings", "vllm", "llama_cpp"),
    [
        ({"use_dora": True}, "DoRA is not supported", "no A or B"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set", "no A or B"),
        ({"bias": "lora_only", "family": "gpt2"}, "no A or B", "no A or B"),
        ({"lora_bias": True}, "no A or B", "no A or B"),
        ({"trainable_token_indices": [5]}, "no A or B", "no A or B"),
        ({"alpha_pattern": {"q_proj": 7}}, "wrong updates", "wrong updates"),
        ({"rank_pattern": {"q_proj": 2}}, "wrong updates", None),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}}, None, "wrong updates"),
        ({"use_rslora": True}, None, "rsLoRA"),
        ({"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 64}}, "below the rank", "wrong updates"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_a_reader_cannot_do_is_said(settings, vllm, llama_cpp, tmp_path):
    readers = inspect_adapter(saved(tmp_path, **settings)[1], "LlamaForCausalLM").readers
    assert readers["PEFT"].loads
    for reader, expected in (("vLLM", vllm), (LLAMA_CPP, llama_cpp)):
        verdict = readers[reader]
        assert verdict.loads == (expected is None)
        assert expected is None or any(expected in note for note in verdict.notes)


def test_a_rank_above_vllms_default_is_a_note_and_no_refusal(tmp_path):
    verdict = inspect_adapter(saved(tmp_path, r=20, target_modules=["up_proj"])[1], "LlamaForCausalLM").readers["vLLM"]
    assert verdict.loads
    assert "--max-lora-rank 32" in verdict.notes[0]


@pytest.mark.parametrize("reader", ["vllm", "llama.cpp"])
def test_an_adapter_shrunk_for_a_reader_loads_there(reader, tmp_path):
    from rankwise.rank.cut import set_updates_

    model, _ = saved(tmp_path)
    layers = dict(named_lora_layers(model))
    updates = {name: layer.update("default").low_rank() for name, layer in layers.items()}
    cut = {
        name: type(update)(update.A[: 1 + index % 3], update.B[:, : 1 + index % 3], update.scale)
        for index, (name, update) in enumerate(updates.items())
    }
    set_updates_(model, layers, cut, "default", reader)
    readers = inspect_adapter(save_adapter(model, tmp_path / "cut"), "LlamaForCausalLM").readers
    assert readers["vLLM"].loads == (reader == "vllm")
    assert readers[LLAMA_CPP].loads == (reader == "llama.cpp")


def test_the_command_prints_a_page_and_json(tiny_llama_folder, tmp_path, capsys):
    from rankwise.models.load import load_model

    model = load_model(str(tiny_llama_folder), "causal_lm")
    inject_(model, LoraConfig(task_type="CAUSAL_LM", r=4))
    randomise_adapter(model)
    folder = save_adapter(model, tmp_path / "adapter")
    assert main(["inspect", str(folder)]) == 0
    page = capsys.readouterr().out
    assert "decides nothing" in page
    assert "vLLM: it depends" in page
    assert "model.layers.1.mlp.down_proj" in page
    assert main(["inspect", str(folder), "--model", str(tiny_llama_folder), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["readers"]["vLLM"]["loads"]
    assert len(printed["matrices"]) == 14
    assert all(matrix["strength"] > 0 and matrix["intruders"] >= 0 for matrix in printed["matrices"])


def test_the_strength_of_a_huge_update_is_a_number_and_a_product_that_is_none_is_refused(tmp_path):
    model, folder = saved(tmp_path, std=1e12)
    for matrix in beside_base(inspect_adapter(folder), model, "default").matrices:
        assert matrix.strength is not None
        assert 1e20 < matrix.strength < 1e30
    _, folder = saved(tmp_path, std=1e30)
    with pytest.raises(CheckpointError, match="down_proj: A and B are so large that their product is not finite"):
        inspect_adapter(folder)


def test_wrong_inputs_of_the_command_are_named(tmp_path, capsys):
    _, folder = saved(tmp_path)
    (tmp_path / "empty").mkdir()
    for options, message in (
        ([str(tmp_path / "none")], "no adapter folder"),
        ([str(tmp_path / "empty")], "adapter_config.json is missing"),
        ([str(folder), "--model", "smollm2-135m"], "the model needs"),
    ):
        assert main(["inspect", *options]) == 2
        assert message in capsys.readouterr().err


def test_an_adapter_that_the_model_loads_is_inspected_alike(tmp_path):
    _, folder = saved(tmp_path)
    again = tiny("llama")
    load_adapter_(again, folder)
    assert beside_base(inspect_adapter(folder), again, "default").numbers == inspect_adapter(folder).numbers


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_started_from_its_base_is_inspected_and_used_beside_it(
    start, tiny_llama_folder, tmp_path, capsys
):
    config = peft.LoraConfig(r=4, target_modules=["up_proj"], task_type="CAUSAL_LM", init_lora_weights=start)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    base = ["--model", str(tiny_llama_folder)]
    assert main(["inspect", str(folder)]) == 2
    assert "give that with --model" in capsys.readouterr().err
    assert main(["inspect", str(folder), *base, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found["readers"][reader]["loads"] for reader in ("PEFT", "vLLM", LLAMA_CPP)] == [True, False, False]
    adapted = load_adapted(str(tiny_llama_folder), folder).model
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(adapted(tokens).logits, model(tokens).logits)
    layers = dict(named_lora_layers(adapted))
    for matrix in found["matrices"]:
        assert (matrix["rank"], matrix["numbers"]) == (4, 4 * (32 + 48))
        sigma = torch.linalg.svdvals(layers[matrix["name"]].delta("default", torch.float64))[:8]
        assert matrix["sigma"] == pytest.approx(sigma.tolist(), rel=1e-4)
