"""CSV and TSV files, broken ones too: every line is in a row or in a problem, under its own number."""

import csv
import random

import pytest

from rankwise.data.files import Problem, Row, read_file


def slowly(lines, delimiter=","):
    """(line, cells or None) of every row and of every line that begins none, read anew from each line on."""
    place = 0
    while place < len(lines):
        table = csv.reader(lines[place:], delimiter=delimiter, strict=True)
        try:
            cells, length = next(table), table.line_num
        except csv.Error:
            cells, length = None, 1
        if cells != []:
            yield place + 1, cells if cells and len(cells) == len(lines[0].split(delimiter)) else None
        place += length


@pytest.mark.parametrize("seed", range(200))
def test_broken_quotes_lose_no_line_and_shift_no_number(tmp_path, seed):
    draw = random.Random(seed)
    lines = ["".join(draw.choices(['"', ",", "a", "b"], [2, 2, 3, 3], k=draw.randrange(6))) for _ in range(12)]
    lines = [line + draw.choice(["\n", "\r\n"]) for line in ["first,second", *lines]]
    (tmp_path / "a.csv").write_text("".join(lines), newline="")
    found = [
        (record.line, list(record.fields.values()))
        if isinstance(record, Row)
        else (int(record.place.rpartition(":")[2]), None)
        for record in read_file(tmp_path / "a.csv")
    ]
    assert found == list(slowly([line.replace("\r", "") for line in lines]))[1:]


def test_a_line_that_was_read_twice_counts_once(tmp_path):
    lines = ["prompt,completion", '"unclosed,x', "a,b", '"c,d', "LOST,row", "more,e", '"f,g', "h,", "i,j"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    records = list(read_file(tmp_path / "a.csv"))
    assert [int(record.place.rpartition(":")[2]) for record in records] == list(range(2, 10))
    assert [record.place.rpartition(":")[2] for record in records if isinstance(record, Problem)] == ["2", "4", "7"]
