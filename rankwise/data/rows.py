"""Reading data of any shape, all its problems at once, and dividing it into training and evaluation rows."""

import json
import random
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from math import floor
from pathlib import Path
from typing import Any, Literal

from rankwise.data.files import Problem, Row
from rankwise.data.shapes import ASKING, Found, Layout, detect, standard_fields, standard_prompt, telling_names
from rankwise.data.sources import check_unweighted, read_sources
from rankwise.data.stored import Chosen, Stored
from rankwise.errors import DataError, listing

Data = Path | str | Sequence[Path | str]
"""A file, a folder or a hub data set, or several of them; see `rankwise.data.sources`."""
HELD_OUT_SHARE, MAX_HELD_OUT_ROWS = 0.1, 600
"""If nobody says how many rows are held out, it is this share of them, but at most so many."""
MOST_PROBLEMS = 20
"""Problems that a message shows in full."""


@dataclass(frozen=True)
class Scan:
    """What was found in the data."""

    entries: tuple[str, ...]
    rows: Sequence[Row]
    """The rows that nothing is wrong with, in their standard fields; like all rows of a file, not in memory."""
    problems: list[Problem]
    found: Found
    mixed: tuple[str, ...] = ()
    """The shapes, where files have different ones."""

    def summary(self) -> str:
        """The shape and what was passed over, in a line."""
        shape = self.found.shape.name if self.found.shape else "no shape"
        parts = [f"{', '.join(self.entries)}: {' and '.join(self.mixed) or shape}, {len(self.rows):,} rows"]
        if self.found.fits_too and not self.mixed:
            parts.append(f"fits {', '.join(self.found.fits_too)} too (--format chooses)")
        if self.found.unused:
            parts.append(f"not used: {', '.join(name or 'a column without a name' for name in self.found.unused)}")
        return "; ".join(parts)


def scan_rows(data: Data, task: str, layout: Layout | None = None) -> Scan:
    """Read everything; every row must have the shape that most rows have (or `layout` says).

    Where rows ask and answer, each file may have a shape of its own.
    Raises DataError only if a file as a whole cannot be read, or if there is no row at all.
    """
    layout, entries = layout or Layout(), _entries(data)
    records = Stored(read_sources(entries))
    if not records:
        raise DataError(f"{', '.join(entries)} holds no row")
    kinds: dict[Path, Counter[tuple[str, ...]]] = {}
    for record in records:
        if isinstance(record, Row):
            kinds.setdefault(record.file, Counter())[telling_names(record.fields, task, layout)] += 1
    found = detect(sum(kinds.values(), Counter()), task, layout)
    shapes = dict.fromkeys(kinds, found.shape)
    if task in ASKING and not layout.format:
        own = {file: _found_in_file(names, task, layout) for file, names in kinds.items()}
        shapes = {file: own[file].shape or found.shape for file in kinds}
        unused = dict.fromkeys(name for file in kinds for name in own[file].unused)
        found = replace(found, unused=tuple(unused))
    problems: list[Problem] = []

    def standard() -> Iterator[Row]:
        for record in records:
            if isinstance(record, Problem):
                problems.append(record)
                continue
            fields, faults = standard_fields(layout.rename(record.fields), shapes[record.file], task)
            problems.extend(Problem(record.place, fault) for fault in faults)
            if not faults:
                yield _with(record, fields)

    names = tuple(dict.fromkeys(shape.name for shape in shapes.values() if shape))
    return Scan(entries, Stored(standard()), problems, found, names if len(names) > 1 else ())


def _found_in_file(kinds: Counter[tuple[str, ...]], task: str, layout: Layout) -> Found:
    # The columns that --columns names need not be in every file.
    renamed = {tuple(layout.rename(dict.fromkeys(names))): count for names, count in kinds.items()}
    return detect(renamed, task, Layout())


def read_rows(data: Data, task: str, layout: Layout | None = None) -> Sequence[Row]:
    """All rows, in the standard fields of their shape (`rankwise.data.shapes`).

    Raises DataError with file and line of every bad row.
    """
    scan = scan_rows(data, task, layout)
    refuse(scan.entries, scan.problems)
    return scan.rows


def read_prompts(data: Data, layout: Layout | None = None) -> list[Row]:
    """All rows of a file of prompts of any shape, in columns of its own names; answers may be there and are kept.

    Raises DataError with file and line of every bad row.
    """
    layout, entries, rows, problems = layout or Layout(), _entries(data), [], []
    for record in read_sources(entries):
        if isinstance(record, Problem):
            problems.append(record)
            continue
        fields, faults = standard_prompt(layout.rename(record.fields))
        problems += [Problem(record.place, fault) for fault in faults]
        rows.append(_with(record, fields))
    if not rows and not problems:
        raise DataError(f"{', '.join(entries)} holds no prompt")
    refuse(entries, problems)
    return rows


