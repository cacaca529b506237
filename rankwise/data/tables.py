"""CSV and TSV files → numbered rows."""

import csv
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from itertools import chain, dropwhile, islice
from pathlib import Path
from typing import Any

from rankwise.data.lines import not_utf8, numbered_lines
from rankwise.errors import DataError


def read_table(path: Path) -> Iterable[tuple[int, Mapping[str, Any] | str]]:
    """CSV or TSV with a header. A row's number is that of its first line; quoted cells may hold line ends."""
    undecodable: dict[int, str] = {}
    last_line = 0
    read: list[str] = []  # Lines since the last row.

    def text() -> Iterator[str]:
        nonlocal last_line
        for last_line, line in numbered_lines(path):
            if isinstance(line, UnicodeDecodeError):
                undecodable[last_line] = not_utf8(line)
                line = line.object.decode("utf-8", errors="replace")
            read.append(line)
            yield line

    blank, top = _top(path)
    lines = islice(text(), blank, None)
    delimiter = "\t" if ".tsv" in map(str.lower, path.suffixes[-2:]) else _delimiter(top)
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    old_limit = csv.field_size_limit(2**31 - 1)
    try:
        try:
            header = next(table, [])
        except csv.Error as error:
            raise DataError(f"{path}:{blank + 1}: {_not_csv(error)}") from None
        if bad := undecodable.get(blank + 1):
            raise DataError(f"{path}:{blank + 1}: {bad}")
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise DataError(f"{path}:{blank + 1}: the header names a column twice: {', '.join(map(repr, twice))}")
        before = blank
        while True:
            first = before + table.line_num + 1
            read.clear()
            try:
                cells = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                yield first, _not_csv(error)
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


def _top(path: Path) -> tuple[int, list[str]]:
    """How many blank lines a file begins with, and the two lines below them."""
    with closing(numbered_lines(path)) as lines:
        below = dropwhile(lambda entry: isinstance(entry[1], str) and not entry[1].strip(), lines)
        top = list(islice(below, 2))
    return (top[0][0] - 1 if top else 0), [line for _, line in top if isinstance(line, str)]


def _delimiter(top: list[str]) -> str:
    """What parts the cells: it cuts the first two lines into as many, or else the header into the most."""

    def fits(delimiter: str) -> tuple[bool, int]:
        try:
            cells = [len(next(csv.reader([line], delimiter=delimiter), [])) for line in top]
        except csv.Error:
            return False, 0
        return len(cells) == 2 and cells[0] == cells[1] > 1, max(cells[:1], default=0)

    return max(",;\t|", key=fits)


def _not_csv(error: csv.Error) -> str:
    if "new-line character" in str(error):
        return (
            "not CSV: a carriage return stands outside quotes without a line feed; write the file with other line ends"
        )
    return f"not CSV: {error}"
