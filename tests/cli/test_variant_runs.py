"""`rankwise train` with other starts, scales, layers and optimisers."""

import json
import shutil

import pytest
from conftest import ROOT
from transformers import AutoModelForCausalLM

from rankwise import load_adapter_, read_adapter
from rankwise.cli.main import main

ROWS = (ROOT / "examples/text_to_sql/train.jsonl").read_text().splitlines()[:16]
VARIANTS = {
    "pissa": ["--init-lora-weights", "pissa", "--use-rslora"],
    "eva": ["--init-lora-weights", "eva"],
    "lora_ga": ["--init-lora-weights", "lora_ga", "--use-dora"],
    "corda": ["--init-lora-weights", "corda", "--lora-plus-ratio", "4"],
    "preconditioned": ["--init-lora-weights", "orthogonal", "--preconditioned", "--weight-decay", "0.1"],
}


@pytest.fixture
def options(tiny_llama_folder, tmp_path):
    data = tmp_path / "sql.jsonl"
    data.write_text("\n".join(ROWS) + "\n")
    settings = ["--max-steps", "6", "--batch-size", "2", "--save-steps", "3", "--r", "2", "--eval-answers", "0"]
    return ["--data", str(data), "--model", str(tiny_llama_folder), *settings, "--lr", "0.01"]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_loads_and_resumes_to_the_same_bytes(name, options, tiny_llama_folder, tmp_path):
    run = tmp_path / "run"
    assert main(["train", *options, *VARIANTS[name], "--out", str(run)]) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["eval_loss_after"] < result["eval_loss_before"]
    assert result["base_sha256_before"] == result["base_sha256_after"]
    config = read_adapter(run / "adapter").config
    assert (config.use_rslora, config.use_dora) == ("--use-rslora" in VARIANTS[name], "--use-dora" in VARIANTS[name])
    load_adapter_(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), run / "adapter")

    # As a kill after the third step leaves it.
    adapter = (run / "adapter/adapter_model.safetensors").read_bytes()
    (run / "result.json").unlink()
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints/step-000006")
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == adapter
