"""A file's length costs no memory and no time before the first step, and nothing wrong in it goes unseen."""

import json
import random
import tracemalloc

import pytest

from rankwise import finetune
from rankwise.data.lazy import LazyExamples
from rankwise.data.rows import divide, read_rows
from rankwise.data.stored import IN_MEMORY, Chosen, Stored
from rankwise.errors import DataError
from rankwise.train import batches
from rankwise.train.batches import planned_steps
from rankwise.train.config import TrainConfig


def write(path, count, row=lambda number: {"prompt": f"question {number}?", "completion": f"answer {number}."}):
    path.write_text("".join(f"{json.dumps(row(number))}\n" for number in range(count)))
    return path


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 100])
def test_stored_items_are_the_items(count):
    items = [("a" * number, number) for number in range(count)]
    stored = Stored(iter(items))
    assert len(stored) == count
    assert list(stored) == items
    assert stored == items
    places = random.Random(0).choices(range(-count, count), k=50) if count else []
    assert [stored[place] for place in places] == [items[place] for place in places]
    assert stored[10:50:3] == items[10:50:3]
    assert stored != [*items, "one more"]
    with pytest.raises(IndexError):
        stored[count]


def test_a_choice_has_its_items_in_its_order():
    stored = Stored("abcdef")
    chosen = Chosen(stored, [5, 0, 0, 3])
    assert list(chosen) == list("faad")
    assert list(chosen[1:3]) == list("aa")
    assert chosen[-1] == "d"


def test_items_beyond_what_fits_into_memory_are_read_from_the_file():
    items = [bytes([number]) * (IN_MEMORY // 8) for number in range(20)]
    stored = Stored(items)
    assert [stored[place] for place in (19, 3)] == [items[place] for place in (19, 3)]
    assert list(stored) == items


def test_a_file_is_read_and_divided_in_memory_that_does_not_grow_with_it(tmp_path):
    """Beside 8 bytes here and there for a row, of about 300 bytes each."""

    def peak(count: int) -> int:
        padding = "some more words of a question " * 8
        path = write(
            tmp_path / f"{count}.jsonl", count, lambda number: {"prompt": f"{number} {padding}", "completion": "yes"}
        )
        tracemalloc.start()
        try:
            division = divide(path, None, "causal_lm", None, 0.1)
            assert len(division.train) + len(division.held_out) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1_000)
    small, large = peak(60_000), peak(120_000)
    assert (large - small) / 60_000 < 250


class Tokenizing:
    """examples_of for a LazyExamples of numbers: counts what it is asked, and refuses some."""

    def __init__(self, refused=()):
        self.refused, self.made = refused, []

    def __call__(self, rows):
        bad = [row for row in rows if row in self.refused]
        if bad:
            raise DataError(f"refused: {bad}")
        self.made += rows
        return [f"example {row}" for row in rows]


def test_lazy_examples_are_made_when_they_are_needed_and_kept_on_request():
    made = Tokenizing()
    examples = LazyExamples(range(1000), made)
    assert (len(examples), made.made) == (1000, [])
    assert examples.keep([5, 3]) == ["example 5", "example 3"]
    assert (examples[3], examples[7], examples[-1]) == ("example 3", "example 7", "example 999")
    assert made.made == [5, 3, 7, 999]


@pytest.mark.parametrize("act", [lambda e: e[400], lambda e: e.keep([400]), lambda e: e.look_through(60)])
def test_an_unfit_row_is_named_with_all_others(act):
    with pytest.raises(DataError, match=r"refused: \[400, 900\]"):
        act(LazyExamples(range(1000), Tokenizing((400, 900))))


def test_looking_through_ends_and_sees_every_row_once():
    made = Tokenizing()
    examples = LazyExamples(range(1000), made)
    examples.look_through(0)
    assert not made.made
    examples.look_through(60)
    examples.look_through(60)
    assert made.made == list(range(1000))


UNFIT = 12, 21
"""Rows that do not run in the first steps."""


def look_at_few_rows_first(monkeypatch):
    monkeypatch.setattr(batches, "ROWS_AT_FIRST", 8)
    monkeypatch.setattr(finetune, "ROWS_AT_FIRST", 8)


def settings(folder, data, out, **changes):
    return TrainConfig(
        model=str(folder), data=(data,), out=out, r=2, batch_size=4, eval_fraction=0, save_steps=100, **changes
    )


def test_a_large_file_trains_to_the_bytes_of_a_small_one(tiny_llama_folder, tmp_path, monkeypatch):
    data = write(tmp_path / "data.jsonl", 30)
    finetune.finetune(settings(tiny_llama_folder, data, tmp_path / "whole", epochs=2))
    look_at_few_rows_first(monkeypatch)
    made = []
    tokenise = finetune.examples_for
    monkeypatch.setattr(
        finetune, "examples_for", lambda task, rows, *rest: made.append(len(rows)) or tokenise(task, rows, *rest)
    )
    finetune.finetune(settings(tiny_llama_folder, data, tmp_path / "lazy", epochs=2))
    assert made[0] == 8  # Before the first step; the rest one by one, or a part at a time.
    files = [tmp_path / name / "adapter/adapter_model.safetensors" for name in ("whole", "lazy")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_row_that_turns_out_to_be_unfit_ends_the_run_and_what_was_done_stays(
    tiny_llama_folder, tmp_path, monkeypatch
):
    look_at_few_rows_first(monkeypatch)

    def row(number):
        return {"prompt": "word " * (400 if number in UNFIT else 1) + str(number), "completion": "yes"}

    data = write(tmp_path / "data.jsonl", 30, row)
    config = settings(tiny_llama_folder, data, tmp_path / "run", max_length=100)
    rows = read_rows(data, "causal_lm")
    first = planned_steps(rows, config).beginning.distinct
    assert not set(UNFIT) & set(first)
    with pytest.raises(DataError, match=r"(?s)2 of 30 rows are longer than 100 tokens.*jsonl:13: .*jsonl:22: "):
        finetune.finetune(config)
    assert list((tmp_path / "run/checkpoints").glob("step-*"))
