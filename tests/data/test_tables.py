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


@pytest.mark.parametrize(
    ("lines", "rows", "problems"),
    [
        # Written without quoting: two rows, or one whose cell holds a tab and a line end?
        (["text\tlabel", '"foo\t1', 'bar"\t0', "c\t1"], [3, 4], [2]),
        (["text\tlabel", '"foo', 'bar"\t0', "c\t1"], [2, 4], []),
        (["text", '"foo', 'bar"', "c"], [2, 4], []),
    ],
)
def test_lines_of_a_tsv_that_a_quote_may_join_or_not_are_a_problem(tmp_path, lines, rows, problems):
    (tmp_path / "a.tsv").write_text("\n".join(lines))
    records = list(read_file(tmp_path / "a.tsv"))
    assert [record.line for record in records if isinstance(record, Row)] == rows
    found = [record for record in records if isinstance(record, Problem)]
    assert [record.place for record in found] == [f"{tmp_path / 'a.tsv'}:{line}" for line in problems]
    assert all("each of these lines is a row by itself too" in record.text for record in found)


@pytest.mark.parametrize("top", ["sep=;\n", '\n"sep=;"\n\n'])
def test_excels_line_that_names_the_delimiter_is_read_over(tmp_path, top):
    (tmp_path / "a.csv").write_text(f"{top}prompt, in short;completion\na;b\n")
    [row] = read_file(tmp_path / "a.csv")
    assert (row.place, row.fields) == (
        f"{tmp_path / 'a.csv'}:{top.count(chr(10)) + 2}",
        {"prompt, in short": "a", "completion": "b"},
    )


def test_a_line_that_was_read_twice_counts_once(tmp_path):
    lines = ["prompt,completion", '"unclosed,x', "a,b", '"c,d', "LOST,row", "more,e", '"f,g', "h,", "i,j"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    records = list(read_file(tmp_path / "a.csv"))
    assert [int(record.place.rpartition(":")[2]) for record in records] == list(range(2, 10))
    assert [record.place.rpartition(":")[2] for record in records if isinstance(record, Problem)] == ["2", "4", "7"]
