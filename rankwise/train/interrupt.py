"""Ctrl-C and SIGTERM while a run trains, and after that."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Interrupt:
    """Which signal asked the run to stop, if one did."""

    signal: str | None = None
    """SIGINT or SIGTERM."""


@contextmanager
def first_interrupt(say: Callable[[str], None]) -> Iterator[Interrupt]:
    """Let the first Ctrl-C or SIGTERM only be noted; a second one interrupts at once, as ever."""
    interrupt = Interrupt()
    before = {}

    def note(number: int, _frame: Any) -> None:
        interrupt.signal = signal.Signals(number).name
        for name, handler in before.items():
            signal.signal(name, handler)
        # It may come in the middle of another line's writing, and no failure to say it may end the step.
        with suppress(Exception):
            say("stopping after this step; the adapter and a checkpoint will be saved (again: stop at once)")

    try:
        before.update({name: signal.signal(name, note) for name in (signal.SIGINT, signal.SIGTERM)})
    except ValueError:
        # Only the main thread may set handlers; elsewhere the caller decides how to stop.
        before.clear()
    try:
        yield interrupt
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[Interrupt]:
    """Let SIGTERM raise KeyboardInterrupt, as Ctrl-C does."""
    interrupt = Interrupt()

    def stop(number: int, _frame: Any) -> None:
        interrupt.signal = signal.Signals(number).name
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # As above, in another thread.
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGTERM, before)
