"""Files of 1,000 rows with every kind of damage that we could think of: all of it is found, in one pass, no more."""

import json
import random

import pytest

from rankwise.data.report import report_on
from rankwise.data.rows import divide, scan_rows
from rankwise.errors import DataError


def talk(*turns, **fields):
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return {"messages": [{"role": roles[role], "content": content} for role, content in turns], **fields}


GOOD = {
    "prompt/completion": {"prompt": "2 + 2 =", "completion": "4"},
    "messages": talk(("u", "hi"), ("a", "hello"), ("u", "2 + 2 ="), ("a", "4")),
    "text/label": {"text": "wake me at seven", "label": "alarm"},
}
LONG = "word " * 400
"""More tokens than the tests allow."""


def with_message(**fields):
    """A good conversation whose first answer is changed."""
    row = talk(("u", "hi"), ("a", "hello"), ("u", "2 + 2 ="), ("a", "4"))
    row["messages"][1] = {name: value for name, value in {**row["messages"][1], **fields}.items() if value != "GONE"}
    return row


def call(**function):
    return with_message(tool_calls=[{"id": "1", "type": "function", "function": function}])


def spoilt_text(good):
    """Damage to the line itself, whatever the shape."""
    line = json.dumps(good)
    key = next(iter(good))
    return {
        "cut off": line[:-5],
        "trailing comma": line[:-1] + ",}",
        "single quotes": str(good),
        "no JSON at all": "What is two and two? Four.",
        "unquoted key": line.replace(f'"{key}"', key, 1),
        "two rows on one line": line + line,
        "a list": "[" + line + "]",
        "a number": "42",
        "null": "null",
        "a string": json.dumps(line),
        "an empty object": "{}",
        "not UTF-8": line[:-3].encode() + b"\xe9" + line[-3:].encode(),
        "half a character": line.encode()[:-3] + "é".encode()[:1] + line.encode()[-3:],
        "a NUL byte": line[:20].encode() + b"\0" + line[20:].encode(),
        "a raw control character": line[:-4] + "\x1b" + line[-4:],
        "a key twice": line[:-1] + f', "{key}": "other"}}',
        "NaN": line[:-1] + ', "score": NaN}',
        "brackets without end": "[" * 100_000,
    }


SPOILT_FIELDS = {
    "prompt/completion": {
        "completion missing": {"prompt": "a"},
        "completion misspelt": {"prompt": "a", "completoin": "b"},
        "prompt misspelt": {"promt": "a", "completion": "b"},
        "completion empty": {"prompt": "a", "completion": ""},
        "completion blank": {"prompt": "a", "completion": " \n\t"},
        "completion null": {"prompt": "a", "completion": None},
        "completion a number": {"prompt": "a", "completion": 4},
        "completion nested": {"prompt": "a", "completion": {"text": "b"}},
        "completion a list": {"prompt": "a", "completion": ["b"]},
        "prompt null": {"prompt": None, "completion": "b"},
        "prompt empty": {"prompt": "", "completion": "b"},
        "prompt true": {"prompt": True, "completion": "b"},
        "an escaped NUL": {"prompt": "a\0b", "completion": "b"},
        "half of a surrogate pair": {"prompt": "a", "completion": "\ud83d"},
        "another shape": GOOD["messages"],
        "too long": {"prompt": LONG, "completion": "b"},
    },
    "messages": {
        "no messages": {"messages": []},
        "messages null": {"messages": None},
        "messages a text": {"messages": "user: hi"},
        "messages misspelt": {"mesages": GOOD["messages"]["messages"]},
        "a message is a text": {"messages": ["hi", "hello"]},
        "role unknown": with_message(role="robot"),
        "role null": with_message(role=None),
        "role missing": with_message(role="GONE"),
        "role in capitals": with_message(role="Assistant"),
        "content missing": with_message(content="GONE"),
        "content null": with_message(content=None),
        "content a number": with_message(content=7),
        "content an image": with_message(content=[{"type": "image_url", "image_url": {"url": "x"}}]),
        "content with a NUL": with_message(content="a\0"),
        "one answer empty": with_message(content=""),
        "one answer blank": with_message(content="  \n"),
        "no answer": talk(("u", "hi")),
        "system in the middle": talk(("u", "hi"), ("a", "x"), ("s", "Be terse."), ("u", "y"), ("a", "z")),
        "a tool's result first": talk(("t", "42"), ("a", "x")),
        "a tool's result after a question": talk(("u", "hi"), ("t", "42"), ("a", "x")),
        "tool calls a text": with_message(tool_calls="search"),
        "a tool call without a name": call(arguments="{}"),
        "arguments that are no JSON": call(name="search", arguments='{"q": '),
        "arguments that are a list": call(name="search", arguments="[1]"),
        "tools a number": {**GOOD["messages"], "tools": 3},
        "a tool without a name": {**GOOD["messages"], "tools": [{"type": "function", "function": {}}]},
        "a weight of 2": with_message(weight=2),
        "too long": talk(("u", "hi"), ("a", LONG)),
        "a key twice in a message": json.dumps(GOOD["messages"]).replace("{", '{"x": 1, "x": 2, ', 2),
    },
    "text/label": {
        "label missing": {"text": "a"},
        "label misspelt": {"text": "a", "lable": "alarm"},
        "label null": {"text": "a", "label": None},
        "label true": {"text": "a", "label": True},
        "label a fraction": {"text": "a", "label": 0.5},
        "label empty": {"text": "a", "label": ""},
        "label blank": {"text": "a", "label": " "},
        "several labels": {"text": "a", "label": ["alarm", "timer"]},
        "text empty": {"text": "", "label": "alarm"},
        "text blank": {"text": "\n", "label": "alarm"},
        "text null": {"text": None, "label": "alarm"},
        "text a list": {"text": ["a", "b"], "label": "alarm"},
        "text missing": {"label": "alarm"},
        "half of a surrogate pair": {"text": "\udc00", "label": "alarm"},
        "too long": {"text": LONG, "label": "alarm"},
    },
}


