"""What --data may name: files, folders of files, and data sets of the Hugging Face hub, each with a weight."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.data.files import Problem, Row, is_data_file, read_file
from rankwise.errors import DataError, MissingDependency

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<configuration>[\w.-]+))?(@(?P<split>[\w\[\]:%]+))?")
_HELD_OUT = re.compile(r"(test|valid|validation|val|dev|eval)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One entry of --data."""

    name: str
    """A file, a folder, or a data set on the hub: OWNER/NAME, OWNER/NAME:CONFIGURATION@SPLIT (train if not given)."""
    weight: float = 1.0
    """How often its rows are seen in an epoch."""

    @classmethod
    def parse(cls, entry: str) -> "Source":
        """ "rows.csv:2" has the weight 2. Raises DataError for a weight that is not above 0."""
        name, colon, weight = entry.rpartition(":")
        if not colon or Path(entry).exists() or not re.fullmatch(r"[\d.]+", weight):
            return cls(entry)
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if value <= 0:
            raise DataError(f"the weight in {entry!r} must be a number above 0, found {weight!r}")
        return cls(name, value)


def read_sources(entries: Sequence[str | Path]) -> Iterator[Row | Problem]:
    """All rows of all entries, in their order. Raises DataError for an entry that cannot be read."""
    sources = [Source.parse(str(entry)) for entry in entries]
    names = [source.name for source in sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{twice} is named twice; to see its rows twice an epoch: {twice}:2")
    for source in sources:
        path = Path(source.name)
        if path.is_dir():
            for file in _files_in(path):
                yield from read_file(file, source.weight)
        elif not path.exists() and _HUB_NAME.fullmatch(source.name) and not is_data_file(path):
            yield from _hub_rows(source)
        else:
            yield from read_file(path, source.weight)


def _files_in(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and is_data_file(path))
    if not files:
        raise DataError(f"{folder} cannot be read: the folder holds no JSONL, JSON, CSV, TSV, CoNLL or Parquet file")
    held_out = [path for path in files if _HELD_OUT.match(path.name)]
    others = [path for path in files if path not in held_out]
    if held_out and others:
        raise DataError(
            f"{folder} holds files to train on and files that are named as held-out data "
            f"({', '.join(path.name for path in held_out[:3])}). Name the files: --data {others[0]} … and "
            f"--eval-data {held_out[0]}"
        )
    return files


def _hub_rows(source: Source) -> Iterator[Row]:
    parts = _HUB_NAME.fullmatch(source.name)
    assert parts is not None
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingDependency(
            f"there is no file or folder {source.name}; to read it as a data set of the Hugging Face hub: "
            "pip install 'rankwise[data]'"
        ) from None
    try:
        data = load_dataset(parts["name"], parts["configuration"], split=parts["split"] or "train")
    except Exception as error:
        raise DataError(
            f"there is no file or folder {source.name}, and as a data set of the Hugging Face hub it cannot be read: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}. Check the name, or give a file"
        ) from None
    for number, fields in enumerate(data, start=1):
        yield Row(Path(source.name), number, dict(fields), True, source.weight)
