"""A run that ends at any moment goes on to the very bytes that it would have had."""

import json
import os
import random
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path

import numpy
import pytest
import torch
from conftest import tiny

from rankwise import LoraConfig, TrainConfig, inject_, trainable_parameters
from rankwise.data.examples import TextExample
from rankwise.engine.language import LanguageEngine
from rankwise.errors import ConfigError, RankwiseError, StorageError
from rankwise.train.checkpoints import damage
from rankwise.train.interrupt import first_interrupt
from rankwise.train.loop import Step, Training
from rankwise.train.progress import Reporter
from rankwise.train.random_state import random_state, set_random_state
from rankwise.train.run import run_training
from rankwise.train.run_folder import RunFolder
from rankwise.train.start import Start, settings_of

EXAMPLES = [TextExample((5, 6, 7 + n, 8, 9 + n), (False, False, True, True, True), "here") for n in range(6)]
HELD_OUT = EXAMPLES[:2]
STEPS = 3


class Crash(BaseException):
    """What a kill is in these tests: nothing that comes after it is written or removed."""


class FileSystem:
    """Counts the operations that change something, and lets none pass from number `crash_at` on."""

    def __init__(self):
        self.crash_at: int | None = None
        self.count = 0
        sys.addaudithook(self._note)

    def _note(self, event, arguments):
        if self.crash_at is None:
            return
        changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
        if event == "open":
            path, mode, flags = arguments
            changes = set(mode or "") & set("wa+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
            changes = changes and not str(path).endswith(".lock") and not isinstance(path, int)
        if changes:
            self.count += 1
            if self.count >= self.crash_at:
                raise Crash


FILES = FileSystem()


@pytest.fixture(scope="module")
def engine():
    model = tiny("llama")
    model.lm_head.weight.data *= 30
    torch.manual_seed(0)
    inject_(model, LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj"]))
    return LanguageEngine(model, 2, EXAMPLES)


@pytest.fixture
def run(engine, tmp_path, monkeypatch):
    """Train as a new process would; returns (adapter, metrics without times, what was said)."""
    start = [parameter.detach().clone() for parameter in trainable_parameters(engine.model)]
    # The disk's own cache is not what these tests crash.
    monkeypatch.setattr(os, "fsync", lambda file: None)

    def train(name="run", resume=False, crash_at=None, **changes):
        plain = {"max_steps": STEPS, "batch_size": 3, "lr": 0.05, "save_steps": 1, "eval_steps": 2, "patience": 0}
        config = TrainConfig(model="m", data=Path("d"), out=tmp_path / name, **{**plain, **changes})
        reporter, said = Reporter(), []
        monkeypatch.setattr(reporter, "say", said.append)
        for parameter, value in zip(trainable_parameters(engine.model), start, strict=True):
            parameter.data = value.clone()
        torch.manual_seed(7)
        FILES.count, FILES.crash_at = 0, crash_at
        try:
            with RunFolder(config, resume) as folder:
                if not folder.read_start():
                    folder.write_settings()
                    folder.write_start(Start("data", "base", 0.05, "/", settings_of(config), "2026-01-31"))
                run_training(Training(engine, EXAMPLES, config), HELD_OUT, config, folder, reporter)
                folder.save_adapter(engine.model)
        finally:
            FILES.crash_at = None
        metrics = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
        without_times = [{**line, "seconds": None} for line in metrics]
        return (config.out / "adapter/adapter_model.safetensors").read_bytes(), without_times, said

    yield train
    for parameter, value in zip(trainable_parameters(engine.model), start, strict=True):
        parameter.data, parameter.grad = value, None


def test_a_crash_before_any_change_on_disk_is_resumed_to_the_same_bytes(run, tmp_path):
    whole = run("whole")[:2]
    for crash_at in range(1, 1000):
        try:
            run("cut", crash_at=crash_at)
            break
        except Crash:
            pass
        # The next process crashes too, at another place; the one after comes through.
        with suppress(Crash):
            run("cut", resume=(tmp_path / "cut/run.yaml").exists(), crash_at=crash_at * 7 % 31 + 1)
        result = run("cut", resume=(tmp_path / "cut/run.yaml").exists())
        assert result[:2] == whole, f"after a crash before change {crash_at}"
        shutil.rmtree(tmp_path / "cut")
    assert 60 < crash_at < 1000, "as many places as there are changes"


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_cut_checkpoint_is_passed_over_and_named(run, tmp_path, damaged):
    whole = run("whole")[:2]
    draw = random.Random(damaged)
    for file in sorted(path.name for path in (tmp_path / "whole/checkpoints/step-000003").iterdir()):
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        for step in range(3, 3 - damaged, -1):
            path = tmp_path / f"cut/checkpoints/step-{step:06}" / file
            content = path.read_bytes()
            path.write_bytes(content[: draw.randrange(len(content))])
        *result, said = run("cut", resume=True)
        assert result == list(whole)
        assert "step-000003: " in said[0]
        assert file in said[0] or file == "SHA256SUMS"
        expected = (
            "resuming after step 2 of 3" if damaged == 1 else "no checkpoint to resume from; training begins again"
        )
        assert said[damaged] == expected
        shutil.rmtree(tmp_path / "cut")


def test_every_changed_byte_of_a_checkpoint_is_found(run, tmp_path):
    run()
    checkpoint = tmp_path / "run/checkpoints/step-000003"
    assert damage(checkpoint) is None
    draw = random.Random(0)
    for file in checkpoint.iterdir():
        content = file.read_bytes()
        for place in draw.sample(range(len(content)), 10):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert damage(checkpoint), f"{file.name} at {place}"
        file.unlink()
        assert damage(checkpoint), f"without {file.name}"
        file.write_bytes(content)
    assert damage(checkpoint) is None


def test_what_others_put_into_a_checkpoint_is_no_damage(run, tmp_path):
    whole = run("whole")[:2]
    for checkpoint in (tmp_path / "whole/checkpoints").iterdir():
        (checkpoint / ".DS_Store").write_text("x")
        (checkpoint / ".ipynb_checkpoints").mkdir()
    *result, said = run("whole", resume=True)
    assert result == list(whole)
    assert said[0] == "resuming after step 3 of 3"


def test_a_damaged_checkpoint_gets_another_name_and_the_last_two_whole_ones_are_kept(run, tmp_path):
    run()
    for _ in range(2):
        (tmp_path / "run/checkpoints/step-000003/state.json").write_text("{}")
        assert "now called step-000003.damaged" in run(resume=True)[2][0]
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-000002", "step-000003", "step-000003.damaged"]


def test_a_checkpoint_that_cannot_be_read_is_left_as_it_is(run, tmp_path, monkeypatch):
    run()
    checkpoint = tmp_path / "run/checkpoints/step-000003"
    before = sorted(checkpoint.iterdir())

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied", str(checkpoint))

    with monkeypatch.context() as patch:
        patch.setattr("rankwise.train.checkpoints._sha256", refused)
        with pytest.raises(StorageError, match=r"cannot read .*step-000003: Permission denied.*train --resume"):
            run(resume=True)
    assert sorted(checkpoint.iterdir()) == before


@pytest.mark.parametrize("eval_steps", [0, 1])
def test_an_adapter_that_went_astray_is_not_kept_and_the_best_one_is_written(run, tmp_path, monkeypatch, eval_steps):
    move = Training.move

    def astray(self, loss):
        step = move(self, loss)
        if self.done == 2:
            with torch.no_grad():
                for parameter in self.parameters:
                    parameter.fill_(3e38)
        return step

    monkeypatch.setattr(Training, "move", astray)
    with pytest.raises(RankwiseError, match=r"not finite .*newest checkpoint, .*step-000001") as error:
        run(eval_steps=eval_steps)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000001"]
    assert ("The adapter of step 1, with the lowest" in str(error.value)) == bool(eval_steps)
    if eval_steps:
        best, first = (
            (tmp_path / "run" / folder / "adapter_model.safetensors").read_bytes()
            for folder in ("adapter", "checkpoints/step-000001")
        )
        assert best == first


def test_the_step_before_a_batch_that_alone_is_bad_is_kept(run, tmp_path, monkeypatch):
    move = Training.move
    monkeypatch.setattr(Training, "move", lambda self, loss: move(self, loss * torch.inf if self.done == 2 else loss))
    with pytest.raises(RankwiseError, match="step-000002"):
        run(eval_steps=0, save_steps=9)


def test_a_run_that_stopped_early_is_resumed_to_the_same_end(run, tmp_path):
    settings = {"max_steps": 12, "eval_steps": 1, "patience": 1, "lr": 0.9}
    whole = run("whole", **settings)
    assert len(whole[1]) < 12
    result = run("whole", resume=True, **settings)
    assert result[:2] == whole[:2]
    assert result[2][-1] == whole[2][-1]


def test_the_last_two_checkpoints_are_kept(run, tmp_path):
    run()
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-000002", "step-000003"]


def test_a_checkpoint_holds_no_pickle(run, tmp_path):
    run()
    kinds = {path.suffix for path in (tmp_path / "run/checkpoints/step-000003").iterdir()}
    assert kinds == {".json", ".jsonl", ".safetensors", ""}


def test_random_generators_go_on_where_they_were():
    def draw():
        return random.random(), random.gauss(0, 1), numpy.random.rand(), numpy.random.randn(), torch.rand(3).tolist()

    draw()
    state = random_state()
    assert {tensor.dtype for tensor in state.values()} == {torch.uint8}
    first = draw()
    assert draw() != first
    set_random_state(state)
    assert draw() == first


@pytest.mark.parametrize("device", ["/dev/full", "a pipe without a reader"])
def test_what_cannot_be_said_does_not_end_a_run(device, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing if device != "/dev/full" else device, "w") as nobody, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", nobody)
        reporter = Reporter()
        with reporter.stage("loading"), reporter.training(1) as view, first_interrupt(reporter.say) as interrupt:
            view.step(Step(1, 1, 1.0, 1.0, 1.0, 1, 1.0))
            signal.raise_signal(signal.SIGTERM)
    assert interrupt.signal == "SIGTERM"


@pytest.fixture
def interrupts():
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_is_noted_and_the_next_one_not_whatever_becomes_of_saying_so():
    def say(text):
        raise RuntimeError("reentrant call")

    with first_interrupt(say) as interrupt:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert interrupt.signal == "SIGINT"


def test_two_runs_in_one_folder_are_refused_and_the_first_goes_on(tmp_path):
    config = TrainConfig(model="m", data=Path("d"), out=tmp_path / "run")
    with RunFolder(config) as first:
        for resume in (False, True):
            if resume:
                first.write_settings()
            with pytest.raises(ConfigError, match="another process is training in"), RunFolder(config, resume):
                pass
        assert (first.path / "run.yaml").is_file()
    with RunFolder(config, resume=True):
        pass


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path):
    config = TrainConfig(model="m", data=Path("d"), out=tmp_path / "run")
    with RunFolder(config):
        assert config.out.is_dir()
    assert not config.out.exists()


def test_a_full_disk_is_one_error_that_says_how_to_go_on(engine, run, monkeypatch):
    modules = [type(module) for module in engine.model.modules()]
    whole = run("whole")[:2]
    replace, left = os.replace, [8]

    def full(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StorageError, match=r"No space left on device; free some space .*train --resume") as error:
            run("full")
    # Whoever keeps the error, as a notebook does, keeps no model that is still prepared for training.
    assert error.value.__traceback__
    assert [type(module) for module in engine.model.modules()] == modules
    *result, said = run("full", resume=True)
    assert result == list(whole)
    assert "resuming after step 2 of 3" in said


def test_changed_data_and_a_changed_base_are_both_named():
    start = Start("data", "base", 0.1, "/", {}, "2026-01-31")
    start.check("data", "base")
    with pytest.raises(ConfigError) as error:
        start.check("other", "another")
    assert "the data are not those" in str(error.value)
    assert "the base model's weights are not those" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [*((name, [7]) for name in ("data_sha256", "learning_rate", "directory", "settings", "day")), ("day", "Monday")],
)
def test_a_start_with_a_value_of_another_kind_is_made_anew(field, value, tmp_path):
    run = RunFolder(TrainConfig(model="m", data=["d.jsonl"], out=tmp_path / "run"))
    start = Start("data", "base", 0.1, "/", {}, "2026-01-31")
    run.path.mkdir()
    run.write_start(start)
    assert run.read_start() == start
    file = run.path / "start.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    assert run.read_start() is None


def test_a_damaged_start_is_read_from_the_newest_checkpoint(run, tmp_path):
    run()
    folder = RunFolder(TrainConfig(model="m", data=Path("d"), out=tmp_path / "run"))
    start = folder.read_start()
    (tmp_path / "run/start.json").write_text("{")
    assert folder.read_start() == start
    assert start is not None
    assert start.settings["max_steps"] == STEPS
