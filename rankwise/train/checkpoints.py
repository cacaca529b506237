"""checkpoints/ of a run: an adapter folder each, with all that the run needs in order to go on from there.

A checkpoint gets its name, step-000040, in one step when it is complete. Its SHA256SUMS (the format of `sha256sum`)
names all other files, so that one that was cut or changed later is found out and passed over. What others put beside
them (a file manager, a notebook server) is no damage.
"""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from rankwise import atomic
from rankwise.errors import StorageError
from rankwise.train.state import NUMBERS_FILE, TENSORS_FILE

SUMS_FILE = "SHA256SUMS"
_STEP = re.compile(r"step-\d+")
KEPT = 2
"""Checkpoints: the newest, and the one before in case the newest gets damaged."""


class Checkpoints:
    """The checkpoints in a folder, which need not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Let `write` fill a folder, make it the checkpoint of `step` and remove those that are too old.

        Raises StorageError if it cannot be written; the checkpoints are then as they were.
        """
        path = self._path(step)
        with atomic.replacing(path) as temporary:
            temporary.mkdir()
            write(temporary)
            sums = [f"{_sha256(file)}  {file.name}\n" for file in sorted(temporary.iterdir())]
            (temporary / SUMS_FILE).write_text("".join(sums), encoding="utf-8")
        for older in self.newest_first()[KEPT:]:
            shutil.rmtree(older)

    def remove(self, step: int) -> None:
        """Remove the checkpoint of `step`, if there is one."""
        shutil.rmtree(self._path(step), ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06}"

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, and what is wrong with newer ones, which get another name.

        Raises StorageError if one cannot be read.
        """
        problems: list[str] = []
        for path in self.newest_first():
            problem = damage(path)
            if problem is None:
                return path, problems
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)  # The same step's of an earlier time.
            path.replace(aside)
            problems.append(f"{path}: {problem}; it is left out, and now called {aside.name}")
        return None, problems

    def newest_first(self) -> list[Path]:
        """The folders of all checkpoints, whole or not."""
        found = [path for path in self.folder.glob("step-*") if path.is_dir() and _STEP.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is as it was written; others may stand beside them.

    Raises StorageError if it cannot be read.
    """
    try:
        lines = (checkpoint / SUMS_FILE).read_text(encoding="utf-8").split("\n")[:-1]
        expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        if not {NUMBERS_FILE, TENSORS_FILE} <= expected.keys():
            return f"{SUMS_FILE} is damaged"
        for name in sorted(expected.keys() - {file.name for file in checkpoint.iterdir()}):
            return f"{name} stands in {SUMS_FILE}, but not in the folder"
        for name, digest in expected.items():
            if _sha256(checkpoint / name) != digest:
                return f"{name} does not have its sum in {SUMS_FILE}: one of them was cut or changed"
    except (FileNotFoundError, UnicodeDecodeError):
        return f"{SUMS_FILE} is missing or damaged"
    except OSError as error:
        # Of what cannot be read now nobody knows whether it is whole.
        raise StorageError(
            f"cannot read {error.filename or checkpoint}: {error.strerror}; mend that and try again"
        ) from None
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
