"""The folder of a run: run.yaml, start.json, metrics.jsonl, checkpoints/, adapter/, report.html and result.json."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import asdict
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from filelock import FileLock, Timeout
from torch import nn

from rankwise import atomic
from rankwise.errors import ConfigError, StorageError
from rankwise.lora.checkpoint import save_adapter
from rankwise.models.adapted import write_labels
from rankwise.train.checkpoints import Checkpoints
from rankwise.train.config import TrainConfig
from rankwise.train.loop import Step, Training
from rankwise.train.start import Start
from rankwise.train.state import load_state, save_state
from rankwise.train.watch import Watch

LOCK_FILE, SETTINGS_FILE, START_FILE, METRICS_FILE = ".lock", "run.yaml", "start.json", "metrics.jsonl"


class RunFolder:
    """Writes what a run leaves behind. Every file is replaced in one step, so a kill leaves the last good state.

    A context: while it lasts no other process can write to the folder. The lock is the operating system's, which ends
    with the process however that ends. A folder in which nothing was written is removed at the end.
    """

    def __init__(self, config: TrainConfig, resume: bool = False) -> None:
        # A resumed run works in the directory in which it began, perhaps another than this one.
        self.path = config.out.absolute() if resume else config.out
        self.config = config
        self.resume = resume
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        self._lock = FileLock(self.path / LOCK_FILE)

    def __enter__(self) -> "RunFolder":
        """Raises ConfigError if the folder is in use, holds something (nothing to resume, with `resume`), or if the
        settings to resume with are not those of the run."""
        if self.resume and not (self.path / SETTINGS_FILE).is_file():
            raise ConfigError(f"{self.path} holds no run to resume: there is no {SETTINGS_FILE} in it")
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--out {self.path} is a file; choose another folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        except Timeout:
            raise ConfigError(f"another process is training in {self.path}; wait for its end, or stop it") from None
        except OSError as error:
            raise atomic.storage_error(self.path, error) or error from None
        try:
            self._check_resumable() if self.resume else self._check_empty()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        """Raises StorageError with the command to go on with, if a StorageError ended the run."""
        self._leave()
        if isinstance(error, StorageError) and (self.path / SETTINGS_FILE).is_file():
            raise StorageError(f"{error}: rankwise train --resume {self.path}") from None

    def _leave(self) -> None:
        try:
            if [entry.name for entry in self.path.glob("*")] == [LOCK_FILE]:
                (self.path / LOCK_FILE).unlink()
                self.path.rmdir()
        finally:
            self._lock.release()

    def _check_empty(self) -> None:
        # A process that was killed before it had anything to resume.
        for left_over in self.path.glob(f".{SETTINGS_FILE}.*.tmp"):
            left_over.unlink()
        if any(entry.name != LOCK_FILE for entry in self.path.iterdir()):
            advice = "choose another folder, or remove it first"
            if (self.path / SETTINGS_FILE).is_file() and not self._is_finished():
                advice += f"; to go on with the run in it: rankwise train --resume {self.path}"
            raise ConfigError(f"--out {self.path} already holds something; {advice}")

    def _check_resumable(self) -> None:
        if self._is_finished():
            raise ConfigError(f"the run in {self.path} is complete; there is nothing to resume")
        if start := self.read_start():
            start.check_settings(self.config, self.path / SETTINGS_FILE)
        # What a killed process had not finished writing.
        for left_over in [*self.path.rglob(".*.tmp"), *self.path.rglob(".tmp*")]:
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink(missing_ok=True)

    def _is_finished(self) -> bool:
        result = _json(self.path / "result.json")
        return result is not None and result.get("interrupted") is False

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def full_adapter(self) -> Path:
        """The adapter as it was trained, where adapter/ is cut."""
        return self.path / "adapter-full"

    def write_settings(self) -> None:
        """Write run.yaml; `rankwise train --config run.yaml --out OTHER` repeats the run."""
        atomic.write_text(self.path / SETTINGS_FILE, self.config.as_yaml())

    def write_start(self, start: Start) -> None:
        """Write start.json, of which every checkpoint holds a copy."""
        atomic.write_text(self.path / START_FILE, _start_text(start))

    def read_start(self) -> Start | None:
        """What `write_start` wrote, from a checkpoint if it is damaged; None if the run never came so far."""
        folders = [self.path, *self.checkpoints.newest_first()]
        return next(filter(None, map(_start_in, folders)), None)

    @cached_property
    def day(self) -> str:
        """The day on which the run began, or that begins now."""
        start = self.read_start()
        return start.day if start else date.today().isoformat()

    @contextmanager
    def where_it_began(self) -> Iterator[None]:
        """Work in the directory in which the run began, if it still exists: relative paths are seen from there."""
        start = self.read_start()
        with chdir(start.directory) if start and Path(start.directory).is_dir() else nullcontext():
            yield

    def add_step(self, step: Step) -> None:
        """Add a line to metrics.jsonl."""
        try:
            with (self.path / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(_line(step))
        except OSError as error:
            raise atomic.storage_error(self.path / METRICS_FILE, error) or error from None

    def save_adapter(self, model: nn.Module) -> None:
        """Write adapter/, and for a classifier the labels' names beside it (the format has no place for them)."""
        self._save(model, self.adapter)
        atomic.reach_the_disk(self.adapter)

    def _save(self, model: nn.Module, folder: Path) -> None:
        write_labels(model, self.config.task, folder)
        save_adapter(model, folder)

    def keep_full_adapter(self) -> None:
        """Move adapter/ to adapter-full/, before a smaller one takes its place."""
        shutil.rmtree(self.full_adapter, ignore_errors=True)  # Of a run that was killed after this, and resumed.
        self.adapter.replace(self.full_adapter)

    def take_full_adapter_back(self) -> None:
        """Undo `keep_full_adapter`, where something ended the writing of the smaller one."""
        if self.full_adapter.is_dir():
            shutil.rmtree(self.adapter, ignore_errors=True)
            self.full_adapter.replace(self.adapter)

    def save_checkpoint(self, training: Training, watch: Watch, steps: Sequence[Step]) -> None:
        """Write checkpoints/step-…/: an adapter folder, with the state of the run and its metrics so far beside it."""

        def write(folder: Path) -> None:
            self._save(training.engine.model, folder)
            save_state(training, watch, folder)
            (folder / METRICS_FILE).write_text("".join(map(_line, steps)), encoding="utf-8")
            if start := self.read_start():
                (folder / START_FILE).write_text(_start_text(start), encoding="utf-8")

        self.checkpoints.save(training.done, write)

    def kept(self) -> str:
        """What there is of a run that failed, as a sentence of its message."""
        newest = next(iter(self.checkpoints.newest_first()), None)
        return f"The newest checkpoint, an adapter folder too, is {newest}" if newest else "No checkpoint was saved yet"

    def restore(self, training: Training, watch: Watch) -> tuple[list[Step], list[str]]:
        """Bring a new run to the newest whole checkpoint, or leave it at its beginning if there is none.

        Returns the steps done so far, to which metrics.jsonl is set back, and what to tell the user.
        """
        checkpoint, messages = self.checkpoints.newest()
        if checkpoint is None:
            (self.path / METRICS_FILE).unlink(missing_ok=True)
            return [], [*messages, "no checkpoint to resume from; training begins again"]
        load_state(training, watch, checkpoint)
        metrics = (checkpoint / METRICS_FILE).read_text(encoding="utf-8")
        atomic.write_text(self.path / METRICS_FILE, metrics)
        messages.append(f"resuming after step {training.done} of {len(training.plan)}")
        return [Step(**json.loads(line)) for line in metrics.splitlines()], messages

    def finish(self, result: dict[str, Any], report: str) -> None:
        """Write report.html and, last of all, result.json."""
        atomic.write_text(self.path / "report.html", report)
        atomic.write_text(self.path / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")


def _line(step: Step) -> str:
    return json.dumps(asdict(step), allow_nan=False) + "\n"


def _start_text(start: Start) -> str:
    return json.dumps(asdict(start), indent=2, allow_nan=False) + "\n"


def _start_in(folder: Path) -> Start | None:
    found, kinds = _json(folder / START_FILE), get_type_hints(Start)
    if found is None or found.keys() != kinds.keys():
        return None
    kinds = {name: get_origin(kind) or kind for name, kind in kinds.items()}
    if not all(isinstance(found[name], kind) for name, kind in kinds.items()):
        return None
    try:
        date.fromisoformat(found["day"])
    except ValueError:
        return None
    return Start(**found)


def _json(path: Path) -> dict[str, Any] | None:
    """The object that a file holds; None if there is no such file, or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
