"""What a user sees while a run goes on: a bar on a terminal, plain lines elsewhere. The loop itself never prints."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from rankwise.train.loop import Step
from rankwise.train.peak_memory import peak_memory_bytes

LINES_PER_RUN = 20


def let_go_unread(file: IO[str]) -> None:
    """Let what is still written to a file that takes no more be lost, what Python writes at its own end too."""
    with suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), file.fileno())


class _PatientConsole(Console):
    """Falls silent when nothing takes what it says (`| head` has enough, Ctrl-C ends `| tee` too): the run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        let_go_unread(self.file)

    def __exit__(self, *error: Any) -> None:
        # All that is shown is written here. A terminal that is gone, or a full disk, is no broken pipe.
        try:
            super().__exit__(*error)
        except OSError:
            self.on_broken_pipe()


class Reporter:
    """Says what is going on, on standard error; results go to standard output and to files."""

    def __init__(self) -> None:
        self.console = _PatientConsole(stderr=True, highlight=False, emoji=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def stage(self, name: str) -> Iterator["Stage"]:
        """Show that something of unknown length goes on, with the time that it took."""
        stage = Stage(self.console, name)
        try:
            yield stage
        finally:
            stage.end()

    @contextmanager
    def training(self, total: int, done: Sequence[Step] = ()) -> Iterator["TrainingView"]:
        """Show the steps of a training run, of which some may be done already."""
        view = TrainingView(self.console, total, done)
        try:
            yield view
        finally:
            view.end()


class Stage:
    """A spinner with a changing text on a terminal, one line at the end elsewhere."""

    def __init__(self, console: Console, name: str) -> None:
        self._console, self._name, self._begin = console, name, time.perf_counter()
        self._status = console.status(name) if console.is_terminal else None
        if self._status:
            self._status.start()

    def update(self, text: str) -> None:
        if self._status:
            self._status.update(f"{self._name}: {text}")

    def end(self) -> None:
        if self._status:
            self._status.stop()
        self._console.print(f"{self._name}: {time.perf_counter() - self._begin:.1f} s", markup=False)


class TrainingView:
    """Step, loss, useful tokens/s, time left and peak memory."""

    def __init__(self, console: Console, total: int, done: Sequence[Step] = ()) -> None:
        self._console, self._first, self._tokens = console, len(done) + 1, sum(step.tokens for step in done)
        self._every = max(1, total // LINES_PER_RUN)
        self._progress = self._task = None
        if console.is_terminal:
            columns = (TextColumn("training"), BarColumn(bar_width=20), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=console)
            self._task = self._progress.add_task("", total=total, completed=len(done))
            self._progress.start()

    def step(self, step: Step) -> None:
        self._tokens += step.tokens
        left = step.seconds / step.number * (step.of - step.number)
        held_out = "" if step.eval_loss is None else f"held-out loss {step.eval_loss:.4f} | "
        line = (
            f"step {step.number}/{step.of} | loss {step.loss:.4f} | {held_out}"
            f"{self._tokens / step.seconds:.0f} tokens/s | "
            f"left {_clock(left)} | peak {peak_memory_bytes() / 1e9:.2f} GB"
        )
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step.number, description=line)
            is_line = bool(held_out)
        else:
            is_line = bool(held_out) or step.number % self._every == 0 or step.number in (self._first, step.of)
        if is_line:
            self._console.print(line, markup=False)

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
