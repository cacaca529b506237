"""`rankwise train` that is interrupted, terminated, killed or out of room, and `rankwise train --resume`."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import yaml
from conftest import ROOT, with_options
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rankwise import load_adapter_
from rankwise.cli.main import main
from rankwise.train.progress import TrainingView

ROWS = (ROOT / "examples/text_to_sql/train.jsonl").read_text().splitlines()[:20]
STEPS = 24
SETTINGS = ["--max-steps", str(STEPS), "--batch-size", "2", "--save-steps", "3", "--r", "2", "--lora-dropout", "0.1"]


@pytest.fixture(scope="module")
def inputs(tiny_llama_folder, tmp_path_factory):
    """(data file, base model), which no test changes."""
    data = tmp_path_factory.mktemp("data") / "sql.jsonl"
    data.write_text("\n".join(ROWS) + "\n")
    return data, tiny_llama_folder


@pytest.fixture(scope="module")
def options(inputs):
    return ["--data", str(inputs[0]), "--model", str(inputs[1]), *SETTINGS, "--eval-answers", "0"]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """What the run gives that nothing interrupts."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", *options, "--out", str(run)]) == 0
    return outcome(run)


def outcome(run):
    """All that is not a time."""
    result = json.loads((run / "result.json").read_text())
    metrics = [{**json.loads(line), "seconds": 0} for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = {name: value for name, value in result.items() if "second" not in name and "memory" not in name}
    return (run / "adapter/adapter_model.safetensors").read_bytes(), metrics, kept


@contextmanager
def training_at(line_start, *options):
    """`rankwise train` in a process of its own, once it has printed a line that begins so."""
    command = [sys.executable, "-m", "rankwise", "train", *map(str, options)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        assert any(line.startswith(line_start) for line in process.stderr)
        yield process


@pytest.fixture(scope="module")
def terminated(options, tmp_path_factory):
    """A run that SIGTERM ended; (its folder, its exit code, what it still said). Copy the folder before changing it.

    It began in ROOT, with a relative path to its data.
    """
    run = tmp_path_factory.mktemp("terminated") / "run"
    data = os.path.relpath(options[1], ROOT)
    with training_at("step 4/", options[0], data, *options[2:], "--out", run) as process:
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    return run, process.returncode, rest


def test_sigterm_saves_a_checkpoint_and_the_adapter_and_exits_with_143(terminated, inputs):
    run, code, said = terminated
    assert code == 143
    assert "Traceback" not in said
    result = json.loads((run / "result.json").read_text())
    assert (result["interrupted"], result["signal"]) == (True, "SIGTERM")
    assert 4 <= result["steps"] < STEPS
    newest = max(path.name for path in (run / "checkpoints").iterdir())
    assert newest == f"step-{result['steps']:06}"
    for folder in (run / "adapter", run / "checkpoints" / newest):
        load_adapter_(AutoModelForCausalLM.from_pretrained(inputs[1]), folder)


def test_a_terminated_run_is_resumed_elsewhere_to_the_same_bytes_and_losses(
    terminated, whole, tmp_path, capsys, monkeypatch
):
    run = shutil.copytree(terminated[0], tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", "moved"]) == 0
    assert outcome(run) == whole
    assert "resuming after step" in capsys.readouterr().err
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(run)]) == 2
    assert "is complete; there is nothing to resume" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_other_settings_are_refused_and_all_named(terminated, tmp_path, capsys):
    run = shutil.copytree(terminated[0], tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(run), "--max-steps", "90", "--lr", "0.5", "--seed", "0"]) == 2
    error = capsys.readouterr().err
    assert "max_steps: the run began with 24, given 90" in error
    assert "lr: the run began with null, given 0.5" in error
    assert "To go on, leave out what is given beside --resume; or begin a new run" in error
    assert "seed" not in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_edited_run_yaml_is_refused_where_it_means_something_else(terminated, inputs, whole, tmp_path, capsys):
    run = shutil.copytree(terminated[0], tmp_path / "run")
    settings = yaml.safe_load((run / "run.yaml").read_text())
    changed = {"lr": 0.02, "max_steps": 30, "batch_size": 3, "lora_alpha": 8, "weight_decay": 0.1, "warmup": 0.5}
    (run / "run.yaml").write_text(yaml.safe_dump({**settings, **changed}))
    assert main(["train", "--resume", str(run), "--seed", "5"]) == 2
    error = capsys.readouterr().err
    assert error.count("the run began with") == len(changed) + 1
    assert "lr: the run began with null, run.yaml now says 0.02" in error
    assert "seed: the run began with 0, given 5" in error
    assert f"To go on, mend {run / 'run.yaml'} and leave out what is given beside --resume" in error
    # Other spellings of the same, a key that is missing where it has its default, and other places of the same data.
    del settings["seed"]
    moved = shutil.copy(inputs[0], tmp_path / "moved.jsonl")
    spelled = {"lora_dropout": "1e-1", "lora_alpha": 32, "data": [str(moved)]}
    (run / "run.yaml").write_text(yaml.safe_dump({**settings, **spelled}))
    assert main(["train", "--resume", str(run)]) == 0
    assert outcome(run) == whole


