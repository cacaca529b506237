"""`rankwise train` with each of the settings that trade memory, time and disk."""

import json

import pytest
import torch
from conftest import with_options
from safetensors.torch import load_file

from rankwise.cli.main import main
from rankwise.data.examples import TextExample
from rankwise.lora.config import LoraConfig
from rankwise.train import forecast as forecasting
from rankwise.train.batches import planned_steps
from rankwise.train.config import TrainConfig
from rankwise.train.forecast import forecast


@pytest.fixture
def train(tiny_llama_folder, tmp_path, monkeypatch, capsys):
    """Trains for two epochs; gives the adapter's tensors, result.json and what was printed."""
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"how many is {n} and {n}", "completion": f"it is {2 * n}"} for n in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name, *options):
        out = tmp_path / name
        flags = ["--model", tiny_llama_folder, "--data", data, "--out", out, "--batch-size", 4, "--epochs", 2]
        flags += ["--eval-fraction", 0.25, "--eval-answers", 2, "--lr", 0.01, "--explain-engine"]
        capsys.readouterr()
        assert main(["train", *with_options([*map(str, flags)], *map(str, options))]) == 0
        captured = capsys.readouterr()
        result = json.loads((out / "result.json").read_text())
        return load_file(out / "adapter/adapter_model.safetensors"), result, captured.out + captured.err

    return run


def test_recomputing_gives_the_same_adapter_bit_for_bit(train):
    plain, result, said = train("plain")
    assert result["recompute"] is False
    assert "activations computed again: no" in said
    again, result, said = train("again", "--recompute", "always")
    assert result["recompute"] is True
    assert "activations computed again: yes, of 1 of 2 blocks" in said
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_a_base_in_bf16_trains_an_fp32_adapter_that_evaluates_and_answers(train, tmp_path, capsys):
    adapter, result, said = train("narrow", "--base-dtype", "bf16")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert result["eval_loss_after"] < result["eval_loss_before"]
    assert "GB in bf16, computed with in fp32" in said
    capsys.readouterr()
    options = ["--adapter", str(tmp_path / "narrow"), "--base-dtype", "bf16"]
    assert main(["eval", *options, "--data", str(tmp_path / "data.jsonl"), "--eval-answers", "1"]) == 0
    assert main(["generate", *options, "--prompt", "how many is 1 and 1", "--max-new-tokens", "2"]) == 0


def test_upper_blocks_train_from_states_on_the_disk_with_the_same_bits_when_they_are_found_there(train, tmp_path):
    first, _, said = train("first", "--layers-to-transform", 1)
    assert all(".layers.1." in name for name in first)
    assert "computed once a row: yes, 1 blocks" in said
    assert list((tmp_path / "cache/states").iterdir())
    second, _, _ = train("second", "--layers-to-transform", 1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    without, _, said = train("without", "--layers-to-transform", 1, "--cache-gb", 0)
    assert "computed once a row: no, because --cache-gb is 0" in said
    assert all(torch.allclose(first[name], without[name], atol=1e-4) for name in first)


@pytest.mark.parametrize(("settings", "kept"), [((), False), (("--cache-gb", 1), True)])
def test_states_of_rows_that_run_once_are_kept_on_demand_only(settings, kept, train, tmp_path):
    train("run", "--layers-to-transform", 1, "--epochs", 1, *settings)
    assert (tmp_path / "cache/states").exists() == kept


@pytest.mark.parametrize(("free", "recompute"), [(-1e15, True), (1e15, False)])
def test_auto_recomputes_when_the_planned_memory_is_not_free(free, recompute, tiny_llama_folder, monkeypatch):
    monkeypatch.setattr(forecasting, "free_bytes", lambda: free)
    rows = [TextExample((5, 6, 7, 8), (False, False, True, True), "")] * 4
    settings = {"model": str(tiny_llama_folder), "data": ("d",), "out": "o", "batch_size": 2}
    configs = {way: TrainConfig(**settings, recompute=way) for way in ("auto", "always", "never")}
    planned = {
        way: forecast(planned_steps(rows, config), config, LoraConfig(r=8), 0, True) for way, config in configs.items()
    }
    assert planned["auto"] == planned["always" if recompute else "never"]
    assert planned["always"].predicted_peak_memory_bytes < planned["never"].predicted_peak_memory_bytes
