"""Data files → numbered rows: JSONL, JSON, CSV, TSV and CoNLL (also gzipped) and Parquet. A bad row hides no other."""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any

from rankwise.data.lines import not_utf8, numbered_lines, opened
from rankwise.data.tables import read_table
from rankwise.errors import DataError, MissingDependency


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data file."""

    file: Path
    line: int
    """Counted from 1."""
    fields: Mapping[str, Any]
    by_row: bool = False
    """`line` counts rows, in formats that have no lines to count."""
    weight: float = 1.0
    """How often the row is seen in an epoch."""

    @property
    def place(self) -> str:
        return _place(self.file, self.line, self.by_row)


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one row."""

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


HALF_CHARACTER = "holds half of a surrogate pair, which is no character"
DEEPEST = 100
"""Levels of lists and objects in a field."""
Fields = Mapping[str, Any]
Records = Iterable[tuple[int, Fields | str]]
"""Line (or row) numbers with the row's fields, or with what is wrong with it."""


def read_file(path: Path, weight: float = 1.0) -> Iterator[Row | Problem]:
    """The rows of a file in their order, one at a time; blank lines are passed over.

    The name's ending says how to read it; a file with another ending is read as JSONL. Raises DataError if the file as
    a whole cannot be read, MissingDependency for Parquet without pyarrow.
    """
    try:
        _check_kind(path)
        reader, by_row = _reader(path)
        for number, content in reader(path):
            fault = content if isinstance(content, str) else _unusable(content)
            if fault or isinstance(content, str):
                yield Problem(_place(path, number, by_row), str(fault))
            else:
                yield Row(path, number, content, by_row, weight)
    except FileNotFoundError:
        where = "" if path.is_absolute() else f", seen from {Path.cwd()}"
        raise DataError(f"no such data file: {path}{where}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


_KINDS = {
    b"\x1f\x8b": "is gzipped; give its name the ending .gz",
    b"PK\x03\x04": "is a zip archive or a spreadsheet; unpack it, or save the sheet as CSV",
    b"\x28\xb5\x2f\xfd": "is compressed with zstandard; unpack it, or pack it with gzip",
    b"BZh": "is compressed with bzip2; unpack it, or pack it with gzip",
    b"\xfd7zXZ\x00": "is compressed with xz; unpack it, or pack it with gzip",
    b"PAR1": "is a Parquet file; give its name the ending .parquet",
    b"ARROW1": "is an Arrow file; write it as Parquet",
}
"""How files begin that their name does not tell."""


def _check_kind(path: Path) -> None:
    if path.suffix.lower() in (".gz", ".parquet") or not path.is_file():
        return
    with path.open("rb") as file:
        begin = file.read(max(map(len, _KINDS)))
    for magic, advice in _KINDS.items():
        if begin.startswith(magic):
            raise DataError(f"{path} {advice}")


def without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the nulls inside its columns: a table gives every object there the fields of all of them."""

    def inner(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: inner(own) for name, own in value.items() if own is not None}
        return [inner(own) for own in value] if isinstance(value, list) else value

    return {name: inner(value) for name, value in fields.items()}


def _unusable(fields: Mapping[str, Any]) -> str | None:
    """What no task can use in a row, in whatever field: half a character, or values nested without end."""
    level: list[Any] = list(fields.values())
    for _ in range(DEEPEST):
        texts = [value for value in level if isinstance(value, str)]
        keys = [key for value in level if isinstance(value, dict) for key in value]
        if any(map(has_half_character, (*texts, *keys))):
            return HALF_CHARACTER
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return None
    return f"holds values nested more than {DEEPEST} deep"


def has_half_character(text: str) -> bool:
    """Whether a string holds half of a surrogate pair, which no tokenizer takes and no file can hold."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def is_data_file(path: Path) -> bool:
    """Whether the file's name has one of the endings that `read_file` knows, but for .txt, which may be any note."""
    return _ending(path) in _READERS and _ending(path) != ".txt"


def _place(file: Path, line: int, by_row: bool) -> str:
    return f"{file}, row {line}" if by_row else f"{file}:{line}"


def _ending(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _reader(path: Path) -> tuple[Callable[[Path], Records], bool]:
    ending = _ending(path)
    if ending == ".json" and path.is_file() and _holds_one_object_a_line(path):
        ending = ".jsonl"
    return _READERS.get(ending, _json_lines), ending in (".json", ".parquet")


def _json_lines(path: Path) -> Records:
    first = True
    for number, line in numbered_lines(path):
        if isinstance(line, UnicodeDecodeError):
            yield number, not_utf8(line)
        elif line.strip():
            content = _json_object(line)
            opens = first and line.strip() in ("[", "{", "[{")
            yield (
                number,
                f"{content} (a file that is one JSON value of many lines is named .json)" if opens else content,
            )
            first = False


def _json_object(text: str) -> Fields | str:
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if isinstance(value, list):
        return "a row must be a JSON object, found a list (a file that is one list of rows is named .json)"
    return value if isinstance(value, dict) else f"a row must be a JSON object, found {type(value).__name__}"


def parse_json(text: str) -> Any:
    """A JSON value. Raises ValueError, also for a key that stands twice and for NaN and Infinity, which JSON lacks."""
    return _DECODER.decode(text)


def parsed(value: Any) -> Any:
    """Lists are JSON text in CSV files and in some data sets; what is no JSON stays as it is."""
    try:
        return parse_json(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return fields


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _holds_one_object_a_line(path: Path) -> bool:
    """Whether a .json file is JSON lines: its first line is an object by itself, and something follows."""
    try:
        lines = (line for _, line in numbered_lines(path) if isinstance(line, UnicodeDecodeError) or line.strip())
        first, second = next(lines, ""), next(lines, None)
    except (OSError, EOFError, zlib.error):
        return False
    if second is None or not isinstance(first, str):
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


_ROWS = (
    *({name} for name in ("messages", "conversations", "tokens", "labels", "text")),
    {"prompt", "completion"},
    {"instruction", "output"},
    {"anchor", "positive"},
)
"""Fields by which an object is a row itself, whatever lists it holds."""


def _lists_of_rows(value: Any) -> list[list[Any]]:
    """A JSON list, or the lists of objects in a JSON object; an object without any, or that is a row itself, is one."""
    if not isinstance(value, dict):
        return [value] if isinstance(value, list) else []
    lists = [entry for entry in value.values() if isinstance(entry, list)]
    of_objects = [entry for entry in lists if any(isinstance(inner, dict) for inner in entry)]
    if any(names <= value.keys() for names in _ROWS):
        return [[value]]
    # A table by columns is no row.
    return of_objects or (lists if len(lists) == len(value) > 1 else [[value]])


def _json(path: Path) -> Records:
    """The rows of a JSON list, or of the only list of objects in a JSON object; or the object as the only row."""
    with opened(path) as file:
        raw = file.read()
    try:
        value = parse_json(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line} is not UTF-8 text; convert the file first") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    lists = _lists_of_rows(value)
    if len(lists) != 1:
        found = f"an object with {len(lists)} lists" if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{path} must hold a list of rows, or an object with one list; found {found}")
    for number, entry in enumerate(lists[0], start=1):
        yield number, entry if isinstance(entry, dict) else f"a row must be an object, found {type(entry).__name__}"


def _columns(path: Path) -> Records:
    """CoNLL's columns: a word first and its tag last on each line, blank lines between sentences (Tjong Kim Sang and De
    Meulder 2003). Columns are parted by tabs, or by blanks where a sentence's first line holds no tab; each line has as
    many. A row is a sentence, numbered by its first line. Above a sentence may stand comments like "# id = 1"."""
    for lines in _sentences(path):
        sentence = list(dropwhile(lambda entry: _is_comment(entry[1]), lines))
        if not sentence:
            continue
        faults, cells = [], []
        tabs = any("\t" in line for _, line in sentence[:1] if isinstance(line, str))
        for number, line in sentence:
            parts = _cells(line, tabs) if isinstance(line, str) else []
            if isinstance(line, UnicodeDecodeError):
                faults.append((number, not_utf8(line)))
            elif parts[0] == "-DOCSTART-":
                continue
            elif len(parts) < 2 or not parts[0] or not parts[-1]:
                faults.append((number, "needs a word and its tag"))
            elif cells and len(parts) != len(cells[0]):
                faults.append((number, f"{len(parts)} columns, but the sentence's first line has {len(cells[0])}"))
            else:
                cells.append(parts)
        yield from faults
        if cells and not faults:
            yield sentence[0][0], {"tokens": [parts[0] for parts in cells], "tags": [parts[-1] for parts in cells]}


def _cells(line: str, tabs: bool) -> list[str]:
    """No other white space parts columns: a word such as "10\u00a0000" holds a no-break space."""
    return (
        [cell.strip(" ") for cell in line.rstrip("\n").split("\t")] if tabs else re.split("[ \t]+", line.strip(" \t\n"))
    )


def _is_comment(line: str | UnicodeDecodeError) -> bool:
    """A "#" may be a word too, but its tag would hold no "="."""
    return isinstance(line, str) and line.startswith("# ") and "=" in line


def _paragraphs(path: Path) -> Records:
    """Plain text: what blank lines part is a row, numbered by its first line."""
    for paragraph in _sentences(path):
        bad = [(number, not_utf8(line)) for number, line in paragraph if isinstance(line, UnicodeDecodeError)]
        yield from bad
        if not bad:
            yield paragraph[0][0], {"text": "".join(str(line) for _, line in paragraph).rstrip("\r\n")}


def _sentences(path: Path) -> Iterator[list[tuple[int, str | UnicodeDecodeError]]]:
    lines: list[tuple[int, str | UnicodeDecodeError]] = []
    for number, line in numbered_lines(path):
        if isinstance(line, UnicodeDecodeError) or line.strip():
            lines.append((number, line))
        elif lines:
            yield lines
            lines = []
    if lines:
        yield lines


def _parquet(path: Path) -> Records:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingDependency(f"{path}: Parquet needs pyarrow: pip install 'rankwise[data]'") from None
    if not path.is_file():
        raise FileNotFoundError
    try:
        number = 0
        for batch in ParquetFile(path).iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                number += 1
                yield number, without_nulls(fields)
    except (ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no readable Parquet file: {str(error).splitlines()[0]}") from None


_READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": read_table,
    ".tsv": read_table,
    ".conll": _columns,
    ".bio": _columns,
    ".parquet": _parquet,
    ".txt": _paragraphs,
}
