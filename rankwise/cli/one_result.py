"""What the rank instruments that leave one file have in common: load, measure, write, print."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from rankwise.errors import ConfigError
from rankwise.train.config import TrainConfig

if TYPE_CHECKING:
    from rankwise.paired_runs import PairedRuns
    from rankwise.train.progress import Reporter


class Result(Protocol):
    """What an instrument found. Printing it gives a page."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        ...


def leave_result(
    config: TrainConfig, largest: int, measure: "Callable[[PairedRuns, Reporter], Result]", least_rows: int = 1
) -> int:
    """Measure by runs with ranks up to `largest`; the result goes to the file --out and to standard output.

    Raises ConfigError, before anything is loaded, if the file exists, StorageError if it cannot be written; and
    ConfigError for fewer held-out rows than `least_rows`.
    """
    if config.out.exists():
        raise ConfigError(f"--out {config.out} exists already; choose another file, or remove it first")
    from rankwise import atomic

    atomic.check_place(config.out)
    from rankwise.paired_runs import PairedRuns
    from rankwise.train.progress import Reporter

    reporter = Reporter()
    with reporter.stage(f"loading {config.model}"):
        runs = PairedRuns(config, largest, least_rows=least_rows)
    found = measure(runs, reporter)
    print(found)
    atomic.write_text(config.out, json.dumps(found.as_dict() | {"settings": config.as_dict()}, indent=2) + "\n")
    return 0
