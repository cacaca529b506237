"""Reading JSONL files of the three shapes that rankwise trains on."""

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import DataError, listing, nearest

SHAPES: dict[str, tuple[str, ...]] = {
    "prompt/completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text/label": ("text", "label"),
}
TASK_SHAPES = {"causal_lm": ("prompt/completion", "messages"), "seq_cls": ("text/label",)}
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """One line of a data file."""

    file: Path
    line: int
    """Counted from 1."""
    fields: Mapping[str, Any]

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


def read_rows(path: Path, task: str) -> list[Row]:
    """All rows of a JSONL file; blank lines are passed over.

    Every row must have the shape of the first one, and a shape that `task` ("causal_lm" or "seq_cls") trains on.
    Raises DataError with file and line of every bad line.
    """
    rows, problems = _parse(path)
    if not rows and not problems:
        raise DataError(f"{path} holds no row; rankwise needs one JSON object a line")
    shape = next((shape for row in rows if (shape := _shape_of(row.fields, task))), None)
    for row in rows:
        problems += [f"{row.place}: {problem}" for problem in _problems(row.fields, shape, task)]
    if problems:
        raise DataError(f"{path} cannot be used; problems: {len(problems)}\n{listing(problems)}")
    return rows


def read_prompts(path: Path) -> list[Row]:
    """All rows of a JSONL file of prompts: a `prompt`, or `messages`; a `completion` may be there and is kept.

    Raises DataError with file and line of every bad line.
    """
    rows, problems = _parse(path)
    for row in rows:
        if "messages" in row.fields:
            problems += [f"{row.place}: {problem}" for problem in _message_problems(row.fields["messages"])]
        elif not isinstance(row.fields.get("prompt"), str):
            found = ", ".join(map(repr, row.fields)) or "none"
            problems.append(f"{row.place}: needs a field 'prompt' that is a string, found the fields {found}")
    if not rows and not problems:
        raise DataError(f"{path} holds no prompt; rankwise needs one JSON object a line")
    if problems:
        raise DataError(f"{path} cannot be used; problems: {len(problems)}\n{listing(problems)}")
    return rows


def _parse(path: Path) -> tuple[list[Row], list[str]]:
    rows, problems = [], []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"no such data file: {path}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}")
            continue
        if isinstance(value, dict):
            rows.append(Row(path, number, value))
        else:
            problems.append(f"{path}:{number}: a row must be a JSON object, found {type(value).__name__}")
    return rows, problems


def _shape_of(fields: Mapping[str, Any], task: str) -> str | None:
    return next((shape for shape in TASK_SHAPES[task] if all(name in fields for name in SHAPES[shape])), None)


def _problems(fields: Mapping[str, Any], shape: str | None, task: str) -> Iterable[str]:
    if shape is None or any(name not in fields for name in SHAPES[shape]):
        yield _missing(fields, shape, task)
    elif shape == "messages":
        yield from _message_problems(fields["messages"])
    elif shape == "text/label":
        if not isinstance(fields["text"], str) or not fields["text"].strip():
            yield f"text must be a string that is not empty, found {fields['text']!r}"
        if isinstance(fields["label"], bool) or not isinstance(fields["label"], str | int) or fields["label"] == "":
            yield f"label must be a string or a whole number, found {fields['label']!r}"
    else:
        for name in SHAPES[shape]:
            if not isinstance(fields[name], str):
                yield f"{name} must be a string, found {type(fields[name]).__name__}"
        if isinstance(fields["completion"], str) and not fields["completion"].strip():
            yield "completion is empty, so no token of this row would be trained"


def _missing(fields: Mapping[str, Any], shape: str | None, task: str) -> str:
    wanted = [shape] if shape else TASK_SHAPES[task]
    needed = " or ".join(" + ".join(SHAPES[name]) for name in wanted)
    hints = [
        f"{found!r} is perhaps {name!r}"
        for shape_name in wanted
        for name in SHAPES[shape_name]
        for found in fields
        if name not in fields and found not in SHAPES[shape_name] and nearest(found, [name], most=1)
    ]
    other = next((t for t in TASK_SHAPES if t != task and _shape_of(fields, t)), None)
    if other:
        hints.append(f"this row fits --task {other}")
    hint = f" ({'; '.join(hints)})" if hints else ""
    return f"needs the fields {needed}, found {', '.join(map(repr, fields)) or 'none'}{hint}"


def _message_problems(messages: Any) -> Iterable[str]:
    if not isinstance(messages, list) or not messages:
        yield "messages must be a list that is not empty"
        return
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            yield f"messages[{index}] must be an object, found {type(message).__name__}"
        elif message.get("role") not in ROLES:
            yield f"messages[{index}].role must be one of {', '.join(ROLES)}, found {message.get('role')!r}"
        elif not isinstance(message.get("content"), str):
            yield f"messages[{index}].content must be a string, found {type(message.get('content')).__name__}"
    assistants = [m for m in messages if isinstance(m, dict) and m.get("role") == "assistant"]
    if not any(isinstance(m.get("content"), str) and m["content"].strip() for m in assistants):
        yield "no assistant message with content, so no token of this row would be trained"


def split_rows(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Cut rows into (train, evaluation), about `fraction` of them for evaluation, drawn by `seed`.

    Rows with the same content stay on one side, so that no evaluation row is also trained.
    Raises DataError if either side would be empty.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row.fields, sort_keys=True), []).append(row)
    keys = sorted(groups)
    random.Random(seed).shuffle(keys)
    held_out: list[Row] = []
    kept: list[Row] = []
    for key in keys:
        (held_out if len(held_out) < fraction * len(rows) else kept).extend(groups[key])
    if not kept or not held_out:
        raise DataError(f"{len(rows)} rows cannot be split with --eval-fraction {fraction}; give --eval-data, or 0")
    return sorted(kept, key=lambda row: row.line), sorted(held_out, key=lambda row: row.line)
