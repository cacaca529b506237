"""Formats, folders, several files with weights, and the lines that messages name."""

import csv
import gzip
import io
import json
import re
import textwrap

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from rankwise.data.files import Problem, Row, read_file
from rankwise.data.rows import divide, read_prompts, read_rows, scan_rows, weighted
from rankwise.data.shapes import SHAPES, Layout
from rankwise.data.sources import Source
from rankwise.errors import ConfigError, DataError

ROWS = [
    {"prompt": "2 + 2 =", "completion": "4"},
    {"prompt": 'two\nlines, a comma and "quotes"', "completion": "ä;\t|"},
    {"prompt": "x", "completion": "y"},
]


def table(rows, delimiter):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


WRITERS = {
    "jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "ndjson": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "json": lambda rows: json.dumps(rows, indent=1),
    "object.json": lambda rows: json.dumps({"version": "1", "data": rows}),
    "lines.json": lambda rows: "\n".join(json.dumps(row) for row in rows),
    "csv": lambda rows: table(rows, ","),
    "semicolons.csv": lambda rows: table(rows, ";"),
    "tsv": lambda rows: table(rows, "\t"),
    "unknown": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
}


TALK_OF_TWO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def fields(rows):
    return [dict(row.fields) for row in rows]


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_text_format_gives_the_same_rows(tmp_path, ending, zipped):
    content = WRITERS[ending](ROWS).encode()
    path = tmp_path / f"data.{ending}{'.gz' if zipped and ending != 'unknown' else ''}"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    assert fields(read_rows(path, "causal_lm")) == ROWS