def harmless(good):
    """Lines that look odd and are right."""
    line = json.dumps(good).encode()
    return {
        "a blank line": b"",
        "a line of blanks": b" \t ",
        "a Windows line end": line + b"\r",
        "blanks around it": b"  " + line + b" \t",
        "another field": json.dumps({**good, "id": None}).encode(),
        "a line separator in a string": line[:-1] + b', "note": "a\xe2\x80\xa8b"}',
        "an escaped pair": line[:-1] + b', "note": "\\ud83d\\ude42"}',
    }


def a_damaged_file(path, shape):
    """Write 1,000 lines; returns {line: kind of damage} and how many rows are good."""
    good = GOOD[shape]
    spoilt = {**spoilt_text(good), **SPOILT_FIELDS[shape]}
    odd = harmless(good)
    lines = [json.dumps({**good, "id": number}).encode() for number in range(999)]
    places = random.Random(0).sample(range(1, 999), len(spoilt) + len(odd))
    damage = {}
    for place, (name, content) in zip(places, spoilt.items(), strict=False):
        content = content if isinstance(content, str | bytes) else json.dumps(content)
        lines[place] = content if isinstance(content, bytes) else content.encode()
        damage[place + 1] = name
    for place, content in zip(places[len(spoilt) :], odd.values(), strict=True):
        lines[place] = content
    damage[1000] = "the last line cut off"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n" + json.dumps(good).encode()[:-4])
    blank = sum(not line.strip() for line in lines)
    return damage, 1000 - blank - len(damage)


@pytest.mark.parametrize("shape", GOOD)
def test_every_damaged_row_is_found_with_its_line_in_one_pass_and_no_other_row(tmp_path, tokenizer, shape):
    path = tmp_path / "data.jsonl"
    damage, good_rows = a_damaged_file(path, shape)
    task = "seq_cls" if shape == "text/label" else "causal_lm"
    report = report_on(divide(path, None, task, None), task, tokenizer, 256, "error", "completion")
    found = {int(problem.place.removeprefix(f"{path}:")): problem.text for problem in report.problems}
    assert {line: damage[line] for line in damage.keys() - found.keys()} == {}, "not found"
    assert {line: found[line] for line in found.keys() - damage.keys()} == {}, "found where nothing is wrong"
    assert not report.ready
    # A row that is too long is read and reported.
    assert report.train.rows == good_rows + 1


def test_there_are_more_than_forty_kinds_of_damage():
    assert all(len({*spoilt_text(GOOD[shape]), *SPOILT_FIELDS[shape]}) > 30 for shape in GOOD)
    assert len({*spoilt_text(GOOD["messages"]), *(kind for kinds in SPOILT_FIELDS.values() for kind in kinds)}) > 70


def test_a_file_without_damage_is_read_to_its_last_row_whatever_its_line_ends(tmp_path, tokenizer):
    rows = [{"prompt": f"ä {number}", "completion": "ö\n"} for number in range(50)]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    scan = scan_rows(tmp_path / "data.jsonl", "causal_lm")
    assert scan.problems == []
    assert [(row.line, dict(row.fields)) for row in scan.rows] == list(enumerate(rows, start=1))


def test_labels_that_training_lacks_are_found_row_by_row(tmp_path, tokenizer):
    train = [{"text": f"a {number}", "label": "xy"[number % 2]} for number in range(4)]
    test = [{"text": f"b {number}", "label": "xz"[number % 2]} for number in range(4)]
    for name, rows in (("train", train), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    division = divide(tmp_path / "train.jsonl", tmp_path / "test.jsonl", "seq_cls", None)
    report = report_on(division, "seq_cls", tokenizer, 256, "error", "completion")
    assert [problem.place for problem in report.problems] == [f"{tmp_path / 'test.jsonl'}:{line}" for line in (2, 4)]
    assert report.labels == {"x": 2, "y": 2}


def test_a_message_shows_twenty_problems_and_counts_them_all(tmp_path):
    (tmp_path / "data.jsonl").write_text("{\n" * 50)
    with pytest.raises(DataError) as error:
        divide(tmp_path / "data.jsonl", None, "causal_lm", None).refuse_problems()
    assert "problems: 50" in str(error.value)
    assert str(error.value).count("data.jsonl:") == 20
    assert "and 30 more" in str(error.value)