def test_changed_data_and_a_changed_base_are_refused(terminated, inputs, tmp_path, capsys):
    run = shutil.copytree(terminated[0], tmp_path / "run")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join([ROWS[0].replace('"completion": "', '"completion": "x'), *ROWS[1:]]) + "\n")
    base = shutil.copytree(inputs[1], tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    next(iter(weights.values()))[0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    settings = yaml.safe_load((run / "run.yaml").read_text())
    (run / "run.yaml").write_text(yaml.safe_dump({**settings, "data": str(data), "model": str(base)}))
    assert main(["train", "--resume", str(run)]) == 2
    error = capsys.readouterr().err
    assert "the data are not those that the run began with" in error
    assert "the base model's weights are not those that the run began with" in error


def test_a_folder_without_a_run_and_another_out_are_refused(terminated, tmp_path, capsys):
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "holds no run to resume: there is no run.yaml in it" in capsys.readouterr().err
    assert main(["train", "--resume", str(terminated[0]), "--out", str(tmp_path)]) == 2
    assert "leave --out out" in capsys.readouterr().err
    assert main(["train", "--resume"]) == 2
    assert "--resume needs the folder of a run" in capsys.readouterr().err
    assert main(["train", "--config", str(terminated[0] / "run.yaml")]) == 2
    assert "to go on with the run in it: rankwise train --resume" in capsys.readouterr().err


def test_a_run_that_is_killed_and_then_out_of_room_gives_the_same_bytes(options, whole, tmp_path, inputs):
    run = tmp_path / "run"
    with training_at("step 8/", *options, "--out", run) as process:
        time.sleep(random.Random(0).random() / 50)  # A step takes about as long.
        process.kill()
    # A kill between writing the newest and removing the oldest leaves three, whole.
    for checkpoint in (path for path in (run / "checkpoints").iterdir() if not path.name.startswith(".")):
        load_adapter_(AutoModelForCausalLM.from_pretrained(inputs[1]), checkpoint)
    with training_at("step ", "--resume", run) as process:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
        rest = process.stderr.read()
    assert process.returncode == 2
    assert "File too large; raise the limit on a file's size" in rest
    assert f"and try again: rankwise train --resume {run}" in rest
    assert "Traceback" not in rest
    assert main(["train", "--resume", str(run)]) == 0
    assert outcome(run) == whole


@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_leaves_a_usable_adapter(inputs, options, whole, tmp_path, signals):
    run = tmp_path / "run"
    with training_at("step 4/", *options, "--out", run) as process:
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    result = json.loads((run / "result.json").read_text())
    assert result["interrupted"]
    assert result["base_sha256_before"] == result["base_sha256_after"]
    assert 1 <= result["steps"] < STEPS
    load_adapter_(AutoModelForCausalLM.from_pretrained(inputs[1]), run / "adapter")
    assert main(["train", "--resume", str(run)]) == 0
    assert outcome(run) == whole


def in_own_process(*options):
    """Where nothing else has moved memory about, on which last bits can depend."""
    subprocess.run([sys.executable, "-m", "rankwise", *map(str, options)], check=True, capture_output=True, cwd=ROOT)


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_run_goes_on_when_nobody_reads_what_it_says(options, tmp_path, interrupted):
    heard = tmp_path / "heard"
    in_own_process("train", *options, "--out", heard)
    run = tmp_path / "run"
    rarely = with_options(options, "--save-steps", "1000")
    command = [sys.executable, "-m", "rankwise", "train", *rarely, "--out", run]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert any(line.startswith("step 4/") for line in process.stdout)
        process.stdout.close()
        if interrupted:
            process.send_signal(signal.SIGINT)
    assert process.returncode == (130 if interrupted else 0)
    assert json.loads((run / "result.json").read_text())["interrupted"] == interrupted
    if interrupted:
        in_own_process("train", "--resume", run)
    assert outcome(run) == outcome(heard)


def test_a_signal_during_the_last_step_leaves_what_comes_after_it_to_the_resumed_run(
    options, whole, tmp_path, monkeypatch
):
    def terminate_at_the_last(_view, step):
        if step.number == step.of:
            signal.raise_signal(signal.SIGTERM)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(TrainingView, "step", terminate_at_the_last)
        assert main(["train", *options, "--out", str(run)]) == 143
    result = json.loads((run / "result.json").read_text())
    assert (result["interrupted"], result["signal"], result["steps"]) == (True, "SIGTERM", STEPS)
    assert result["eval_loss_after"] is None
    assert main(["train", "--resume", str(run)]) == 0
    assert outcome(run) == whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_the_evaluations_after_training_leaves_a_run_to_resume(
    options, whole, tmp_path, monkeypatch, number, code
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("rankwise.finetune.evaluate", lambda *_: signal.raise_signal(number))
        assert main(["train", *options, "--out", str(run)]) == code
    result = json.loads((run / "result.json").read_text())
    assert (result["interrupted"], result["steps"], result["eval_loss_after"]) == (True, STEPS, None)
    assert main(["train", "--resume", str(run)]) == 0
    assert outcome(run) == whole
