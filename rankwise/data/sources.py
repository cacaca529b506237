"""What --data may name: files, folders of files, and data sets of the Hugging Face hub, each with a weight."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

from rankwise.data.files import Problem, Row, is_data_file, read_file, without_nulls
from rankwise.errors import DataError, MissingDependency, listing

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<configuration>[\w.-]+))?(@(?P<split>[\w\[\]:%]+))?")
_HELD_OUT = {"test", "valid", "validation", "val", "dev", "eval", "evaluation"}
"""Words that name held-out data, in the name of a file or of a folder that it lies in."""
_PACKED = {".zst", ".bz2", ".xz", ".lz4", ".br", ".zip", ".7z"}
"""Endings of compressions that are not read."""
_ADDRESS = re.compile(r"[a-z0-9]+:/", re.IGNORECASE)


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
        name, _, weight = entry.rpartition(":")
        if not name or Path(entry).exists():
            return cls(entry)
        # After other names may stand a data set's configuration.
        if not Path(name).exists() and not is_data_file(Path(name)) and not re.fullmatch(r"[\d.]+", weight):
            return cls(entry)
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not 0 < value < inf:
            raise DataError(
                f"the weight in {entry!r} must be a number above 0, found {weight!r}; it says how often the rows of "
                f"{name} are seen in an epoch: {name}:2 is twice, {name}:0.5 half of them"
            )
        return cls(name, value)


def check_unweighted(entries: Sequence[str | Path]) -> None:
    """Raise DataError if an entry has a weight: rows that are evaluated count once each."""
    weighted = [str(entry) for entry in entries if Source.parse(str(entry)).weight != 1]
    if weighted:
        raise DataError(f"{', '.join(weighted)}: a weight says how often rows train; leave it out of held-out data")


def read_sources(entries: Sequence[str | Path]) -> Iterator[Row | Problem]:
    """All rows of all entries, in their order. Raises DataError for an entry that cannot be read."""
    named = [Source.parse(str(entry)) for entry in entries]
    sources = [part for source in named for part in _parts(source)]
    seen: set[Path | str] = set()
    for source in sources:
        own = source.name if _on_hub(source) else Path(source.name).resolve()
        if own in seen:
            raise DataError(f"{source.name} is named twice; to see its rows twice an epoch: {source.name}:2")
        seen.add(own)
    for source in sources:
        if _on_hub(source):
            yield from _hub_rows(source)
        elif _ADDRESS.match(source.name):
            raise DataError(f"{source.name} is an address, which rankwise does not read; download the file first")
        else:
            yield from read_file(Path(source.name), source.weight)


def _parts(source: Source) -> list[Source]:
    """The files of a folder; anything else as it is."""
    path = Path(source.name)
    return [Source(str(file), source.weight) for file in _files_in(path)] if path.is_dir() else [source]


def _on_hub(source: Source) -> bool:
    path = Path(source.name)
    return not path.exists() and _HUB_NAME.fullmatch(source.name) is not None and not is_data_file(path)


def _files_in(folder: Path) -> list[Path]:
    """The data files in a folder and below, but for hidden ones, which editors and systems leave there."""
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        raise DataError(f"{folder} was written by save_to_disk; write Parquet instead: data.to_parquet('data.parquet')")
    found = sorted(_walk(folder, set()))
    faults = [f"{path} is a link to nothing; mend or remove it" for path in found if not path.exists()]
    faults += [
        f"{path} is compressed in a way that rankwise does not read; unpack it, or pack it with gzip"
        for path in found
        if path.suffix.lower() in _PACKED and is_data_file(path.with_suffix(""))
    ]
    if faults:
        raise DataError(f"{folder} holds what cannot be read:\n{listing(sorted(faults))}")
    files = [path for path in found if is_data_file(path)]
    if not files:
        raise DataError(f"{folder} cannot be read: the folder holds no JSONL, JSON, CSV, TSV, CoNLL or Parquet file")
    held_out = [path for path in files if _HELD_OUT & {*re.split(r"[\W\d_]+", str(path.relative_to(folder)).lower())}]
    others = [path for path in files if path not in held_out]
    if held_out and others:
        raise DataError(
            f"{folder} holds files to train on and files that are named as held-out data "
            f"({', '.join(path.name for path in held_out[:3])}). Name the files: --data {others[0]} … and "
            f"--eval-data {held_out[0]}"
        )
    return files


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """What lies in a folder and below but for hidden names, through links, each folder once: links may go round."""
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
        elif path.resolve() not in seen:
            yield from _walk(path, seen)


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
        yield Row(Path(source.name), number, without_nulls(dict(fields)), True, source.weight)
