"""`rankwise train --tracker`: TensorBoard's files hold what metrics.jsonl holds, each point once."""

import json
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress

import pytest
from conftest import ROOT
from tensorboardX import record_writer
from tensorboardX.proto.event_pb2 import Event

from rankwise.cli.main import main
from rankwise.train import trackers

ROWS = (ROOT / "examples/text_to_sql/train.jsonl").read_text().splitlines()[:20]
SETTINGS = {"r": 8, "data": ["a", "b"], "lr": None}
NAMES = {"loss", "learning_rate", "gradient_norm", "useful_tokens_per_second", "eval_loss"}


def scalars(run):
    """(name, step) → value of every point in the run's event files, which lie in one folder."""
    points, seen = {}, Counter()
    for file in (run / "tensorboard").glob("events*"):
        content, place = file.read_bytes(), 0
        while place < len(content):
            # A record: its length, a checksum of that, the record, and its checksum.
            length = int.from_bytes(content[place : place + 8], "little")
            record = content[place + 12 : place + 12 + length]
            checksum = int.from_bytes(content[place + 12 + length : place + 16 + length], "little")
            assert checksum == record_writer.masked_crc32c(record)
            place += 16 + length
            event = Event.FromString(record)
            for value in event.summary.value:
                if value.tag in NAMES:
                    seen[value.tag, event.step] += 1
                    points[value.tag, event.step] = value.simple_value
    assert set(seen.values()) == {1}, "each point once"
    return points


def expected(run):
    points = {}
    seconds = 0.0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        step = json.loads(line)
        values = {name: step[name] for name in ("loss", "learning_rate", "gradient_norm", "eval_loss")}
        values["useful_tokens_per_second"] = step["tokens"] / (step["seconds"] - seconds)
        seconds = step["seconds"]
        points |= {(name, step["number"]): value for name, value in values.items() if value is not None}
    return points


@pytest.fixture
def options(tiny_llama_folder, tmp_path):
    data = tmp_path / "sql.jsonl"
    data.write_text("\n".join(ROWS) + "\n")
    settings = ["--max-steps", "14", "--batch-size", "2", "--r", "2", "--eval-answers", "0", "--eval-steps", "5"]
    return ["--data", str(data), "--model", str(tiny_llama_folder), *settings, "--tracker", "tensorboard"]


def test_tensorboard_holds_the_run_and_a_resumed_run_holds_each_point_once(options, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "rankwise", "train", *options, "--save-steps", "2", "--out", str(run)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        assert any(line.startswith("step 5/") for line in process.stderr)
        process.send_signal(signal.SIGKILL)
    assert main(["train", "--resume", str(run)]) == 0
    points = scalars(run)
    assert points.keys() == expected(run).keys()
    assert {step for name, step in points if name == "eval_loss"} == {5, 10, 14}
    for place, value in expected(run).items():
        assert points[place] == pytest.approx(value, rel=1e-6)


def test_every_tracker_gets_each_step_once_and_is_closed(monkeypatch, tmp_path):
    from accelerate import tracking as accelerate
    from accelerate.tracking import GeneralTracker

    told = []

    class Recorder(GeneralTracker):
        name, requires_logging_directory = "recorder", False

        def __init__(self, *arguments, **options):
            super().__init__()
            told.append(("made", options))

        @property
        def tracker(self):
            return self

        def start(self):
            told.append("started")

        def store_init_configuration(self, values):
            told.append(values)

        def log(self, values, step=None, **more):
            told.append((step, values["loss"]))

        def finish(self):
            told.append("closed")

    class Step:
        learning_rate, gradient_norm, tokens, eval_loss = 0.1, 1.0, 10, None

        def __init__(self, number):
            self.number, self.seconds, self.loss = number, number * 0.5, 1.0 / number

    monkeypatch.setitem(accelerate.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    out = tmp_path / "my-run"
    with suppress(KeyboardInterrupt), trackers.tracking(["wandb"], out, SETTINGS, [Step(1), Step(2)]) as track:
        track(Step(3))
        raise KeyboardInterrupt
    assert told == [
        ("made", {"run_name": "rankwise", "name": "my-run"}),
        "started",
        {"r": 8, "data": "['a', 'b']", "lr": "None"},
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        "closed",
    ]


def test_a_missing_package_is_named_with_the_command_before_anything_is_loaded(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    command = ["train", "--model", "nowhere", "--data", "nowhere.jsonl", "--out", str(tmp_path / "run")]
    assert main([*command, "--tracker", "tensorboard", "wandb", "comet_ml"]) == 2
    assert "pip install tensorboardX wandb comet-ml accelerate" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
