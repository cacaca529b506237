"""Writes that a kill, a crash or a full disk cannot tear: a temporary name beside the target, then a rename."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from rankwise.errors import StorageError

ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
    errno.EACCES: "choose a place that you may write to",
    errno.ENOTDIR: "choose a place that lies in a folder",
    errno.EEXIST: "choose a place that lies in a folder",
    errno.EROFS: "choose a place that you may write to",
}
"""What helps against an operating system's error."""


@contextmanager
def replacing(path: Path, to_disk: bool = True) -> Iterator[Path]:
    """Give a temporary path to write a file or a folder to; rename it to `path` when the block ends without an error.

    A file that stood at `path` is replaced in one step; a folder must not stand there yet. With `to_disk` the content
    is on the disk before it gets its name, so that a power cut cannot tear it either.
    Raises StorageError if the disk is full or the place cannot be written; what stood at `path` is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if to_disk:
            reach_the_disk(temporary)
        os.replace(temporary, path)
    except Exception as error:
        raise storage_error(path, error) or error from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(NotADirectoryError):
                temporary.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Raise StorageError now if nothing can be written to `path` later, so that no work is done for nothing."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with TemporaryFile(dir=above):
            pass
    except OSError as error:
        reason = StorageError(f"cannot write {path}: {above}: {error.strerror}; choose another place")
        raise storage_error(path, error) or reason from None


def reach_the_disk(path: Path) -> None:
    """Wait until a file, or every file in a folder, is on the disk: a power cut soon after could leave it empty."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("r+b") as opened:
                os.fsync(opened.fileno())


def write_text(path: Path, text: str, to_disk: bool = True) -> None:
    """Replace the file at `path` by `text` (UTF-8), as `replacing` does. Raises StorageError."""
    with replacing(path, to_disk) as temporary:
        temporary.write_text(text, encoding="utf-8")


def storage_error(path: Path, error: Exception) -> StorageError | None:
    """The StorageError for a failed write to `path`, or None where `error` has another cause.

    safetensors reports an operating system's error as text, "… (os error 28)", so the text is read as well.
    """
    number = error.errno if isinstance(error, OSError) else None
    for code, advice in ADVICE.items():
        if number == code or f"(os error {code})" in str(error):
            return StorageError(f"cannot write {path}: {os.strerror(code)}; {advice} and try again")
    return None