def refuse(entries: Sequence[str], problems: Sequence[Problem]) -> None:
    """Raise DataError if there are problems, with the first of them and the count of all."""
    if problems:
        shown = listing([str(problem) for problem in problems], MOST_PROBLEMS)
        if len(problems) > MOST_PROBLEMS:
            shown += "\nrankwise data --all-problems shows them all"
        raise DataError(f"{', '.join(entries)} cannot be used; problems: {len(problems)}\n{shown}")


def _entries(data: Data) -> tuple[str, ...]:
    return (str(data),) if isinstance(data, str | Path) else tuple(map(str, data))


def _with(row: Row, fields: dict) -> Row:
    return Row(row.file, row.line, fields, row.by_row, row.weight)


def question_keys(row: Row) -> list[str]:
    """What a row asks, with all white space alike, the last time at the end: rows that end alike ask the same.

    The prompt, or the conversation before each of its assistant messages, where ids of tool calls and the order of keys
    make no difference; the text, the words to tag, or the anchor of a pair. A prompt asks the same as a conversation of
    that one user message.
    """
    fields = row.fields
    if "tokens" in fields:
        return [" ".join(fields["tokens"])]
    if "prompt" in fields:
        return [_asked([{"role": "user", "content": fields["prompt"]}])]
    if "messages" not in fields:
        return [" ".join(next(fields[name] for name in ("anchor", "text") if name in fields).split())]
    messages, tools = fields["messages"], _sorted(fields.get("tools"))
    # Before an opening by the assistant nothing is asked.
    answers = [index for index, message in enumerate(messages) if index and message["role"] == "assistant"]
    return [_asked(messages[:index], tools) for index in answers or [len(messages)]]


def _asked(messages: Sequence[Mapping[str, Any]], tools: str = "") -> str:
    parts = [tools]
    for message in messages:
        calls = _sorted([call["function"] for call in message.get("tool_calls", ())])
        parts.append(f"{message['role']}: {message['content']} {calls}")
    return " ".join(" ".join(parts).split())


def _sorted(values: Any) -> str:
    return json.dumps(values, sort_keys=True, default=str) if values else ""


def split_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[Sequence[Row], Sequence[Row]]:
    """Cut rows into (train, evaluation), about `fraction` of them for evaluation, drawn by `seed`.

    Rows that ask the same stay on one side, and so do a conversation and one that goes on from it, so that no
    evaluation row is also trained; the last row with a label stays in training. The order of the rows does not matter.
    Raises DataError if either side would be empty.
    """
    keys = _linked(rows)
    counts, labels = Counter(keys), _labels_by_key(rows, keys)
    left = Counter(label for own in labels.values() for label in own)
    ordered = sorted(counts)
    random.Random(seed).shuffle(ordered)
    evaluated: set[int] = set()
    room = fraction * len(rows)
    for key in ordered:
        if room <= 0:
            break
        own = labels.get(key, set())
        if counts[key] <= max(2 * room, 1) and all(left[label] > 1 for label in own):
            evaluated.add(key)
            room -= counts[key]
            left.subtract(own)
    kept, held_out = _parted(rows, [key in evaluated for key in keys])
    if not kept or not held_out:
        raise DataError(f"{len(rows)} rows cannot be split with --eval-fraction {fraction}; give --eval-data, or 0")
    return kept, held_out


def usual_fraction(rows: Sequence[Row]) -> float:
    """The share of the rows that is held out, if nobody says how many."""
    return min(HELD_OUT_SHARE, MAX_HELD_OUT_ROWS / len(rows))


def why_no_split(rows: Sequence[Row]) -> str | None:
    """Why a run could not hold out a share of the rows; None if it can."""
    try:
        split_rows(rows, usual_fraction(rows), seed=0)
    except DataError as error:
        return str(error)
    return None


