"""Models and data sets of the Hugging Face hub, read by its own client from a stand-in for the server."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from hub import serving

ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(40)]
NOT_READ = ["consolidated.safetensors", "onnx/model.safetensors", "pytorch_model.bin"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tiny_llama_folder):
    """run(*command): rankwise (or, with "-c", Python) in a process of its own that knows this hub and no other.

    Returns the finished process and the files that it downloaded.
    """
    root, home = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("home")
    model, data = root / "models/someone/a-llama", root / "datasets/someone/some-data"
    shutil.copytree(tiny_llama_folder, model)
    (model / "onnx").mkdir()
    for name in NOT_READ:
        (model / name).write_bytes(b"not to be read")
    for name, rows in (("train", ROWS[:30]), ("test", ROWS[30:])):
        (data / "data").mkdir(parents=True, exist_ok=True)
        (data / f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, file in (("an-adapter", "adapter_config.json"), ("a-gguf", "model.gguf"), ("a-pickle", "config.json")):
        (root / "models/someone" / name).mkdir()
        (root / "models/someone" / name / file).write_text("{}")

    with serving(root) as (address, downloaded):
        variables = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

        def run(*command: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
            downloaded.clear()
            program = [sys.executable] if command[0] == "-c" else [sys.executable, "-m", "rankwise"]
            done = subprocess.run([*program, *command], env=os.environ | variables, capture_output=True, text=True)
            return done, list(downloaded)

        yield run


def test_a_hub_model_and_data_set_train_and_only_what_is_needed_is_downloaded(hub, tmp_path):
    looked, of_look = hub("data", "someone/some-data", "--model", "someone/a-llama")
    assert looked.returncode == 0, looked.stderr
    assert "someone/some-data: prompt/completion, 30 rows" in looked.stdout
    assert "What is 0?" in looked.stdout
    assert "tokenizer.json" in of_look
    assert not any(name.endswith(".safetensors") for name in of_look)

    sources = ["--data", "someone/some-data", "--eval-data", "someone/some-data@test"]
    options = ["--model", "someone/a-llama", *sources, "--r", "2", "--max-steps", "2", "--out", str(tmp_path / "run")]
    trained, of_training = hub("train", *options)
    assert trained.returncode == 0, trained.stderr
    assert "on 10 rows" in trained.stdout
    assert of_training == ["model.safetensors"]
    settings = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "someone/a-llama"


def test_the_plan_of_a_hub_model_needs_its_settings_alone(hub):
    done, downloaded = hub("plan", "--model", "someone/a-llama", "--r", "4")
    assert done.returncode == 0, done.stderr
    assert "d·k →" in done.stdout
    assert set(downloaded) <= {"config.json"}


ASK = """
from rankwise.errors import ModelError
from rankwise.models import local_path
for name in ("nothing", "gated", "an-adapter", "a-gguf", "a-pickle"):
    try:
        print(name, local_path("someone/" + name))
    except ModelError as error:
        print(error)
"""


def test_what_is_no_base_model_on_the_hub_is_told(hub):
    done, _ = hub("-c", ASK)
    assert done.returncode == 0, done.stderr
    nothing, gated, adapter, gguf, pickle = done.stdout.splitlines()
    assert "someone/nothing is no folder here, and it could not be downloaded: the hub has no such model" in nothing
    assert "someone/gated is no folder here, and it could not be downloaded: its owner has to grant access" in gated
    assert "someone/an-adapter is not a base model: it holds no config.json" in adapter
    assert "someone/a-gguf is not a base model: it holds no config.json" in gguf
    assert "someone/a-pickle holds no *.safetensors file" in pickle


def test_a_hub_data_set_that_is_not_there_is_told(hub):
    done, _ = hub("data", "someone/nothing", "--model", "someone/a-llama")
    assert done.returncode == 2
    assert "as a data set of the Hugging Face hub it cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
    done, _ = hub("data", "someone/some-data@dev", "--model", "someone/a-llama")
    assert done.returncode == 2
    assert 'Unknown split "dev"' in done.stderr
