"""The finished runs of a sweep, one file each, so that a sweep that was interrupted goes on with what is missing."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rankwise import atomic
from rankwise.errors import CheckpointError, ConfigError, listing
from rankwise.rank.crossed import Array

SETTINGS = "settings.json"


@dataclass(frozen=True)
class RunResult:
    """What one training run left: its held-out losses, and what it cost."""

    losses: Array
    """[N], in nats, summed over the trained tokens of each held-out example; infinite where training diverged."""
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


class Runs:
    """Finished runs in memory and, with a folder, on disk; each file is written in one step."""

    def __init__(self, folder: Path | None = None, settings: dict[str, Any] | None = None) -> None:
        """`settings` decide what a run gives. Raises ConfigError if the folder holds a sweep with other ones."""
        self.folder = folder
        self._known: dict[Key, RunResult] = {}
        if folder is None:
            return
        path = folder / SETTINGS
        if path.is_file():
            _check_same(json.loads(path.read_text(encoding="utf-8")), settings or {}, folder)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"--out {folder} holds something that is no sweep; choose another folder")
        else:
            atomic.write_text(path, json.dumps(settings or {}, indent=2) + "\n")

    def get(self, key: Key) -> RunResult | None:
        """The result of a finished run; None if it is yet to be done. Raises CheckpointError for a damaged file."""
        if key not in self._known and self.folder is not None and (path := self._path(key)).is_file():
            try:
                with np.load(path) as stored:
                    result = RunResult(
                        stored["losses"],
                        stored["counts"],
                        float(stored["seconds"]),
                        *(int(stored[name]) for name in ("parameters", "peak_bytes", "adapter_bytes")),
                    )
            except (OSError, ValueError, KeyError, EOFError) as error:
                raise CheckpointError(f"{path} is damaged ({error}); remove it, and the run is done anew") from None
            self._known[key] = result
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


def _check_same(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    changed = [
        f"{name}: {before.get(name)!r} there, {now.get(name)!r} now"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ConfigError(
            f"--out {folder} holds a sweep with other settings; give the same to go on, or another folder:\n"
            + listing(changed)
        )