def test_parquet_gives_the_same_rows_and_leaves_out_what_it_fills_up(tmp_path):
    write_parquet(tmp_path / "data.parquet", ROWS)
    assert fields(read_rows(tmp_path / "data.parquet", "causal_lm")) == ROWS
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]
    write_parquet(tmp_path / "talk.parquet", [{"messages": talk}])
    [row] = read_rows(tmp_path / "talk.parquet", "causal_lm")
    assert row.fields["messages"][0] == talk[0]
    assert row.fields["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    assert row.place == f"{tmp_path / 'talk.parquet'}, row 1"


def test_a_tables_nulls_are_no_arguments_of_a_call(tmp_path):
    def talk(name, arguments):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return {"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}

    rows = [talk("weather", {"city": "Rome"}), talk("search", {"query": "cats", "words": [None, "a"]})]
    write_parquet(tmp_path / "data.parquet", rows)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert fields(read_rows(tmp_path / "data.parquet", "causal_lm")) == fields(
        read_rows(tmp_path / "data.jsonl", "causal_lm")
    )


@pytest.mark.parametrize("top", ["\n\n", ""])
def test_a_tables_delimiter_is_the_one_that_cuts_its_lines_alike(tmp_path, top):
    (tmp_path / "a.csv").write_text(top + 'question (short, simple);answer\n2 + 2;4\n"open\nb;c\n')
    scan = scan_rows(
        tmp_path / "a.csv", "causal_lm", Layout(None, {"prompt": "question (short, simple)", "completion": "answer"})
    )
    assert fields(scan.rows) == [{"prompt": "2 + 2", "completion": "4"}, {"prompt": "b", "completion": "c"}]
    assert [problem.place for problem in scan.problems] == [f"{tmp_path / 'a.csv'}:{len(top) + 3}"]


@pytest.mark.parametrize("row", [ROWS[0], {"messages": TALK_OF_TWO}])
def test_a_json_file_of_one_row_is_that_row(tmp_path, row):
    (tmp_path / "data.json").write_text(json.dumps(row))
    assert fields(read_rows(tmp_path / "data.json", "causal_lm")) == [row]


def test_a_row_with_lists_of_its_own_is_one_row_of_a_json_file_and_other_lists_of_objects_are_the_rows(tmp_path):
    rows = [{**dict.fromkeys(shape.needed, "x"), "more": [{"a": 1}]} for shape in SHAPES]
    rows += [
        {"question": "a", "answer": "b", "ids": [1, 2]},
        {"anchor": "a", "positive": "b", "negative": ["c"]},
        {"prompt": TALK_OF_TWO[:1], "completion": TALK_OF_TWO[1:]},
    ]
    for row in rows:
        (tmp_path / "data.json").write_text(json.dumps(row))
        assert [record.fields for record in read_file(tmp_path / "data.json") if isinstance(record, Row)] == [row]
    (tmp_path / "data.json").write_text(json.dumps({"splits": ["train"], "prompt": "shared", "data": [*ROWS, 3]}))
    *records, problem = read_file(tmp_path / "data.json")
    assert fields(records) == ROWS
    assert "row 4: a row must be an object, found int" in str(problem)


def test_a_table_names_the_line_on_which_a_bad_row_begins(tmp_path):
    lines = ["prompt,completion", '"a\nb\nc",d', "too,many,cells", "", '"e\nf",', "g,h", "bad \xff,x", "i,j", '"open']
    (tmp_path / "data.csv").write_bytes("\r\n".join(lines).encode("latin-1"))
    scan = scan_rows(tmp_path / "data.csv", "causal_lm")
    assert [row.line for row in scan.rows] == [2, 9, 11]
    assert {int(problem.place.rpartition(":")[2]): problem.text for problem in scan.problems} == {
        5: "3 cells, but the header names 2 columns",
        7: "completion is empty, so no token of this row would be trained",
        10: "not UTF-8 text (byte 5 of the line); convert the file first",
        12: "not CSV: unexpected end of data",
    }


def test_lists_in_a_table_are_json_text(tmp_path):
    talk = [{"role": "user", "content": "a, b"}, {"role": "assistant", "content": "c"}]
    (tmp_path / "data.csv").write_text(table([{"messages": json.dumps(talk)}], ","))
    [row] = read_rows(tmp_path / "data.csv", "causal_lm")
    assert row.fields["messages"] == talk


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.json", b'{"a": [1], "b": [2]}', "an object with 2 lists"),
        ("data.json", b"3", "must hold a list of rows, or an object with one list; found int"),
        ("data.json", b'[\n{"prompt": "a"},\n{"prompt" 3}]', "data.json:3: not JSON"),
        ("data.json", b'[\n{"prompt": "\xff"}]', "data.json:2 is not UTF-8"),
        ("data.csv", b"prompt,prompt\na,b", "names a column twice: 'prompt'"),
        ("data.csv", b"prompt,\xff\na,b", "data.csv:1: not UTF-8"),
        ("data.csv", b"prompt,comp\rletion\na,b", "data.csv:1: not CSV"),
        ("data.parquet", b"PAR1 nothing", "is no readable Parquet file"),
        ("data.jsonl.gz", gzip.compress(b'{"prompt": "a"}' * 99, mtime=0)[:-20], "is damaged"),
        ("data.jsonl.gz", b'{"prompt": "a"}', "is damaged: Not a gzipped file"),
        ("data.csv", b"", "holds no row"),
        ("data.csv", b"prompt,completion\ra,b\rc,d", "a carriage return stands outside quotes"),
        (
            "data.jsonl",
            b'[\n{"prompt": "a"}\n]',
            "problems: 3\n.*a file that is one JSON value of many lines is named .json",
        ),
        ("data.jsonl", gzip.compress(b"{}", mtime=0), "is gzipped; give its name the ending .gz"),
        ("data.jsonl.zst", b"\x28\xb5\x2f\xfd...", "is compressed with zstandard; unpack it, or pack it with gzip"),
        ("data.jsonl", b"BZh91AY", "is compressed with bzip2"),
        ("data.xlsx", b"PK\x03\x04...", "save the sheet as CSV"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name, "causal_lm")


def test_rows_come_one_at_a_time(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n{\n" for row in ROWS))
    reading = read_file(path)
    first, second = next(reading), next(reading)
    assert isinstance(first, Row)
    assert isinstance(second, Problem)
    assert (first.line, second.place) == (1, f"{path}:2")


def test_a_folder_is_read_whole_in_the_order_of_names(tmp_path):
    (tmp_path / "more").mkdir()
    for name, row in zip(("a.jsonl", "b.csv", "more/c.json"), ROWS, strict=True):
        (tmp_path / name).write_text(WRITERS[name.rpartition(".")[2]]([row]))
    (tmp_path / "README.md").write_text("not data")
    assert fields(read_rows(tmp_path, "causal_lm")) == ROWS


def test_a_folder_with_held_out_files_is_not_trained_on_by_mistake(tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(WRITERS["jsonl"](ROWS))
    with pytest.raises(DataError, match=r"named as held-out data \(test.jsonl\). Name the files: --data .*train.jsonl"):
        read_rows(tmp_path, "causal_lm")


@pytest.mark.parametrize("name", ["test/x.jsonl", "test_data.jsonl", "squad-dev.jsonl", "squad_TEST.jsonl"])
def test_held_out_files_are_known_by_any_word_of_their_path(tmp_path, name):
    for own in ("train/latest.jsonl", name):
        (tmp_path / own).parent.mkdir(exist_ok=True)
        (tmp_path / own).write_text(WRITERS["jsonl"](ROWS))
    with pytest.raises(DataError, match="named as held-out data"):
        read_rows(tmp_path, "causal_lm")


def test_a_folder_is_read_through_its_links_and_each_folder_once(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    (data / "own").mkdir(parents=True)
    other.mkdir()
    write(data / "own" / "a.jsonl", ROWS[0])
    write(other / "b.jsonl", ROWS[1])
    (data / "sub").symlink_to(other)
    (data / "twice").symlink_to("own")
    (other / "round").symlink_to(data)
    assert fields(read_rows(data, "causal_lm")) == ROWS[:2]


def test_what_a_folder_holds_and_cannot_be_read_is_named(tmp_path):
    write(tmp_path / "a.jsonl", ROWS[0])
    (tmp_path / "gone").symlink_to("nowhere")
    for name in ("b.jsonl.zst", "c.csv.bz2", ".d.jsonl.xz", "notes.zip"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError) as error:
        read_rows(tmp_path, "causal_lm")
    lines = str(error.value).splitlines()
    assert [line.split()[1].removeprefix(f"{tmp_path}/") for line in lines[1:]] == ["b.jsonl.zst", "c.csv.bz2", "gone"]


def test_hidden_files_of_a_folder_are_no_data(tmp_path):
    for name in ("train.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl", "._train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(WRITERS["jsonl"](ROWS))
    assert fields(read_rows(tmp_path, "causal_lm")) == ROWS


def test_a_folder_of_arrow_files_and_an_address_are_told(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    with pytest.raises(DataError, match=r"was written by save_to_disk; write Parquet"):
        read_rows(tmp_path, "causal_lm")
    with pytest.raises(DataError, match=r"is an address, which rankwise does not read"):
        read_rows("https://example.org/a.jsonl", "causal_lm")


def test_several_files_keep_their_places_and_weights(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.csv"
    first.write_text(WRITERS["jsonl"](ROWS[:1]))
    second.write_text(WRITERS["csv"](ROWS[1:]))
    rows = read_rows([first, f"{second}:2"], "causal_lm")
    assert fields(rows) == ROWS
    assert [(row.place, row.weight) for row in rows] == [(f"{first}:1", 1), (f"{second}:2", 2), (f"{second}:4", 2)]
    assert [row.place for row in weighted(rows, 0)] == [rows[index].place for index in (0, 1, 1, 2, 2)]


def test_a_weight_between_two_whole_numbers_draws_rows_by_the_seed(tmp_path):
    (tmp_path / "data.jsonl").write_text(WRITERS["jsonl"](ROWS[:1] * 1000))
    rows = read_rows([f"{tmp_path / 'data.jsonl'}:1.25"], "causal_lm")
    many = weighted(rows, 0)
    assert 1200 < len(many) < 1300
    assert {row.line for row in many} == set(range(1, 1001))
    assert weighted(rows, 0) == many != weighted(rows, 1)


def test_a_weight_that_draws_no_row_is_told_and_of_each_label_one_is_drawn(tmp_path):
    path = write(tmp_path / "a.jsonl", *ROWS)
    with pytest.raises(DataError, match=r"weight 0.0001 none of the 3 training rows .* raise it to 0.33"):
        divide([f"{path}:0.0001"], None, "causal_lm", None)
    rows = [{"text": f"text {n}", "label": "rare" if n < 2 else "ab"[n % 2]} for n in range(42)]
    path = write(tmp_path / "b.jsonl", *rows)
    for seed in range(30):
        division = divide([f"{path}:0.3"], None, "seq_cls", None, 0.3, seed)
        assert {row.fields["label"] for row in division.train} == {"rare", "a", "b"}
        assert len(division.train) < 25


def test_a_name_with_a_colon_is_a_weight_only_if_no_file_has_it(tmp_path):
    path = tmp_path / "data.jsonl:2"
    assert Source.parse(str(path)) == Source(str(tmp_path / "data.jsonl"), 2.0)
    path.write_text("")
    assert Source.parse(str(path)) == Source(str(path), 1.0)
    (tmp_path / "folder").mkdir()
    assert Source.parse(f"{tmp_path / 'folder'}:1e1") == Source(str(tmp_path / "folder"), 10.0)
    for name in ("a.csv", "owner/a.jsonl.gz", tmp_path / "folder"):
        for weight in ("0", "1.2.3", "-1", "nan", "inf", "2x", ""):
            with pytest.raises(DataError, match="must be a number above 0"):
                Source.parse(f"{name}:{weight}")
    for entry in ("owner/data:main", "https://example.org/a.jsonl", r"C:\data\a.jsonl"):
        assert Source.parse(entry) == Source(entry)


def test_without_a_network_a_hub_name_is_a_clear_error():
    with pytest.raises(DataError, match=r"no file or folder someone/some-data, and as a data set of the .* hub"):
        read_rows("someone/some-data", "causal_lm")
    with pytest.raises(DataError, match=r"no such data file: data/train.jsonl"):
        read_rows("data/train.jsonl", "causal_lm")


def test_a_hub_data_set_gives_the_rows_of_its_split(monkeypatch):
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows(
        ["someone/some-data", "someone/some-data:main@train[:10%]", "someone/some-data@test:2"], "causal_lm"
    )
    assert fields(rows) == ROWS * 3
    assert asked == [
        ("someone/some-data", None, "train"),
        ("someone/some-data", "main", "train[:10%]"),
        ("someone/some-data", None, "test"),
    ]
    assert rows[-1].place == "someone/some-data@test, row 3"


SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SYSTEM = {"role": "system", "content": "Be terse."}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("row", "shape", "standard"),
    [
        ({"instruction": "a", "output": "b"}, "alpaca", {"prompt": "a", "completion": "b"}),
        ({"instruction": "a", "input": "x", "output": "b"}, "alpaca", {"prompt": "a\nx", "completion": "b"}),
        ({"instruction": "a", "input": "", "output": "b", "text": "t"}, "alpaca", {"prompt": "a", "completion": "b"}),
        (
            {"instruction": "hi", "output": "hello", "system": "Be terse."},
            "alpaca",
            {"messages": [SYSTEM, *TALK]},
        ),
        ({"conversations": SHARED}, "sharegpt", {"messages": TALK}),
        ({"conversations": TALK}, "sharegpt", {"messages": TALK}),
        ({"conversations": SHARED, "system": "Be terse."}, "sharegpt", {"messages": [SYSTEM, *TALK]}),
        ({"conversations": [SYSTEM, *TALK], "system": "Be terse."}, "sharegpt", {"messages": [SYSTEM, *TALK]}),
        (
            {
                "conversations": [
                    SHARED[0],
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "2"},
                    SHARED[1],
                ],
                "tools": '[{"name": "f", "parameters": {}}]',
            },
            "sharegpt",
            {
                "messages": [
                    TALK[0],
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
                    },
                    {"role": "tool", "content": "2"},
                    TALK[1],
                ],
                "tools": [TOOL],
            },
        ),
        ({"messages": TALK, "tools": [TOOL]}, "messages", {"messages": TALK, "tools": [TOOL]}),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, TALK[1]]},
            "messages",
            {"messages": TALK},
        ),
        (
            {
                "functions": [{"name": "f", "parameters": {}}],
                "messages": [
                    TALK[0],
                    {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
                    {"role": "function", "name": "f", "content": "2"},
                    TALK[1],
                ],
            },
            "messages",
            {
                "messages": [
                    TALK[0],
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
                    },
                    {"role": "tool", "name": "f", "content": "2"},
                    TALK[1],
                ],
                "tools": [TOOL],
            },
        ),
        (
            {"prompt": [*TALK, TALK[0]], "completion": [TALK[1]]},
            "prompt/completion",
            {"messages": [TALK[0], {**TALK[1], "weight": 0}, TALK[0], TALK[1]]},
        ),
        (
            {"conversations": [SHARED[0], {**SHARED[1], "weight": 0}, *SHARED]},
            "sharegpt",
            {"messages": [TALK[0], {**TALK[1], "weight": 0}, *TALK]},
        ),
        ({"text": "Once upon a time", "id": 3}, "text", {"text": "Once upon a time"}),
    ],
)
def test_every_shape_is_found_and_brought_to_standard_fields(tmp_path, row, shape, standard):
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    scan = scan_rows(tmp_path / "data.jsonl", "causal_lm")
    assert scan.problems == []
    assert scan.found.shape is not None
    assert scan.found.shape.name == shape
    assert fields(scan.rows) == [standard]


def test_a_conversation_with_two_system_messages_says_so(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"conversations": [SYSTEM, *TALK], "system": "Be friendly."}))
    [problem] = scan_rows(tmp_path / "data.jsonl", "causal_lm").problems
    assert "two system messages; keep one of them" in str(problem)


def write(path, *rows):
    path.write_text(WRITERS["jsonl"](rows))
    return path


def test_the_shape_is_that_of_most_rows_and_not_of_the_first(tmp_path):
    scan = scan_rows(write(tmp_path / "data.jsonl", {"messages": TALK}, *ROWS), "causal_lm")
    assert scan.found.shape is not None
    assert scan.found.shape.name == "prompt/completion"
    assert [problem.place for problem in scan.problems] == [f"{tmp_path / 'data.jsonl'}:1"]


def test_fields_of_nulls_make_no_shape_unless_the_row_has_no_other(tmp_path):
    rows = [{"prompt": None, "completion": None, "messages": TALK}] * 2
    scan = scan_rows(write(tmp_path / "a.jsonl", *rows), "causal_lm")
    assert (scan.problems, fields(scan.rows)) == ([], [{"messages": TALK}] * 2)
    scan = scan_rows(write(tmp_path / "b.jsonl", {"q": "a", "text": "b", "label": None}), "causal_lm")
    assert fields(scan.rows) == [{"text": "b"}]
    layout = Layout(None, {"completion": "a"})
    [problem] = scan_rows(write(tmp_path / "c.jsonl", {"prompt": "a", "a": None}), "causal_lm", layout).problems
    assert problem.text == "completion must be a string, found null"


def test_blanks_around_a_label_make_no_other_label(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a", "label": " x"}, {"text": "b", "label": "x\n"})
    assert {row.fields["label"] for row in read_rows(path, "seq_cls")} == {"x"}
    path = write(tmp_path / "b.jsonl", {"text": "a", "labels": ["x ", 1]}, {"text": "b", "labels": ["x", " x"]})
    scan = scan_rows(path, "seq_cls")
    assert fields(scan.rows) == [{"text": "a", "labels": ["x", "1"]}]
    assert "labels holds 'x' twice" in str(scan.problems[0])
    path = write(tmp_path / "c.jsonl", {"tokens": ["a", "b"], "tags": [" O", "B-x "]})
    assert fields(read_rows(path, "token_cls")) == [{"tokens": ["a", "b"], "tags": ["O", "B-x"]}]


def test_what_a_row_holds_beside_its_shape_is_said(tmp_path):
    row = {"instruction": "a", "input": "", "output": "b", "text": "a b", "id": 7}
    summary = scan_rows(write(tmp_path / "data.jsonl", row), "causal_lm").summary()
    assert summary.endswith("alpaca, 1 rows; fits text too (--format chooses); not used: text, id")


def test_a_renamed_column_no_longer_counts_under_its_old_name(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []})
    scan = scan_rows(path, "seq_cls", Layout(None, {"labels": "label"}))
    assert fields(scan.rows) == [{"text": "a", "labels": ["x", "y"]}, {"text": "b", "labels": []}]
    path = write(tmp_path / "b.jsonl", {"instruction": "a", "output": "b"})
    with pytest.raises(DataError, match=r"needs the fields prompt \+ completion or"):
        read_rows(path, "causal_lm", Layout(None, {"prompt": "instruction"}))


def test_a_format_and_columns_win_over_what_is_found(tmp_path):
    row = {"prompt": "wrong", "question": "a", "answer": "b", "text": "c"}
    path = write(tmp_path / "data.jsonl", row)
    layout = Layout.parse(None, ["prompt=question", "completion=answer"])
    assert fields(read_rows(path, "causal_lm", layout)) == [{"prompt": "a", "completion": "b"}]
    assert fields(read_rows(path, "causal_lm", Layout.parse("text", []))) == [{"text": "c"}]
    with pytest.raises(DataError, match=r"--columns names columns that no row has: 'anwser' \(nearest: 'answer'"):
        read_rows(path, "causal_lm", Layout.parse(None, ["prompt=question", "completion=anwser"]))
    with pytest.raises(ConfigError, match="found 'promt=question' \\(nearest: 'prompt'"):
        Layout.parse(None, ["promt=question"])
    with pytest.raises(ConfigError, match="--format text does not fit --task seq_cls, which takes text/label"):
        read_rows(path, "seq_cls", Layout.parse("text", []))


def test_columns_need_not_be_in_every_file(tmp_path):
    """Not in another file of --data, whose own names count, and not in --eval-data."""
    layout = Layout.parse(None, ["prompt=question", "completion=answer"])
    own = write(tmp_path / "own.jsonl", {"question": "a", "answer": "b"})
    plain = write(tmp_path / "plain.jsonl", {"prompt": "c", "completion": "d"})
    talk = write(
        tmp_path / "talk.jsonl", {"messages": [{"role": "user", "content": "f"}, {"role": "assistant", "content": "e"}]}
    )
    assert fields(read_rows([own, plain], "causal_lm", layout)) == [
        {"prompt": "a", "completion": "b"},
        {"prompt": "c", "completion": "d"},
    ]
    for other in (plain, talk):
        division = divide(own, other, "causal_lm", layout)
        assert not division.problems
        assert len(division.held_out) == 1
    with pytest.raises(DataError, match="--columns names columns that no row has: 'question'"):
        divide(plain, own, "causal_lm", layout)


def test_rows_that_ask_what_an_evaluation_row_asks_are_left_out_of_training(tmp_path):
    train = write(tmp_path / "train.jsonl", {"prompt": "a  b\n", "completion": "1"}, *ROWS)
    test = write(tmp_path / "test.jsonl", {"prompt": "a b", "completion": "2"}, {"prompt": "new", "completion": "3"})
    division = divide(train, test, "causal_lm", None)
    assert fields(division.train) == ROWS
    assert len(division.held_out) == 2
    assert division.lines()[-1] == (
        f"left out of training: 1 rows that ask what an evaluation row asks (the first: {train}:1)"
    )
    with pytest.raises(DataError, match=r"every row of .*test.jsonl asks what a row of the evaluation data asks"):
        divide(test, test, "causal_lm", None)


def test_a_split_keeps_questions_together_that_differ_in_white_space_and_in_their_answers(tmp_path):
    blanks = (" ", "  ", "\n", " \t")
    rows = [{"prompt": f"{n % 40}{blanks[n // 40]}?", "completion": str(n)} for n in range(120)]
    division = divide(write(tmp_path / "data.jsonl", *rows), None, "causal_lm", None, 0.2, seed=1)
    sides = [{"".join(row.fields["prompt"].split()) for row in side} for side in (division.train, division.held_out)]
    assert sides[0].isdisjoint(sides[1])
    assert len(division.train) + len(division.held_out) == 120
    assert 24 <= len(division.held_out) <= 27


def test_conversations_with_the_same_question_and_other_answers_are_the_same_question(tmp_path):
    talks = [{"messages": [TALK[0], {"role": "assistant", "content": str(n)}]} for n in range(3)]
    more = [{"role": "user", "content": "more"}, TALK[1]]
    longer, other = {"messages": [*TALK, *more]}, {"messages": [*more, *TALK]}
    train, test = write(tmp_path / "a.jsonl", *talks, longer, other), write(tmp_path / "b.jsonl", {"messages": TALK})
    assert fields(divide(train, test, "causal_lm", None).train) == [other]


def test_a_prompt_and_a_conversation_of_it_ask_the_same(tmp_path):
    prompt = {"prompt": TALK[0]["content"], "completion": "x"}
    train = write(tmp_path / "a.jsonl", prompt, {"prompt": "another", "completion": "x"})
    division = divide(train, write(tmp_path / "b.jsonl", {"messages": TALK}), "causal_lm", None)
    assert fields(division.left_out) == [prompt]


def test_a_split_parts_no_conversation_from_one_that_goes_on_from_it(tmp_path):
    turns = [[{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": f"a{n}"}] for n in range(30)]
    more = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turn} for turn in turns] + [{"messages": [*turn, *more]} for turn in turns]
    division = divide(write(tmp_path / "a.jsonl", *rows), None, "causal_lm", None, 0.3, seed=1)
    first = [{row.fields["messages"][0]["content"] for row in side} for side in (division.train, division.held_out)]
    assert len(division.held_out) >= 18
    assert first[0].isdisjoint(first[1])


def test_a_split_leaves_a_row_of_each_label_to_train_on_and_no_group_swamps_it(tmp_path):
    rows = [{"text": f"text {n}", "label": f"rare{n}" if n < 20 else "often"} for n in range(60)]
    for seed in range(5):
        division = divide(write(tmp_path / "a.jsonl", *rows), None, "seq_cls", None, 0.2, seed)
        assert {row.fields["label"] for row in division.held_out} == {"often"}
    alike = [{"prompt": "same" if n < 10 else str(n), "completion": str(n)} for n in range(13)]
    for seed in range(5):
        division = divide(write(tmp_path / "b.jsonl", *alike), None, "causal_lm", None, 0.3, seed)
        assert 1 <= len(division.held_out) <= 3


def test_a_file_that_is_named_twice_is_told(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(DataError, match="named twice"):
        divide([path, path], None, "causal_lm", None)
    with pytest.raises(DataError, match="named twice"):
        divide([path, tmp_path], None, "causal_lm", None)


@pytest.mark.parametrize(
    "row",
    [
        '{"text": "a", "label": "\\ud800"}',
        '{"tokens": ["a"], "tags": ["B-\\udfff"]}',
        '{"prompt": "a", "completion": "b", "more": {"\\ud800": 1}}',
        '{"prompt": "a", "completion": "b", "more": ' + "[" * 600 + "]" * 600 + "}",
    ],
)
def test_what_no_task_can_use_is_told_in_any_field(tmp_path, row):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{row}\n", encoding="utf-8")
    [problem] = read_file(path)
    assert "surrogate" in str(problem) or "nested" in str(problem)


def test_a_quote_that_never_closes_hides_no_later_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\na,b\nc,"d\ne,f\ng\nh,i\n')
    records = [r.fields["prompt"] if isinstance(r, Row) else str(r).partition(":")[2] for r in read_file(path)]
    assert [str(record)[:9] for record in records] == ["a", "3: not CS", "e", "5: 1 cell", "h"]


def test_a_weight_repeats_training_rows_and_never_evaluation_rows(tmp_path):
    rows = [{"prompt": str(n), "completion": "x"} for n in range(20)]
    path = write(tmp_path / "data.jsonl", *rows)
    division = divide([f"{path}:3"], None, "causal_lm", None, 0.25, seed=0)
    assert len(division.held_out) == 5
    assert len(division.train) == 45
    asked = [row.fields["prompt"] for row in division.train]
    assert {asked.count(prompt) for prompt in asked} == {3}


def test_every_example_of_the_documentation_has_the_shape_that_it_stands_under(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    shapes = page[page.index("## Shapes") : page.index("## What is trained")]
    seen = []
    for part in shapes.split("\n**")[1:]:
        name = part[: part.index("**")]
        for example in re.findall(r"(?:^    .*\n)+", part, flags=re.MULTILINE):
            path = tmp_path / ("data.jsonl" if "{" in example else "data.conll")
            # What is indented further goes on with a row.
            path.write_text(textwrap.dedent(example).replace("\n ", " "))
            scan = scan_rows(path, next(shape.task for shape in SHAPES if shape.name == name))
            assert scan.problems == []
            assert scan.found.shape is not None
            seen.append(scan.found.shape.name)
            assert seen[-1] == name
    assert {*seen} == {shape.name for shape in SHAPES}


def test_prompts_may_lie_in_columns_of_other_names(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "a", "answer": "b"}, {"question": "c"})
    rows = read_prompts(path, Layout(None, {"prompt": "question", "completion": "answer"}))
    assert fields(rows) == [{"prompt": "a", "completion": "b"}, {"prompt": "c"}]


def test_prompts_of_every_shape_can_be_asked(tmp_path):
    rows = [
        {"prompt": "a"},
        {"prompt": "a", "completion": "b"},
        {"messages": TALK[:1]},
        {"conversations": SHARED[:1]},
        {"instruction": "a", "input": "x"},
        {"instruction": "a", "output": "b"},
        {"text": "Once upon"},
    ]
    assert fields(read_prompts(write(tmp_path / "data.jsonl", *rows))) == [
        {"prompt": "a"},
        {"prompt": "a", "completion": "b"},
        {"messages": TALK[:1]},
        {"messages": TALK[:1]},
        {"prompt": "a\nx"},
        {"prompt": "a", "completion": "b"},
        {"text": "Once upon"},
    ]


def test_files_of_different_shapes_train_together(tmp_path):
    talk = {"messages": TALK}
    one = write(tmp_path / "a.jsonl", {"prompt": "1", "completion": "x"}, {"prompt": "2", "completion": "y"})
    other = write(tmp_path / "b.jsonl", talk, {"question": "no"})
    scan = scan_rows([one, other], "causal_lm")
    assert [tuple(row.fields) for row in scan.rows] == [("prompt", "completion")] * 2 + [("messages",)]
    assert "prompt/completion and messages" in scan.summary()
    [problem] = scan.problems
    assert "needs the fields messages" in str(problem)


def test_a_row_of_another_shape_in_a_file_is_told_where_to_go(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"prompt": str(n), "completion": "x"} for n in range(3)], {"messages": TALK})
    [problem] = scan_rows(path, "causal_lm").problems
    assert "files of their own" in str(problem)


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.txt", "one\ntwo\n\nthree\n"), ("a.csv", 'text\n"one\ntwo"\nthree\n')],
)
def test_windows_line_ends_are_no_part_of_a_text(tmp_path, name, text):
    (tmp_path / name).write_text(text, newline="\r\n")
    assert fields(read_rows(tmp_path / name, "causal_lm")) == [{"text": "one\ntwo"}, {"text": "three"}]


