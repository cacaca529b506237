"""Which rows go into which step."""

import random
from itertools import chain
from pathlib import Path

import pytest

from rankwise import TrainConfig
from rankwise.data.examples import TextExample
from rankwise.data.labelled import LabelExample
from rankwise.errors import ConfigError, DataError
from rankwise.train.batches import families, planned_steps

ROWS = [LabelExample(tuple(range(1 + n % 4)), 0, f"data:{n}") for n in range(10)]


def settings(**changes):
    size = {} if "batch_tokens" in changes else {"batch_size": 4}
    return TrainConfig(model="m", data=Path("d"), out=Path("o"), **{"task": "seq_cls", **size, **changes})


def rows_of(step):
    return [*chain(*step)]


def test_every_epoch_sees_every_row_once_in_another_order():
    steps = planned_steps(ROWS, settings(epochs=2))
    first, second = rows_of(chain(*steps[:3])), rows_of(chain(*steps[3:]))
    assert [len(rows_of(step)) for step in steps] == [4, 4, 2] * 2
    assert sorted(first, key=id) == sorted(second, key=id) == sorted(ROWS, key=id)
    assert first != second


def test_the_plan_follows_from_settings_and_seed_alone():
    plans = [planned_steps(ROWS, settings(epochs=3, seed=seed)) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
    assert planned_steps(ROWS, settings(max_steps=5, seed=1)) == plans[0][:5]


@pytest.mark.parametrize(
    ("rows", "changes", "steps"),
    [
        (10, {"epochs": 2}, 6),
        (10, {"epochs": 0.5}, 2),
        (10, {"epochs": 0.0001}, 1),
        (10, {"epochs": 2, "max_steps": 3}, 3),
        (10, {"epochs": 2.1, "batch_size": 1}, 21),
        (10, {"epochs": 2, "accumulate": 2}, 4),
        (1, {"max_steps": 7, "accumulate": 3}, 7),
    ],
)
def test_steps_count_whole_epochs_unless_max_steps_is_given(rows, changes, steps):
    assert len(planned_steps(ROWS[:rows], settings(**changes))) == steps


def test_accumulation_makes_steps_of_the_same_batches_that_end_with_the_epoch():
    plain = planned_steps(ROWS, settings(batch_size=2, epochs=2))
    steps = planned_steps(ROWS, settings(batch_size=2, epochs=2, accumulate=3))
    assert [len(step) for step in steps] == [3, 2, 3, 2]
    assert [*chain(*steps)] == [*chain(*plain)]


def test_a_token_budget_takes_as_many_rows_as_fit_and_no_row_is_lost():
    steps = planned_steps(ROWS, settings(batch_tokens=6, epochs=1))
    batches = [batch for [batch] in steps]
    sizes = [sum(len(row.ids) for row in batch) for batch in batches]
    assert max(sizes) <= 6
    assert sorted(chain(*batches), key=id) == sorted(ROWS, key=id)
    for size, following in zip(sizes, batches[1:], strict=False):
        assert size + len(following[0].ids) > 6, "one more row would have fitted"


@pytest.mark.parametrize("changes", [{"max_steps": 3}, {"epochs": 2}])
def test_no_rows_are_an_error_and_no_endless_plan(changes):
    with pytest.raises(DataError, match="no row to train on"):
        planned_steps([], settings(**changes))


def test_a_row_above_the_token_budget_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match=r"--batch-tokens 3 cannot hold the row at data:[37], which has 4 tokens"):
        planned_steps(ROWS, settings(batch_tokens=3))


def test_the_loss_counts_trained_tokens_but_never_the_first_token_which_nothing_predicts():
    assert TextExample((1, 2, 3, 4), (True, False, True, True), "here").counted == 2
    assert ROWS[0].counted == 1


def test_families_hold_every_row_once_and_share_half_of_their_prompts():
    draw = random.Random(0)
    rows = []
    for _ in range(20):
        start = [draw.randrange(9) for _ in range(12)]
        for _ in range(draw.randrange(1, 6)):
            ids = (*start, *(draw.randrange(9) for _ in range(draw.randrange(2, 12))), 3, 3)
            rows.append(TextExample(ids, (False,) * (len(ids) - 2) + (True, True), "here"))
    draw.shuffle(rows)
    batches = [[rows[place] for place in places] for places in families(rows, 3)]
    assert sorted(row.ids for batch in batches for row in batch) == sorted(row.ids for row in rows)
    assert max(map(len, batches)) == 3
    for batch in batches:
        for row in batch:
            half = max(row.prompt_length, batch[0].prompt_length) // 2
            assert row.ids[:half] == batch[0].ids[:half]


@pytest.mark.parametrize("changes", [{"batch_size": 4}, {"batch_tokens": 4 * 8}])
def test_families_stay_together_in_the_batches(changes):
    rows = [
        TextExample((group,) * 6 + (20 + n, 9), (False,) * 7 + (True,), "here") for group in range(6) for n in range(2)
    ]
    steps = planned_steps(rows, settings(task="causal_lm", batches="alike", max_steps=6, **changes))
    for batch in chain(*steps):
        assert [row.ids[0] for row in batch[::2]] == [row.ids[0] for row in batch[1::2]]


def test_more_steps_than_a_run_can_have_are_refused_at_once():
    with pytest.raises(ConfigError, match=r"--epochs 1e\+09 makes .* at most 1,000,000: lower --epochs"):
        planned_steps(ROWS, settings(epochs=1e9))
    assert len(planned_steps(ROWS, settings(epochs=1e9, max_steps=7))) == 7


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_pytorch_does_not_take_is_refused(seed):
    with pytest.raises(ConfigError, match="--seed"):
        settings(seed=seed)
    settings(seed=2**64 - 1)
