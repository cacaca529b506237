"""The lines of a text file, gzipped or not, one by one."""

import gzip
from collections.abc import Generator
from pathlib import Path
from typing import Any


def opened(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def numbered_lines(path: Path) -> Generator[tuple[int, str | UnicodeDecodeError]]:
    """Numbered lines, decoded one by one so that a wrong byte spoils its own line alone. A BOM is passed over, and
    Windows line ends are read as plain ones."""
    with opened(path) as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.endswith(b"\r\n"):
                raw = raw[:-2] + b"\n"
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                yield number, error


def not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 text (byte {error.start + 1} of the line); convert the file first"