def test_only_blanks_and_tabs_part_the_columns_of_conll(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("10\u00a0000  O\nParis \tB-city \n\nNew York\tNNP\tB-city\n-DOCSTART-\n\n10\u00a0000\tCD\tO \r\n")
    assert [record.fields for record in read_file(path) if isinstance(record, Row)] == [
        {"tokens": ["10\u00a0000", "Paris"], "tags": ["O", "B-city"]},
        {"tokens": ["New York"], "tags": ["B-city"]},
        {"tokens": ["10\u00a0000"], "tags": ["O"]},
    ]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("hat\tVBZ\t", "needs a word and its tag"),
        ("\tVBZ\tO", "needs a word and its tag"),
        ("hat", "needs a word and its tag"),
        ("hat\tVBZ", "2 columns, but the sentence's first line has 3"),
        ("hat VBZ O", "needs a word and its tag"),
    ],
)
def test_a_line_of_conll_without_its_tag_is_a_problem_and_not_tagged_by_another_column(tmp_path, line, text):
    path = tmp_path / "a.conll"
    path.write_text(f"Paris\tNNP\tB-city\n{line}\n\nRome\tNNP\tB-city\n")
    problem, row = read_file(path)
    assert str(problem) == f"{path}:2: {text}"
    assert isinstance(row, Row)
    path.write_text(f"Paris NNP B-city\n{line.replace(chr(9), ' ')}\n")
    assert all(isinstance(record, Problem) for record in read_file(path)) == (line != "hat VBZ O")


def test_plain_text_is_read_by_its_paragraphs_and_in_a_folder_left_alone(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"One line\nand another.\n\n\nA second\xc3\xa9.\r\n \nbad \xff\n")
    first, second, bad = read_file(path)
    assert [(row.line, row.fields["text"]) for row in (first, second)] == [
        (1, "One line\nand another."),
        (5, "A secondé."),
    ]
    assert "a.txt" not in str(bad)
    assert "7: not UTF-8" in str(bad)
    write(tmp_path / "rows.jsonl", {"text": "a row"})
    assert fields(read_rows(tmp_path, "causal_lm")) == [{"text": "a row"}]
