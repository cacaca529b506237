"""The finished runs of a sweep, one file each, so that a sweep that was interrupted goes on with what is missing."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rankwise import atomic
from rankwise.errors import CheckpointError, ConfigError, RankwiseError, listing
from rankwise.rank.crossed import LEAST_EXAMPLES, Array

SETTINGS = "settings.json"
DAY = "day"
"""The setting that says on which day the sweep began; one that goes on keeps it, so it is no reason to refuse."""
_CALLED = {"base_sha256": "the base model's weights (SHA-256)", "rows_sha256": "the rows of the data (SHA-256)"}
"""Settings that nobody gives, in the words of a message."""
BASE, FULL = 0, -1
"""What stands in the place of a rank for the base without an update, and for full fine-tuning."""


@dataclass(frozen=True)
class RunResult:
    """What one training run left: its held-out losses, and what it cost."""

    losses: Array
    """[N], in nats, summed over the trained tokens of each held-out example (those that ask the same are one, as
    `rankwise.rank.paired.units` tells); infinite where training diverged."""
    counts: Array
    """[N], how many tokens that is (1 for a text to classify)."""
    seconds: float
    """Of training."""
    parameters: int
    """Trained numbers."""
    peak_bytes: int = 0
    """The most memory that the process held while it trained; 0: not known."""
    adapter_bytes: int = 0
    """Of adapter_model.safetensors (or of the whole model in fp32); 0: not known."""
    shared_by: tuple[int, ...] = ()
    """Ranks of the runs that shared its passes, its own too: time and memory are then those of all of them."""


@dataclass(frozen=True, order=True)
class Key:
    """Which run: its rank (0: the base, -1: full fine-tuning), its seed and the factor on the learning rate."""

    rank: int
    seed: int
    factor: float = 1.0

    @property
    def name(self) -> str:
        """Of what the run leaves on disk."""
        return f"rank{self.rank}-seed{self.seed}-rate{self.factor:.3g}"


Together = Callable[[Sequence[Key]], Iterable[tuple[Key, RunResult]]]
"""From runs to be done to each one's result, as soon as it is there."""


class Runs:
    """Finished runs in memory and, with a folder, on disk; each file is written in one step."""

    def __init__(
        self,
        folder: Path | None = None,
        settings: dict[str, Any] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`settings` decide what a run gives. `say` is told of a damaged file, whose run is then to be done anew.

        Raises ConfigError if the folder holds a sweep with other settings, CheckpointError if those are damaged.
        """
        self.folder, self._say = folder, say
        self._known: dict[Key, RunResult] = {}
        if folder is None:
            return
        check_folder(folder, settings or {})
        if not (folder / SETTINGS).is_file():
            atomic.write_text(folder / SETTINGS, json.dumps(settings or {}, indent=2) + "\n")

    def get(self, key: Key) -> RunResult | None:
        """The result of a finished run; None if it is yet to be done, also where its file is damaged."""
        if key not in self._known and self.folder is not None and (path := self._path(key)).is_file():
            try:
                self._known[key] = _read(path)
            except Exception as error:  # What a damaged zip file raises has no common base.
                self._say(f"{path} is damaged ({type(error).__name__}: {error}); the run is done anew")
        return self._known.get(key)

    def add(self, key: Key, result: RunResult) -> None:
        """Keep the result of a run. Raises StorageError."""
        self._known[key] = result
        if self.folder is not None:
            with atomic.replacing(self._path(key)) as temporary, temporary.open("wb") as file:
                np.savez(file, **vars(result))

    def _path(self, key: Key) -> Path:
        assert self.folder is not None
        return self.folder / "runs" / f"{key.name}.npz"


def _read(path: Path) -> RunResult:
    # np.load leaves a file open that it cannot read.
    with path.open("rb") as file, np.load(file) as stored:
        result = RunResult(
            stored["losses"],
            stored["counts"],
            float(stored["seconds"]),
            *(int(stored[name]) for name in ("parameters", "peak_bytes", "adapter_bytes")),
            shared_by=tuple(stored["shared_by"].astype(int).tolist()) if "shared_by" in stored else (),
        )
    if result.losses.ndim != 1 or result.losses.shape != result.counts.shape:
        raise ValueError(f"{result.losses.shape} losses for {result.counts.shape} counts")
    return result


class PendingRuns:
    """Does the runs that are not there yet."""

    def __init__(self, together: Together, runs: Runs, say: Callable[[str], None], name: Callable[[int], str]) -> None:
        self._together, self._runs, self._say, self._name = together, runs, say, name

    def do(self, keys: Sequence[Key], finite: bool = False) -> None:
        """Those of `keys` that are not there yet. Raises RankwiseError at the first that is not `finite`, if asked."""
        missing = [key for key in keys if self._runs.get(key) is None]
        for key, result in self._together(missing) if missing else ():
            # Before any further training: no later run can mend it.
            if len(result.counts) < LEAST_EXAMPLES:
                found = len(result.counts)
                raise ConfigError(f"a sweep needs at least {LEAST_EXAMPLES} different held-out examples, found {found}")
            self._runs.add(key, result)
            loss = f"held-out loss {self.loss(key):.4f}"
            self._say(f"{self._name(key.rank)}, seed {key.seed}, rate × {key.factor:.3g}: {loss}")
            if finite:
                self.finite_result(key)

    def result(self, key: Key) -> RunResult:
        self.do([key])
        result = self._runs.get(key)
        assert result is not None
        return result

    def loss(self, key: Key) -> float:
        """Mean held-out loss, infinite where training diverged."""
        result = self.result(key)
        mean = float(result.losses.sum() / result.counts.sum())
        return mean if math.isfinite(mean) else math.inf

    def base_loss(self, seed: int) -> float:
        """Raises RankwiseError if it is not finite."""
        self.finite_result(Key(BASE, seed))
        return self.loss(Key(BASE, seed))

    def finite_result(self, key: Key) -> RunResult:
        """Raises RankwiseError if the training diverged."""
        result = self.result(key)
        if not np.isfinite(result.losses).all():
            raise self.diverged(key)
        return result

    def diverged(self, key: Key) -> RankwiseError:
        return RankwiseError(f"training diverged at {self._name(key.rank)}, seed {key.seed}; give a lower --lr")


def check_folder(folder: Path, settings: dict[str, Any], partly: bool = False) -> None:
    """Raise ConfigError if the folder holds something else than a sweep with these settings.

    `partly`: not all settings are known yet, so those that are missing are let pass. Raises CheckpointError if the
    settings of the folder are damaged.
    """
    path = folder / SETTINGS
    if path.is_file():
        before = _settings_in(path)
        names = settings if partly else {**before, **settings}
        changed = [
            f"{_CALLED.get(name, name)}: {before.get(name)!r} there, {settings.get(name)!r} now"
            for name in names
            if name != DAY and before.get(name) != settings.get(name)
        ]
        if changed:
            raise ConfigError(
                f"--out {folder} holds a sweep with other settings; give the same to go on, or another folder:\n"
                + listing(changed)
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out {folder} holds something that is no sweep; choose another folder")


def day_of(folder: Path) -> str | None:
    """The day on which the sweep in a folder began; None if it begins now. Raises CheckpointError as `check_folder`."""
    path = folder / SETTINGS
    return _settings_in(path).get(DAY) if path.is_file() else None


def _settings_in(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        problem = str(error)
    else:
        if isinstance(settings, dict):
            return settings
        problem = f"a mapping was expected, found {type(settings).__name__}"
    raise CheckpointError(
        f"{path} is damaged ({problem}), so with which settings its runs were trained is not known; bring the file "
        "back, or choose another --out"
    )