def without_overlap(train: Sequence[Row], held_out: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
    """(the other training rows, those that ask what an evaluation row asks).

    A conversation does so too that goes on from an evaluation row, or that one goes on from; a common beginning alone
    is nothing that both ask.
    """
    ends: set[int] = set()
    passed: set[int] = set()
    for row in held_out:
        keys = list(map(_hash, question_keys(row)))
        ends.add(keys[-1])
        passed.update(keys)

    def asks_the_same(row: Row) -> bool:
        keys = list(map(_hash, question_keys(row)))
        return keys[-1] in passed or not ends.isdisjoint(keys)

    return _parted(train, list(map(asks_the_same, train)))


def _hash(question: str) -> int:
    """8 bytes: in a million rows two questions share a hash once in 37 million times."""
    return int.from_bytes(blake2b(question.encode(), digest_size=8).digest(), "big")


def _linked(rows: Sequence[Row]) -> "array[int]":
    """For each row a number that it shares with the rows that must stay on its side of a split."""
    keys = array("Q", (_hash(question_keys(row)[-1]) for row in rows))
    present, leader = set(keys), {}

    def lead(key: int) -> int:
        while key in leader:
            key = leader[key]
        return key

    for key, row in zip(keys, rows, strict=True):
        for earlier in map(_hash, question_keys(row)[:-1]):
            if earlier in present and lead(earlier) != lead(key):
                # The smallest key of all leads, in whatever order the rows come.
                smaller, larger = sorted((lead(earlier), lead(key)))
                leader[larger] = smaller
    return array("Q", map(lead, keys)) if leader else keys


def _labels_by_key(rows: Sequence[Row], keys: Sequence[int]) -> dict[int, set[str]]:
    """The labels (or tags) of the rows of each key; empty for rows without."""
    found: dict[int, set[str]] = {}
    if rows and _labels(rows[0]) is not None:
        for key, row in zip(keys, rows, strict=True):
            found.setdefault(key, set()).update(_labels(row) or ())
    return found


def _labels(row: Row) -> Collection[Any] | None:
    """The labels (or tags) of a row; None if it has no field for them."""
    label, several = row.fields.get("label"), row.fields.get("labels", row.fields.get("tags"))
    return several if label is None else [label]


def _parted(rows: Sequence[Row], chosen: Sequence[bool]) -> tuple[Sequence[Row], Sequence[Row]]:
    """(rows that are not chosen, rows that are)."""
    others, own = (
        Chosen(rows, [place for place, is_chosen in enumerate(chosen) if is_chosen == side]) for side in (False, True)
    )
    return others, own


def weighted(rows: Sequence[Row], seed: int) -> Sequence[Row]:
    """The rows as often as their weights say; of a weight's fraction, the rows that `seed` draws come once more.

    A row of each label is drawn, so that no label is unknown to the classifier. Raises DataError if no row is drawn.
    """
    draw = random.Random(seed)
    times = array("q", (floor(row.weight) + (draw.random() < row.weight % 1) for row in rows))
    if 0 in times and _labels(rows[0]) is not None:
        drawn = {label for row, count in zip(rows, times, strict=True) if count for label in _labels(row) or ()}
        for place, row in enumerate(rows):
            if not drawn.issuperset(_labels(row) or ()):
                times[place] = 1
                drawn.update(_labels(row) or ())
    if rows and not any(times):
        weights = ", ".join(f"{weight:g}" for weight in sorted({row.weight for row in rows}))
        raise DataError(
            f"at the weight {weights} none of the {len(rows)} training rows is drawn; a weight says how often a row is "
            f"seen in an epoch: raise it to {1 / len(rows):.2g} or more, or leave it out"
        )
    return Chosen(rows, (place for place, count in enumerate(times) for _ in range(count)))


@dataclass(frozen=True)
class Division:
    """Training and evaluation rows, none of which asks what a row of the other side asks."""

    scans: tuple[Scan, ...]
    """Of the training data, and of the evaluation data where there is some."""
    train: Sequence[Row]
    held_out: Sequence[Row]
    left_out: Sequence[Row]
    """Training rows that ask what a given evaluation row asks (`without_overlap`)."""

    @property
    def problems(self) -> list[Problem]:
        return [problem for scan in self.scans for problem in scan.problems]

    def refuse_problems(self) -> None:
        """Raise DataError if anything is wrong with a row of either side."""
        refuse([entry for scan in self.scans if scan.problems for entry in scan.entries], self.problems)

    def lines(self) -> list[str]:
        """What was read, and what was left out and why."""
        lines = [scan.summary() for scan in self.scans]
        if self.left_out:
            lines.append(
                f"left out of training: {len(self.left_out)} rows that ask what an evaluation row asks "
                f"(the first: {self.left_out[0].place})"
            )
        return lines


def divide(
    data: Data,
    eval_data: Data | None,
    task: str,
    layout: Layout,
    eval_fraction: float | Literal["auto"] = 0.0,
    seed: int = 0,
) -> Division:
    """Read the data and divide it: `eval_data` is held out where it is given, else `eval_fraction` of the rows.

    "auto" is a tenth, but at most 600 rows.

    While anything is wrong with a row (`problems`), nothing is split off.
    Raises DataError as `scan_rows` and `split_rows` do, and if no training row is left.
    """
    scan = scan_rows(data, task, layout)
    if eval_data:
        check_unweighted(_entries(eval_data))
        # Held-out rows may be of another file's shape, as files of --data may.
        layout = replace(layout or Layout(), may_lack_columns=True)
        if scan.found.shape and scan.found.shape.task != "causal_lm":
            # A classifier's loss and scores need what it was trained on: one label, several, or tags.
            layout = replace(layout, format=scan.found.shape.name)
        held_out = scan_rows(eval_data, task, layout)
        train, left_out = without_overlap(scan.rows, held_out.rows)
        if left_out and not train:
            raise DataError(f"every row of {', '.join(scan.entries)} asks what a row of the evaluation data asks too")
        return Division((scan, held_out), weighted(train, seed), held_out.rows, left_out)
    if not eval_fraction or scan.problems:
        return Division((scan,), weighted(scan.rows, seed), [], [])
    fraction = usual_fraction(scan.rows) if eval_fraction == "auto" else eval_fraction
    train, held_out = split_rows(scan.rows, fraction, seed)
    return Division((scan,), weighted(train, seed), held_out, [])
