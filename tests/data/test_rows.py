import json
import random

import pytest
from conftest import ROOT

from rankwise.data.rows import divide, read_prompts, read_rows, split_rows
from rankwise.data.shapes import Layout
from rankwise.errors import DataError


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


GOOD = {"prompt": "2 + 2 =", "completion": "4"}
TALK = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def test_the_three_shapes_are_read(tmp_path):
    for task, row in (("causal_lm", GOOD), ("causal_lm", TALK), ("seq_cls", {"text": "a b", "label": 3})):
        rows = read_rows(write(tmp_path / "data.jsonl", row, "", row), task)
        assert [(row.line, dict(row.fields)) for row in rows] == [(1, row), (3, row)]


@pytest.mark.parametrize(
    ("rows", "task", "message"),
    [
        ([], "causal_lm", "holds no row"),
        ([GOOD, '{"prompt": "x", '], "causal_lm", r"data.jsonl:2: not JSON"),
        ([GOOD, "[1]"], "causal_lm", r"data.jsonl:2: a row must be a JSON object, found a list"),
        ([{"prompt": "x", "completoin": "y"}], "causal_lm", r"found 'prompt', 'completoin' \('completoin' is perhaps"),
        ([GOOD, TALK], "causal_lm", r"data.jsonl:2: needs the fields prompt \+ completion, found 'messages'"),
        ([{"text": "x", "label": "y"}], "causal_lm", "fits --task seq_cls"),
        ([GOOD], "seq_cls", "fits --task causal_lm"),
        ([{"prompt": "x", "completion": "  "}], "causal_lm", "no token of this row would be trained"),
        ([{"prompt": "x", "completion": 4}], "causal_lm", "completion must be a string, found int"),
        ([{"text": "", "label": "y"}], "seq_cls", "text must be a string that is not empty"),
        ([{"text": "x", "label": None}], "seq_cls", "label must be a string or a whole number"),
        ([{"messages": []}], "causal_lm", "messages must be a list that is not empty"),
        ([{"messages": [{"role": "human", "content": "x"}]}], "causal_lm", r"messages\[0\]\.role must be one of"),
        ([{"messages": [{"role": "user", "content": "x"}]}], "causal_lm", "no assistant message"),
        (
            [{"question": "x", "answer": "y"}],
            "causal_lm",
            r"found 'question', 'answer' \(other names of columns: --col",
        ),
        (
            [{"text": "x", "labels": [0, 1, 1]}],
            "seq_cls",
            "holds '1' twice; it is a list of the text's labels, not a 0",
        ),
        (
            [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "train": False}]}],
            "causal_lm",
            r'messages\[1\].train is not read; a message that is not to be trained has "weight": 0',
        ),
        (
            [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "train": "false"}]}],
            "causal_lm",
            r"messages\[1\].train is not read; .* It may be true, or left out, found 'false'",
        ),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, rows, task, message):
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path / "data.jsonl", *rows), task)


def test_all_bad_rows_are_in_one_message(tmp_path):
    with pytest.raises(DataError) as error:
        read_rows(write(tmp_path / "data.jsonl", GOOD, "{", {"prompt": 1, "completion": 2}, "]"), "causal_lm")
    assert "problems: 4" in str(error.value)
    assert all(f"data.jsonl:{line}:" in str(error.value) for line in (2, 3, 4))


def test_files_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(DataError, match="no such data file"):
        read_rows(tmp_path / "nowhere.jsonl", "causal_lm")
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path, "causal_lm")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_rows(tmp_path / "latin.jsonl", "seq_cls")


def test_a_split_keeps_all_rows_and_no_held_out_row_is_trained(tmp_path):
    data = [{"prompt": str(n % 40), "completion": "x"} for n in range(100)]
    rows = read_rows(write(tmp_path / "data.jsonl", *data), "causal_lm")
    train, held_out = split_rows(rows, 0.2, seed=3)
    assert sorted(row.line for row in (*train, *held_out)) == list(range(1, 101))
    assert {row.fields["prompt"] for row in train}.isdisjoint(row.fields["prompt"] for row in held_out)
    assert 20 <= len(held_out) <= 23
    assert split_rows(rows, 0.2, seed=3) == (train, held_out)
    assert split_rows(rows, 0.2, seed=4) != (train, held_out)
    with pytest.raises(DataError, match="cannot be split"):
        split_rows(rows[:1], 0.2, seed=3)


def talk(*turns, **fields):
    """Turns of the user and the assistant by turns; a dict stands for itself."""
    roles = ("user", "assistant")
    messages = [
        turn if isinstance(turn, dict) else {"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)
    ]
    return {"messages": messages, **fields}


def called(name, **arguments):
    call = {"id": name, "type": "function", "function": {"name": "w", "arguments": json.dumps(arguments)}}
    result = {"role": "tool", "tool_call_id": name, "content": "r"}
    return talk("q", {"role": "assistant", "tool_calls": [call]}, result, "done")


TOOL, SAME_TOOL = {"name": "w", "description": "d"}, {"description": "d", "name": "w"}


@pytest.mark.parametrize(
    ("train", "held_out", "left_out"),
    [
        (talk("u", "a"), talk("u", "a", "v", "b"), True),
        (talk("u", "a", "v", "b"), talk("u", "a"), True),
        (talk("u", "a", "v", "b"), talk("u", "a", "w", "c"), False),
        (talk("u", "a", tools=[TOOL]), talk("u", "a", tools=[{"type": "function", "function": SAME_TOOL}]), True),
        (talk("u", "a", tools=[TOOL]), talk("u", "a"), False),
        (called("one", x=1, y=2), called("two", y=2, x=1), True),
        (called("one", x=1), called("one", x=2), False),
        (talk(talk("", "hello")["messages"][1]), talk(talk("", "good day")["messages"][1]), False),
    ],
)
def test_training_rows_that_ask_what_is_held_out_are_left_out(train, held_out, left_out, tmp_path):
    paths = write(tmp_path / "train.jsonl", train, talk("other", "z")), write(tmp_path / "test.jsonl", held_out)
    division = divide(*paths, "causal_lm", Layout())
    assert [row.line for row in division.left_out] == [1] * left_out


def test_a_split_of_conversations_that_go_on_does_not_depend_on_their_order(tmp_path):
    talk = [{"role": role, "content": f"{role} {step}"} for step in range(4) for role in ("user", "assistant")]
    rows = [
        {"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "x"}, *talk[: 2 * steps]]}
        for n in range(30)
        for steps in range(4)
    ]
    splits = []
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        sides = split_rows(read_rows(write(tmp_path / "data.jsonl", *rows), "causal_lm"), 0.3, seed=0)
        splits.append([{json.dumps(row.fields) for row in side} for side in sides])
    assert all(split == splits[0] for split in splits)


def test_prompts_need_no_completion(tmp_path):
    assert len(read_prompts(write(tmp_path / "data.jsonl", {"prompt": "x"}, GOOD))) == 2
    with pytest.raises(DataError, match="needs a field 'prompt'"):
        read_prompts(write(tmp_path / "data.jsonl", {"promt": "x"}))


def test_the_shipped_examples_have_the_promised_sizes():
    for name, task, sizes in (
        ("text_to_sql", "causal_lm", (1000, 100, 100)),
        ("intents", "seq_cls", (7500, 3000, 4500)),
    ):
        files = [ROOT / "examples" / name / f"{part}.jsonl" for part in ("train", "valid", "test")]
        assert tuple(len(read_rows(file, task)) for file in files) == sizes
        assert (ROOT / "examples" / name / "LICENSE").is_file()
