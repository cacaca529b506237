"""Data files → numbered rows: JSONL, JSON, CSV, TSV and CoNLL (also gzipped) and Parquet. A bad row hides no other."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

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
    reader, by_row = _reader(path)
    try:
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


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str | UnicodeDecodeError]]:
    """Numbered lines, decoded one by one so that a wrong byte spoils its own line alone. A BOM is passed over."""
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                yield number, error


def _json_lines(path: Path) -> Records:
    for number, line in _lines(path):
        if isinstance(line, UnicodeDecodeError):
            yield number, _not_utf8(line)
        elif line.strip():
            yield number, _json_object(line)


def _json_object(text: str) -> Fields | str:
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return value if isinstance(value, dict) else f"a row must be a JSON object, found {type(value).__name__}"


def parse_json(text: str) -> Any:
    """A JSON value. Raises ValueError, also for a key that stands twice and for NaN and Infinity, which JSON lacks."""
    return _DECODER.decode(text)


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


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 text (byte {error.start + 1} of the line); convert the file first"


def _holds_one_object_a_line(path: Path) -> bool:
    """Whether a .json file is JSON lines: its first line is an object by itself, and something follows."""
    try:
        lines = (line for _, line in _lines(path) if isinstance(line, UnicodeDecodeError) or line.strip())
        first, second = next(lines, ""), next(lines, None)
    except (OSError, EOFError, zlib.error):
        return False
    if second is None or not isinstance(first, str):
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _json(path: Path) -> Records:
    """The rows of a JSON list, or of the only list in a JSON object."""
    with _open(path) as file:
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
    lists = [value] if isinstance(value, list) else []
    if isinstance(value, dict):
        lists = [entry for entry in value.values() if isinstance(entry, list)]
    if len(lists) != 1:
        found = f"an object with {len(lists)} lists" if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{path} must hold a list of rows, or an object with one list; found {found}")
    for number, entry in enumerate(lists[0], start=1):
        yield number, entry if isinstance(entry, dict) else f"a row must be an object, found {type(entry).__name__}"


def _table(path: Path) -> Records:
    """CSV or TSV with a header. A row's number is that of its first line; quoted cells may hold line ends."""
    undecodable: dict[int, str] = {}
    last_line = 0
    read: list[str] = []  # Lines since the last row.

    def text() -> Iterator[str]:
        nonlocal last_line
        for last_line, line in _lines(path):
            if isinstance(line, UnicodeDecodeError):
                undecodable[last_line] = _not_utf8(line)
                line = line.object.decode("utf-8", errors="replace")
            read.append(line)
            yield line

    lines = text()
    header_line = next(lines, "")
    delimiter = "\t" if _ending(path) == ".tsv" else max(",;\t|", key=header_line.count)
    table = csv.reader(chain([header_line], lines), delimiter=delimiter, strict=True)
    old_limit = csv.field_size_limit(2**31 - 1)
    try:
        try:
            header = next(table, [])
        except csv.Error as error:
            raise DataError(f"{path}:1: not CSV: {error}") from None
        if undecodable:
            raise DataError(f"{path}:1: {undecodable[1]}")
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise DataError(f"{path}:1: the header names a column twice: {', '.join(map(repr, twice))}")
        before = 0
        while True:
            first = before + table.line_num + 1
            read.clear()
            try:
                cells = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                yield first, f"not CSV: {error}"
                # A quote that never closes takes all that follows into its cell: go on below the line that it is in.
                before, again = first, read[1:]
                table = csv.reader(chain(again, lines), delimiter=delimiter, strict=True)
                continue
            bad = next((undecodable.pop(line) for line in range(first, last_line + 1) if line in undecodable), None)
            if bad:
                yield first, bad
            elif len(cells) not in (0, len(header)):
                yield first, f"{len(cells)} cells, but the header names {len(header)} columns"
            elif cells:
                yield first, dict(zip(header, cells, strict=True))
    finally:
        csv.field_size_limit(old_limit)


def _columns(path: Path) -> Records:
    """CoNLL's columns: a word first and its tag last on each line, blank lines between sentences (Tjong Kim Sang and De
    Meulder 2003). Columns are parted by tabs, or else by blanks. A row is a sentence, numbered by its first line."""
    for sentence in _sentences(path):
        first, bad, cells = sentence[0][0], False, []
        for number, line in sentence:
            parts = [] if isinstance(line, UnicodeDecodeError) else line.strip().split("\t" if "\t" in line else None)
            if len(parts) < 2:
                bad = True
                yield number, _not_utf8(line) if isinstance(line, UnicodeDecodeError) else "needs a word and its tag"
            elif parts[0] != "-DOCSTART-":
                cells.append((parts[0], parts[-1]))
        if cells and not bad:
            yield first, {"tokens": [word for word, _ in cells], "tags": [tag for _, tag in cells]}


def _paragraphs(path: Path) -> Records:
    """Plain text: what blank lines part is a row, numbered by its first line."""
    for paragraph in _sentences(path):
        bad = [(number, _not_utf8(line)) for number, line in paragraph if isinstance(line, UnicodeDecodeError)]
        yield from bad
        if not bad:
            yield paragraph[0][0], {"text": "".join(str(line) for _, line in paragraph).rstrip("\r\n")}


def _sentences(path: Path) -> Iterator[list[tuple[int, str | UnicodeDecodeError]]]:
    lines: list[tuple[int, str | UnicodeDecodeError]] = []
    for number, line in _lines(path):
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
                yield number, fields
    except (ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no readable Parquet file: {str(error).splitlines()[0]}") from None


_READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".conll": _columns,
    ".bio": _columns,
    ".parquet": _parquet,
    ".txt": _paragraphs,
}
