"""CSV and TSV files → numbered rows."""

import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from rankwise.data.lines import not_utf8, numbered_lines
from rankwise.errors import DataError

Numbered = tuple[int, str | UnicodeDecodeError]


def read_table(path: Path) -> Iterable[tuple[int, Mapping[str, Any] | str]]:
    """CSV or TSV with a header. A row's number is that of its first line; quoted cells may hold line ends."""
    above, top, delimiter = _top(path)
    if not delimiter:
        delimiter = "\t" if ".tsv" in map(str.lower, path.suffixes[-2:]) else _delimiter(top)
    lines = _Lines(islice(numbered_lines(path), above, None))
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    old_limit = csv.field_size_limit(2**31 - 1)
    try:
        try:
            header = next(table, [])
        except csv.Error as error:
            raise DataError(f"{path}:{above + 1}: {_not_csv(error)}") from None
        if bad := lines.undecodable:
            raise DataError(f"{path}:{above + 1}: {bad}")
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise DataError(f"{path}:{above + 1}: the header names a column twice: {', '.join(map(repr, twice))}")
        while True:
            lines.read.clear()
            try:
                cells = next(table)
                fault = _joined(lines.read, delimiter, len(header))
            except StopIteration:
                return
            except csv.Error as error:
                cells, fault = [], _not_csv(error)
            if fault:
                yield lines.read[0][0], fault
                # A quote that never closes takes all that follows into its cell: go on below the line that it is in.
                lines.put_back_all_but_first()
                table = csv.reader(lines, delimiter=delimiter, strict=True)
                continue
            first = lines.read[0][0]
            if bad := lines.undecodable:
                yield first, bad
            elif len(cells) not in (0, len(header)):
                yield first, f"{len(cells)} cells, but the header names {len(header)} columns"
            elif cells:
                yield first, dict(zip(header, cells, strict=True))
    finally:
        csv.field_size_limit(old_limit)


class _Lines:
    """A file's lines for csv.reader, which can be put back with their numbers."""

    def __init__(self, lines: Iterator[Numbered]) -> None:
        self._new, self._again = lines, deque[Numbered]()
        self.read: list[Numbered] = []
        """Those of the row that is read."""

    def __iter__(self) -> Iterator[str]:
        while entry := self._again.popleft() if self._again else next(self._new, None):
            self.read.append(entry)
            line = entry[1]
            yield line if isinstance(line, str) else line.object.decode("utf-8", errors="replace")

    def put_back_all_but_first(self) -> None:
        self._again.extendleft(reversed(self.read[1:]))

    @property
    def undecodable(self) -> str | None:
        """What is wrong with the first line of the row that is not UTF-8."""
        return next((not_utf8(line) for _, line in self.read if isinstance(line, UnicodeDecodeError)), None)


def _joined(read: Sequence[Numbered], delimiter: str, columns: int) -> str | None:
    """What is wrong with a row of several lines in a TSV file, which may be written with quoting or without."""
    if delimiter != "\t" or len(read) < 2 or columns < 2:
        return None
    if any(str(line).count("\t") != columns - 1 for _, line in read):
        return None
    return (
        f"a quote opens here and closes on line {read[-1][0]}, but each of these lines is a row by itself too; save "
        "the table as CSV or JSONL"
    )


def _top(path: Path) -> tuple[int, list[str], str | None]:
    """How many lines stand above the header: blank ones, and Excel's "sep=;"; the header and the line below it; the
    delimiter that Excel's line names."""
    named = None
    with closing(numbered_lines(path)) as lines:
        for number, line in lines:
            text = line.strip("\r\n") if isinstance(line, str) else "?"
            if found := re.fullmatch(r'"?sep=(.)"?', text):
                named = found[1]
            elif text.strip():
                top = [line, *(below for _, below in islice(lines, 1))]
                return number - 1, [line for line in top if isinstance(line, str)], named
    return 0, [], named


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
