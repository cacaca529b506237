"""The sweep itself: what it asks to be trained, what it keeps, what it says; on made-up runs and on tiny trainings."""

import json
import re
import shutil
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import ROOT, sweep_two_ranks, tiny, with_options
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from rankwise import LoraConfig, eject_, inject_, paired_runs, read_adapter
from rankwise.cli.main import main
from rankwise.cli.rank_sweep import SweepConfig
from rankwise.engine.held_out import per_example
from rankwise.errors import CheckpointError, ConfigError, RankwiseError
from rankwise.lora.inject import DEFAULT_ADAPTER
from rankwise.lora.places import named_lora_layers
from rankwise.models.load import load_model
from rankwise.paired_runs import PairedRuns
from rankwise.rank.illustrate import Illustrations, illustrate, kept_runs
from rankwise.rank.page import HEIGHT, LEFT, WIDTH, page
from rankwise.rank.report import as_dict, table
from rankwise.rank.runs import Key, RunResult
from rankwise.rank.similarity import Similarity, layer_map
from rankwise.rank.start import inject_nested_
from rankwise.rank.sweep import FULL, sweep
from rankwise.rank.verdict import achieved_power, notes, verdict
from rankwise.train.config import TrainConfig

EXAMPLES = 150


def made_up(needed=4, noise=0.1, best_rate=1.0, seed_noise=0.003, gain=1.0):
    """run(rank, seed, factor) of a task that needs a rank; `asked` lists what was asked for."""
    asked = []

    def run(rank, seed, factor):
        asked.append((rank, seed, factor))
        hard = np.random.default_rng(7).uniform(2, 3, EXAMPLES)
        own = np.random.default_rng([seed, rank + 1])
        learned = gain if rank == FULL else gain * min(rank, needed) / needed
        loss = hard - learned + own.normal(0, seed_noise) + own.normal(0, noise, EXAMPLES)
        if rank:
            loss += 0.05 * np.log(factor / best_rate) ** 2
        return RunResult(loss, np.ones(EXAMPLES), 1.0, 100 * rank if rank >= 0 else 10**6)

    return run, asked


@pytest.mark.parametrize("needed", [1, 2, 4, 8])
def test_the_rank_that_a_task_needs_is_found(needed):
    found = sweep(made_up(needed)[0], [1, 2, 4, 8, 16], range(4))
    assert found.comparisons.sufficient == needed
    assert found.comparisons.saturates
    assert verdict(found).startswith(f"Take r = {needed}:")
    assert "saturates" in verdict(found)


def test_every_rank_is_trained_with_every_seed_and_the_rate_is_checked_at_three_ranks():
    run, asked = made_up()
    sweep(run, [8, 1, 2, 4, 2], [5, 6])
    assert len(asked) == len(set(asked))
    plain = {(rank, seed) for rank, seed, factor in asked if factor == 1}
    assert plain == {(rank, seed) for rank in (0, 1, 2, 4, 8) for seed in (5, 6)}
    others = {(rank, seed) for rank, seed, factor in asked if factor != 1}
    assert others == {(1, 5), (4, 5), (8, 5)}


def test_the_search_for_a_rate_goes_on_while_it_gets_better_and_each_rank_trains_with_its_best():
    run, asked = made_up(best_rate=9.0)
    found = sweep(run, [1, 2, 4], range(2))
    assert set(found.factors.values()) == {1.0, 9.0}
    assert {rank for rank, factor in found.factors.items() if factor == 1} == {0}
    assert {factor for rank, seed, factor in asked if rank == 2 and seed == 1} == {9.0}
    assert any("× 9, checked at r = 1, r = 2 and r = 4;" in note for note in notes(found))


def test_losses_that_do_not_depend_on_the_rate_leave_all_ranks_with_one_rate():
    differing, draws = 0, 40
    for draw in range(draws):

        def run(rank, seed, factor, draw=draw):
            own = np.random.default_rng([draw, rank, seed, round(1000 * factor)])
            loss = 2 - bool(rank) + own.normal(0, 0.01) + own.normal(0, 0.05, EXAMPLES)
            return RunResult(loss, np.ones(EXAMPLES), 1.0, rank)

        found = sweep(run, [1, 2, 4, 8], range(2))
        differing += len({found.factors[rank] for rank in (1, 2, 4, 8)}) > 1
    assert differing <= draws // 10


def test_ranks_that_need_different_rates_train_with_their_own():
    run, _ = made_up(needed=1)

    def apart(rank, seed, factor):
        return run(rank, seed, factor * (3 if rank == 1 else 1 / 3) if rank else factor)

    found = sweep(apart, [1, 2, 4], range(2))
    assert found.factors == {0: 1.0, 1: pytest.approx(1 / 3), 2: 3.0, 4: 3.0}


def test_rates_that_do_equally_well_leave_the_rate_as_it_is():
    run, asked = made_up()

    def indifferent(rank, seed, factor):
        result = run(rank, seed, 1.0)
        return RunResult(result.losses - 0.002 * np.log(factor), result.counts, 1.0, result.parameters)

    found = sweep(indifferent, [1, 2, 4], range(2))
    assert set(found.factors.values()) == {1.0}
    assert len(asked) == 2 * 4 + 3 * 2


def test_a_rate_that_diverges_is_passed_over_but_not_that_of_the_settings():
    run, _ = made_up()

    def diverging(rank, seed, factor, at=3.0):
        result = run(rank, seed, factor)
        return RunResult(result.losses + np.inf, result.counts, 0.0, 1) if factor >= at and rank else result

    found = sweep(diverging, [1, 2, 4], range(2))
    assert found.factors[4] == 1
    plain = json.loads(json.dumps(as_dict(found), allow_nan=False))
    assert None in plain["rate_checks"]["4"].values()
    with pytest.raises(RankwiseError, match=r"r = 1, seed 0.*lower --lr"):
        sweep(lambda *key: diverging(*key, at=0.0), [1, 2, 4], range(2))


@pytest.mark.parametrize(("where", "name"), [(lambda rank: rank == 0, "base"), (lambda rank: rank > 0, "r = 1")])
def test_a_loss_that_is_no_number_at_the_given_rate_stops_the_sweep_at_once(where, name):
    run, asked = made_up()

    def astray(rank, seed, factor):
        result = run(rank, seed, factor)
        if where(rank):
            result.losses[3] = np.nan
        return result

    with pytest.raises(RankwiseError, match=f"diverged at {name}, seed 0; give a lower --lr"):
        sweep(astray, [1, 2, 4], range(2))
    assert len(asked) <= 1 + 3 * 3
    asked.clear()
    with pytest.raises(RankwiseError, match=f"diverged at {name}, seed 0"):
        sweep(astray, [1, 2, 4], range(2), check_rates=False)
    assert len(asked) <= 2


def test_a_loss_that_is_no_number_at_another_rate_is_infinitely_bad():
    run, _ = made_up()

    def astray(rank, seed, factor):
        result = run(rank, seed, factor)
        return RunResult(result.losses * (np.nan if rank and factor > 1 else 1), result.counts, 1.0, rank)

    found = sweep(astray, [1, 2, 4], range(2))
    assert set(found.factors.values()) == {1.0}
    json.dumps(as_dict(found), allow_nan=False)


def test_one_rank_that_diverges_at_the_given_rate_ends_no_sweep():
    run, _ = made_up()

    def diverging(rank, seed, factor):
        result = run(rank, seed, factor)
        return RunResult(result.losses + np.inf, result.counts, 0.0, 1) if rank == 4 and factor >= 1 else result

    found = sweep(diverging, [1, 2, 4], range(2))
    assert found.factors == {0: 1.0, 1: 1.0, 2: 1.0, 4: 1 / 3}
    assert np.isfinite(found.losses[4]).all()


def test_an_interrupted_sweep_goes_on_and_ends_as_if_it_had_not_been(tmp_path):
    whole = sweep(made_up()[0], [1, 2, 4], range(3))
    run, asked = made_up()

    def dying(rank, seed, factor):
        if len(asked) == 9:
            raise KeyboardInterrupt
        return run(rank, seed, factor)

    settings = {"lr": 0.1}
    with pytest.raises(KeyboardInterrupt):
        sweep(dying, [1, 2, 4], range(3), folder=tmp_path, settings=settings)
    first = list(asked)
    asked.clear()
    resumed = sweep(run, [1, 2, 4], range(3), folder=tmp_path, settings=settings)
    assert not set(first) & set(asked)
    assert as_dict(resumed) == as_dict(whole)


def test_seeds_can_be_added_but_other_settings_or_another_folder_are_refused(tmp_path):
    run, asked = made_up()
    sweep(run, [1, 2, 4], range(2), folder=tmp_path / "a", settings={"lr": 0.1})
    asked.clear()
    sweep(run, [1, 2, 4], range(3), folder=tmp_path / "a", settings={"lr": 0.1})
    assert {seed for _, seed, _ in asked} == {2}
    with pytest.raises(ConfigError, match=r"lr: 0\.1 there, 0\.2 now"):
        sweep(run, [1, 2, 4], range(2), folder=tmp_path / "a", settings={"lr": 0.2})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no sweep"):
        sweep(run, [1, 2, 4], range(2), folder=tmp_path / "b", settings={})


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "other"])
def test_a_damaged_run_file_is_said_and_its_run_done_anew(tmp_path, harm):
    run, asked = made_up()
    whole = sweep(run, [1, 2, 4], range(2), folder=tmp_path, settings={})
    file = tmp_path / "runs/rank2-seed1-rate1.npz"
    content = file.read_bytes()
    file.write_bytes(
        {
            "cut": content[: len(content) // 2],
            "flipped": content[:300] + bytes([content[300] ^ 255]) + content[301:],
            "empty": b"",
            "other": b"hello" * 30,
        }[harm]
    )
    asked.clear()
    said = []
    again = sweep(run, [1, 2, 4], range(2), folder=tmp_path, settings={}, say=said.append)
    assert asked == [(2, 1, 1.0)]
    assert sum("rank2-seed1-rate1.npz is damaged" in line for line in said) == 1
    assert as_dict(again) == as_dict(whole)
    assert file.read_bytes() == content


@pytest.mark.parametrize("content", ['{"lr": 0.', "[]", ""])
def test_damaged_settings_are_an_error_with_its_cure(tmp_path, content):
    sweep(made_up()[0], [1, 2, 4], range(2), folder=tmp_path, settings={"lr": 0.1})
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"settings\.json is damaged .*another --out"):
        sweep(made_up()[0], [1, 2, 4], range(2), folder=tmp_path, settings={"lr": 0.1})


def of_losses(true, noise=0.02, seed_noise=0.003, examples=EXAMPLES):
    """run(rank, seed, factor) with these true losses by rank."""

    def run(rank, seed, factor):
        own, hard = np.random.default_rng([seed, rank + 2]), np.random.default_rng(5).normal(0, 0.3, examples)
        loss = true[rank] + hard + own.normal(0, seed_noise) + own.normal(0, noise, examples)
        return RunResult(loss, np.ones(examples), 1.0, 100 * max(rank, 0))

    return run


def test_a_rank_that_is_far_better_than_the_largest_is_named_and_no_rank_is_taken():
    found = sweep(of_losses({0: 2.0, 1: 1.0, 4: 0.8, 32: 1.0}), [1, 4, 32], range(3), check_rates=False)
    assert verdict(found).startswith("r = 32 is a poor reference, as r = 4 did better: r = 4 by 0.2")
    assert as_dict(found)["sufficient_rank"] is None


def test_a_margin_that_the_base_itself_would_pass_gives_no_rank():
    run = of_losses({0: 2.0, 1: 1.9, 2: 1.6, 4: 1.5})
    found = sweep(run, [1, 2, 4], range(3), margin=1.0, check_rates=False)
    assert verdict(found).startswith("The margin of 1.0000 nats asks nothing")
    assert as_dict(found)["sufficient_rank"] is None


def test_where_nothing_was_learned_nothing_is_claimed_anywhere():
    run = of_losses({0: 2.0, 1: 2.0, 4: 2.003, 32: 2.02, FULL: 1.4})
    found = sweep(run, [1, 4, 32], range(3), margin=0.1, check_rates=False, with_full=True)
    plain = as_dict(found)
    assert plain["saturates"] is False
    assert plain["achieved_power"] is None
    assert any(note.startswith("r = 32 against full fine-tuning: +0.6") for note in notes(found))
    assert "δ" not in " ".join(notes(found))


@pytest.mark.parametrize("margin", [None, 0.6])
def test_where_no_rank_is_compared_no_margin_is_drawn_or_written(margin):
    losses = {0: 2.0, 1: 1.8, 4: 1.5} if margin else {0: 2.0, 1: 2.01, 4: 2.02}
    found = sweep(of_losses(losses), [1, 4], range(3), margin=margin, check_rates=False)
    plain, html = as_dict(found), page(found, {"model": "m"})
    assert plain["margin"] is plain["margin_rule"] is None
    assert not any(word in html for word in ("δ", "dashed", "dasharray"))
    assert "dashed line the loss is within" in page(sweep(made_up()[0], [1, 4, 8], range(3)), {"model": "m"})


def test_a_loss_against_full_fine_tuning_that_is_shown_is_said_to_be():
    run = of_losses({0: 2.0, 1: 1.5, 4: 1.5, FULL: 1.2})
    found = sweep(run, [1, 4], range(3), check_rates=False, with_full=True)
    assert any("a loss beyond δ is shown (95 %)" in note for note in notes(found))


def test_a_rank_with_a_lower_mean_is_never_said_to_be_worse():
    open_questions = 0
    for draw in range(40):
        own = np.random.default_rng(draw)

        def run(rank, seed, factor, own=own):
            loss = 2.0 - bool(rank) + own.normal(0, 0.06 * bool(rank)) + own.normal(0, 0.02, EXAMPLES)
            return RunResult(loss, np.ones(EXAMPLES), 1.0, rank)

        said = verdict(sweep(run, [1, 2, 4], range(3), check_rates=False))
        assert "by -" not in said
        assert " 1 more seeds" not in said
        open_questions += "is better by" in said
    assert open_questions


def test_differences_without_any_variance_can_be_written():
    def run(rank, seed, factor):
        hard = np.random.default_rng(5).normal(0, 0.3, EXAMPLES)
        return RunResult(hard + (1.5 if rank else 2.0), np.ones(EXAMPLES), 1.0, rank)

    plain = as_dict(sweep(run, [1, 2, 4], range(2)))
    assert plain["achieved_power"] == 1
    json.dumps(plain, allow_nan=False)


def test_a_row_that_carries_much_of_a_difference_is_remarked_on():
    def run(rank, seed, factor):
        loss = of_losses({0: 2.0, 1: 1.5, 2: 1.5})(rank, seed, factor).losses
        loss[7] += 3 * (rank == 1)
        return RunResult(loss, np.ones(EXAMPLES), 1.0, rank)

    found = sweep(run, [1, 2], range(3), check_rates=False)
    assert any("A single held-out row makes up" in note and "r = 1" in note for note in notes(found))
    assert not any("single held-out row" in note for note in notes(sweep(made_up()[0], [1, 4, 8], range(3))))


def test_too_few_held_out_examples_are_found_at_the_first_run():
    asked = []

    def run(rank, seed, factor):
        asked.append(rank)
        return RunResult(np.ones(9), np.ones(9), 1.0, rank)

    with pytest.raises(ConfigError, match="at least 10 different held-out examples"):
        sweep(run, [1, 2], range(2))
    assert asked == [0]


def test_the_power_is_said_before_the_first_run_with_what_it_leaves_out():
    said = []
    sweep(made_up()[0], [1, 2], range(3), say=said.append)
    assert "exactly as good as r = 2 passes in 80%" in said[0]
    assert "0.44·δ from seed to seed" in said[0]
    assert "that part is not counted" in said[0]


def test_costs_of_shared_passes_are_labelled_everywhere():
    def run(rank, seed, factor):
        result = made_up()[0](rank, seed, factor)
        return replace(result, peak_bytes=10**9, shared_by=(1, 2) if rank in (1, 2) else ())

    found = sweep(run, [1, 2, 4], range(2), check_rates=False)
    assert [line["shared_by"] for line in as_dict(found)["ranks"]] == [(), ("1", "2"), ("1", "2"), ()]
    assert table(found).count("1.0+") == 2
    assert any(note.startswith("Time and memory of r = 1 and r = 2 are those of passes") for note in notes(found))
    assert "together with all runs that shared their passes (rank 1, 2)" in page(found, {"model": "m"})
    assert "+</td>" not in page(sweep(made_up()[0], [1, 2], range(2)), {"model": "m"})


def test_too_little_data_gives_no_rank_but_what_would_be_needed():
    found = sweep(made_up(noise=1.0, seed_noise=0.0)[0], [1, 4, 8], range(2), check_rates=False)
    assert found.comparisons.of(4).outcome == "cannot tell"
    assert "cannot tell" in verdict(found)
    assert "Take r" not in verdict(found)
    assert "more seeds" in verdict(found) or "more held-out examples" in verdict(found)
    assert achieved_power(found) < 0.8
    assert any("an open question is no sign" in note for note in notes(found))


def test_a_run_that_learned_nothing_gives_no_rank():
    found = sweep(made_up(gain=0.0)[0], [1, 2, 4], range(3), check_rates=False)
    assert verdict(found).startswith("These data cannot tell which rank suffices: r = 4 has not lowered")
    assert as_dict(found)["sufficient_rank"] is None


def test_a_loss_that_still_falls_at_the_largest_rank_is_said_to_do_so():
    found = sweep(made_up(needed=16)[0], [2, 4, 8], range(4), check_rates=False)
    assert verdict(found).startswith("Take r = 8 or more")
    assert "saturates" not in verdict(found)


@pytest.mark.parametrize(
    ("run", "sufficient", "at_least"),
    [
        (made_up()[0], 4, None),
        (made_up(noise=1.0, seed_noise=0.0)[0], None, None),
        (made_up(needed=16)[0], None, 8),
    ],
)
def test_only_a_rank_that_is_shown_to_suffice_is_written_and_drawn_as_the_answer(run, sufficient, at_least):
    found = sweep(run, [1, 4, 8], range(3), check_rates=False)
    plain, html = as_dict(found), page(found, {"model": "m"})
    assert (plain["sufficient_rank"], plain["at_least"]) == (sufficient, at_least)
    shown = sufficient is not None
    assert ('class="verdict clear"' in html, 'r="7"' in html, 'font-weight="bold"' in html) == (shown, shown, shown)


def test_full_fine_tuning_is_compared_with_the_rank_that_suffices():
    found = sweep(made_up()[0], [1, 4, 8], range(4), with_full=True)
    assert found.against_full is not None
    assert found.against_full.upper < found.comparisons.margin
    assert any("a loss beyond δ is ruled out (95 %)" in note for note in notes(found))
    assert "full" in table(found)


def test_all_problems_of_a_call_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        sweep(made_up()[0], [4], [0], margin=-1.0)
    assert all(word in str(error.value) for word in ("two ranks", "two different seeds", "--delta"))
    with pytest.raises(ConfigError, match="--delta must be a finite number above 0, found inf"):
        sweep(made_up()[0], [1, 4], [0, 1], margin=float("inf"))


def test_the_page_needs_no_other_file_and_begins_with_the_verdict():
    found = sweep(made_up()[0], [1, 2, 4, 8], range(3))
    html = page(found, {"model": "<m>", "data": "d"})
    assert len(html) < 1_000_000
    assert not any(word in html for word in ("http", "<script", "src=", "<m>"))
    places = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.-]+)"', html)]
    assert len(places) == 4 * 3 + 1
    assert all(LEFT < x < LEFT + WIDTH and 0 < y < HEIGHT for x, y in places)
    assert html.index("Take r = 4") < html.index("<svg") < html.index("<h2>Settings")


def test_the_page_of_a_large_model_is_small_and_shows_every_illustration():
    kinds = [f"mlp.{name}_proj" for name in ("gate", "up", "down", "q", "k", "v", "o")]
    cut = layer_map("ranks of the cut adapter", {f"layers.{n}.{kind}": n % 32 for n in range(80) for kind in kinds})
    alike = Similarity("two seeds", (1, 2), {"q": (0.5, 0.4)}, {"q": (0.001, 0.002)})
    html = page(sweep(made_up()[0], [1, 2, 4, 8], range(3)), {"model": "m"}, Illustrations((cut,), (alike,)))
    assert len(html) < 1_000_000
    assert html.count(">31</td>") == 2 * len(kinds) + 1
    assert "0.50 <" in html
    assert "0.002" in html
    assert html.index("<svg") < html.index("<table") < html.index("ranks of the cut adapter") < html.index("two seeds")


def test_the_runs_of_one_seed_begin_with_the_first_rows_of_the_largest_rank():
    model = tiny("llama")
    starts = {}
    for rank in (2, 4, 8):
        inject_nested_(model, LoraConfig(r=rank), largest=8, seed=3)
        starts[rank] = {name: layer.update(DEFAULT_ADAPTER).low_rank() for name, layer in named_lora_layers(model)}
        eject_(model)
    for name, largest in starts[8].items():
        assert torch.equal(starts[2][name].A, largest.A[:2])
        assert torch.equal(starts[4][name].A, largest.A[:4])
        assert not largest.B.any()
    inject_(model, LoraConfig(r=8), torch.Generator().manual_seed(3))
    for name, layer in named_lora_layers(model):
        assert torch.equal(layer.update(DEFAULT_ADAPTER).lora_A, starts[8][name].A)


@pytest.fixture
def sql(tmp_path):
    rows = (ROOT / "examples/text_to_sql/train.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("train", rows[:16]), ("test", rows[16:28])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    return [
        "--data", str(tmp_path / "train.jsonl"), "--eval-data", str(tmp_path / "test.jsonl"), "--batch-size", "4",
    ]  # fmt: skip


def test_the_command_leaves_table_page_and_all_differences_and_goes_on_in_its_folder(
    tiny_llama_folder, sql, tmp_path, capsys
):
    out = tmp_path / "sweep"
    common = ["rank", "sweep", "--model", str(tiny_llama_folder), *sql, "--max-steps", "2", "--lr", "0.02"]
    common += ["--no-check-rates"]
    options = [*common, "--ranks", "1,2", "--out", str(out)]
    assert main([*options, "--seeds", "2", "--with-full"]) == 0
    printed = capsys.readouterr()
    found = json.loads((out / "sweep.json").read_text())
    assert found["verdict"] in printed.out
    assert [line["name"] for line in found["ranks"]] == ["base", "1", "2", "full"]
    assert found["ranks"][0]["parameters"] == 0
    assert 2 * found["ranks"][1]["parameters"] == found["ranks"][2]["parameters"]
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    assert found["ranks"][3]["parameters"] == sum(p.numel() for p in plain.parameters())
    assert found["ranks"][3]["loss"] < found["ranks"][0]["loss"]
    assert np.array(found["differences"]["1"]).shape == (2, 12)
    html = (out / "sweep.html").read_text()
    drawing = ElementTree.parse(out / "sweep.svg").getroot()
    assert [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text") if text.text in ("1", "2")] == [
        "1",
        "2",
    ]
    kept = {f"rank{rank}-seed{seed}-rate1" for rank in (1, 2) for seed in (0, 1)}
    assert {path.name for path in (out / "adapters").iterdir()} == kept
    for line in found["ranks"][1:3]:
        folder = out / f"adapters/rank{line['name']}-seed0-rate1"
        adapter = read_adapter(folder)
        assert {update.rank for update in adapter.low_rank.values()} == {int(line["name"])}
        assert adapter.config.base_model_name_or_path == str(tiny_llama_folder)
        assert line["adapter_bytes"] == (folder / "adapter_model.safetensors").stat().st_size
        assert line["peak_bytes"] > 1e8
    # Twelve rows cannot choose ranks, so the map shows effective ranks.
    [effective] = found["illustrations"]["maps"]
    assert effective["layers"] == ["0", "1"]
    assert all(1 <= value <= 2 for row in effective["kinds"].values() for value in row)
    for similar in found["illustrations"]["similarities"]:
        assert similar["title"] in html
        assert all(0 <= value <= 1 for row in similar["kinds"].values() for value in row)
    assert [similar["sizes"] for similar in found["illustrations"]["similarities"]] == [[1, 2], [1]]
    assert main(["eval", "--model", str(tiny_llama_folder), "--data", sql[3], "--eval-answers", "0"]) == 0
    base = json.loads(capsys.readouterr().out)["loss"]
    assert found["ranks"][0]["loss"] == pytest.approx(base, rel=1e-5)
    times = {path.name: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    mine = out / "adapters/rank2-seed0-mine"
    mine.mkdir()
    (out / "adapters/notes.txt").write_text("mine")
    (tmp_path / "run.yaml").write_text("save_steps: 7\nr: auto\n")
    assert main([*options, "--seeds", "3", "--config", str(tmp_path / "run.yaml")]) == 0
    assert mine.is_dir()
    assert (out / "adapters/notes.txt").is_file()
    assert {name: (out / "runs" / name).stat().st_mtime_ns for name in times} == times
    assert main(with_options([*options, "--seeds", "3"], "--lr", "0.01")) == 2
    assert "lr: 0.02 there, 0.01 now" in capsys.readouterr().err
    (tmp_path / "more.jsonl").write_text((tmp_path / "test.jsonl").read_text().split("\n", 1)[1])
    assert main(with_options([*options, "--seeds", "3"], "--eval-data", str(tmp_path / "more.jsonl"))) == 2
    assert "the rows of the data (SHA-256): " in capsys.readouterr().err


def test_held_out_rows_that_ask_the_same_are_one_example(tiny_llama_folder, sql, tmp_path, capsys):
    lines = (tmp_path / "test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "test.jsonl").write_text("".join(lines * 5))
    common = ["--model", str(tiny_llama_folder), *sql, "--max-steps", "1", "--lr", "0.02"]
    sweep_two_ranks(common, tmp_path / "sweep")
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert found["examples"] == len(found["counts"]) == len(lines)
    assert "12 held-out examples (rows that ask the same are one)" in capsys.readouterr().out
    config = TrainConfig(
        model=str(tiny_llama_folder), data=(Path(sql[1]),), eval_data=(Path(sql[3]),), out=tmp_path / "o", r=2
    )
    once = per_example(PairedRuns(config, 2).engine(0), PairedRuns(config, 2).held_out[: len(lines)])
    several = PairedRuns(config, 2)(0, 0, 1.0)
    np.testing.assert_allclose(several.losses, 5 * once[0], rtol=1e-5)
    np.testing.assert_array_equal(several.counts, 5 * once[1])
    (tmp_path / "test.jsonl").write_text("".join(lines[:9] * 5))
    command = [
        "rank",
        "sweep",
        *common,
        "--ranks",
        "1,2",
        "--seeds",
        "2",
        "--no-check-rates",
        "--out",
        str(tmp_path / "few"),
    ]
    assert main(command) == 2
    assert "at least 10 different held-out rows, found 9 among 45;" in capsys.readouterr().err


def test_a_sweep_is_not_resumed_on_another_base(tiny_llama_folder, sql, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama_folder, base)
    options = ["rank", "sweep", "--model", str(base), *sql, "--max-steps", "1", "--lr", "0.02", "--no-check-rates"]
    options += ["--ranks", "1,2", "--out", str(tmp_path / "sweep")]
    assert main([*options, "--seeds", "2"]) == 0
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(base)
    assert main([*options, "--seeds", "3"]) == 2
    assert "the base model's weights (SHA-256): " in capsys.readouterr().err


def test_a_sweep_that_goes_on_trains_what_the_day_it_began_on_gave(tiny_llama_folder, sql, tmp_path, monkeypatch):
    class NextYear(date):
        @classmethod
        def today(cls):
            return cls(2032, 1, 31)

    model, out = tmp_path / "model", tmp_path / "sweep"
    shutil.copytree(tiny_llama_folder, model)
    (model / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %B %Y') }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    )
    options = ["--model", str(model), *sql, "--max-steps", "1", "--lr", "0.02"]
    sweep_two_ranks(options, out)
    began = json.loads((out / "settings.json").read_text())["day"]
    assert began == date.today().isoformat()
    before = held_out_losses(out)
    (out / "runs/rank2-seed0-rate1.npz").unlink()
    monkeypatch.setattr("rankwise.cli.rank_sweep.date", NextYear)
    monkeypatch.setattr("rankwise.paired_runs.date", NextYear)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", _at_new_year())
    sweep_two_ranks(options, out)
    assert json.loads((out / "settings.json").read_text())["day"] == began
    for name, losses in held_out_losses(out).items():
        np.testing.assert_allclose(losses, before[name], rtol=1e-5, err_msg=name)


def test_a_damaged_kept_adapter_costs_its_illustration_and_no_result(tiny_llama_folder, sql, tmp_path, capsys):
    out = tmp_path / "sweep"
    options = ["--model", str(tiny_llama_folder), *sql, "--max-steps", "1", "--lr", "0.02"]
    sweep_two_ranks(options, out)
    whole = json.loads((out / "sweep.json").read_text())
    for name, maps, similarities in (("rank1-seed0-rate1", 1, 1), ("rank2-seed0-rate1", 0, 0)):
        (out / f"adapters/{name}/adapter_model.safetensors").write_bytes(b"torn")
        (out / "sweep.json").unlink()
        sweep_two_ranks(options, out)
        assert f"the adapter in {out}/adapters/{name} cannot be used" in capsys.readouterr().err
        found = json.loads((out / "sweep.json").read_text())
        assert (len(found["illustrations"]["maps"]), len(found["illustrations"]["similarities"])) == (
            maps,
            similarities,
        )
        assert found["differences"] == whole["differences"]


def test_adapters_of_two_seeds_are_kept_at_the_chosen_rate():
    found = sweep(made_up(best_rate=3.0)[0], [1, 2, 4], range(3), with_full=True)
    assert found.factors[4] == 3
    assert {key.name for key in kept_runs(found, 2)} == {
        f"rank{rank}-seed{seed}-rate3" for rank in (1, 2, 4) for seed in (0, 1)
    }


def test_a_sweep_that_goes_on_has_the_adapters_of_the_rates_that_are_chosen_now(tiny_llama_folder, sql, tmp_path):
    out = tmp_path / "sweep"
    options = ["rank", "sweep", "--model", str(tiny_llama_folder), *sql, "--max-steps", "2", "--lr", "0.003"]
    options += ["--ranks", "1,2", "--seeds", "2", "--out", str(out)]

    def adapters():
        return {path.name for path in (out / "adapters").glob("*")}

    def chosen():
        factors = json.loads((out / "sweep.json").read_text())["rate_factors"]
        return {f"rank{rank}-seed{seed}-rate{factors[str(rank)]:.3g}" for rank in (1, 2) for seed in (0, 1)}

    assert main([*options, "--no-keep-adapters"]) == 0
    assert not adapters()
    assert main(options) == 0
    first = chosen()
    assert adapters() == first
    # So large a margin takes the given rate.
    assert main([*options, "--delta", "9"]) == 0
    assert adapters() == chosen() != first


@pytest.fixture(scope="module")
def tiny_bert_folder(tmp_path_factory, minilm):
    """A random BERT with MiniLM's tokenizer, on disk."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _at_new_year():
    class Then(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2032, 1, 31, tzinfo=tz)

    return Then


def held_out_losses(out):
    return {path.name: np.load(path)["losses"] for path in (out / "runs").iterdir()}


def test_a_sweep_in_shared_passes_gives_what_it_gives_run_by_run(tiny_llama_folder, sql, tmp_path, capsys, monkeypatch):
    # AdamW moves a number by the sign of a gradient that is next to zero, so fp32's rounding would grow without bound.
    monkeypatch.setattr(paired_runs, "load_model", lambda *args, **kwargs: load_model(*args, **kwargs).double())
    options = ["rank", "sweep", "--model", str(tiny_llama_folder), *sql, "--max-steps", "3", "--lr", "0.3"]
    options += ["--lora-dropout", "0.1"]
    options += ["--ranks", "1,2,4", "--seeds", "2"]
    assert main([*options, "--at-once", "1", "--out", str(tmp_path / "alone")]) == 0
    assert main([*options, "--at-once", "3", "--out", str(tmp_path / "shared")]) == 0
    assert "up to 3 runs share a pass" in capsys.readouterr().err
    alone, shared = held_out_losses(tmp_path / "alone"), held_out_losses(tmp_path / "shared")
    assert alone.keys() == shared.keys()
    for name, losses in alone.items():
        np.testing.assert_allclose(shared[name], losses, rtol=1e-6, err_msg=name)


def test_a_rate_that_diverges_in_a_shared_pass_is_infinitely_bad_and_harms_no_other(tiny_llama_folder, sql, tmp_path):
    config = SweepConfig(
        model=str(tiny_llama_folder),
        data=(Path(sql[1]),),
        eval_data=(Path(sql[3]),),
        out=tmp_path,
        max_steps=3,
        lr=0.01,
    )
    runs = PairedRuns(config, 2)
    keys = [Key(1, 0), Key(2, 0, 1e30), Key(2, 1)]
    found = dict(runs.together(keys, at_once=3))
    assert np.isinf(found[keys[1]].losses).all()
    assert np.isinf(runs(2, 0, 1e30).losses).all()
    # At the given rate as well: another rank may do well with it, or this one with another rate.
    runs.rate = 1e28
    assert np.isinf(runs(1, 0, 1.0).losses).all()
    assert all(np.isinf(result.losses).all() for _, result in runs.together(keys[:1] + keys[2:], at_once=2))
    runs.rate = 0.01
    for key in (keys[0], keys[2]):
        alone = runs(key.rank, key.seed, key.factor)
        np.testing.assert_allclose(found[key].losses, alone.losses, rtol=2e-5)
        assert found[key].parameters == alone.parameters


def test_classifiers_of_a_sweep_share_passes_within_a_seed(tiny_bert_folder, tmp_path):
    lines = [
        json.dumps({"text": f"{'good ' * (n % 5)}day {n}", "label": "weather" if n % 3 else "greeting"})
        for n in range(36)
    ]
    for name, part in (("train", lines[:24]), ("test", lines[24:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
    options = ["rank", "sweep", "--task", "seq_cls", "--model", str(tiny_bert_folder), "--batch-size", "8"]
    options += ["--data", str(tmp_path / "train.jsonl"), "--eval-data", str(tmp_path / "test.jsonl")]
    options += ["--max-steps", "3", "--ranks", "1,2", "--seeds", "2", "--no-check-rates", "--lr", "0.01"]
    for at_once in ("1", "4"):
        assert main([*options, "--at-once", at_once, "--out", str(tmp_path / at_once)]) == 0
    alone, shared = held_out_losses(tmp_path / "1"), held_out_losses(tmp_path / "4")
    assert set(alone) == {f"rank{rank}-seed{seed}-rate1.npz" for rank in (0, 1, 2) for seed in (0, 1)}
    for name, losses in alone.items():
        np.testing.assert_allclose(shared[name], losses, rtol=2e-5, err_msg=name)


def test_runs_that_cannot_share_a_pass_go_one_by_one_unless_it_was_asked_for(tiny_llama_folder, sql, tmp_path, capsys):
    options = ["rank", "sweep", "--model", str(tiny_llama_folder), *sql, "--max-steps", "1", "--no-check-rates"]
    options += ["--ranks", "1,2", "--seeds", "2", "--target-modules", "embed_tokens", "--out", str(tmp_path / "sweep")]
    assert main([*options, "--at-once", "2"]) == 2
    assert "--at-once 2 is not possible: model.embed_tokens is no linear layer" in capsys.readouterr().err
    assert main(options) == 0
    assert "runs train one after the other: model.embed_tokens" in capsys.readouterr().err


def test_a_kept_adapter_is_cut_to_ranks_by_module_and_the_model_is_the_base_again(tiny_llama_folder, tmp_path):
    for name, rows in (("train", range(100)), ("test", range(100, 180))):
        lines = [json.dumps({"prompt": f"what is {n}?", "completion": " it is so"}) for n in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    config = TrainConfig(
        model=str(tiny_llama_folder),
        data=(tmp_path / "train.jsonl",),
        eval_data=(tmp_path / "test.jsonl",),
        out=tmp_path / "out",
        target_modules=("gate_proj", "up_proj"),
        lr=0.02,
        r=4,
    )
    runs = PairedRuns(config, 4, tmp_path / "adapters")
    result = runs(4, 0, 1.0)
    found = sweep(lambda rank, seed, factor: result if rank else runs(0, 0, 1.0), [2, 4], range(2), check_rates=False)
    cut = runs.cut_ranks(tmp_path / "adapters/rank4-seed0-rate1", margin=0.2)
    assert cut is not None
    assert 0 < sum(cut.values()) < 4 * 4
    strict = runs.cut_ranks(tmp_path / "adapters/rank4-seed0-rate1", margin=1e-12)
    assert strict is None or sum(strict.values()) > sum(cut.values())
    torch.testing.assert_close(torch.tensor(runs(0, 0, 1.0).losses), torch.tensor(found.losses[0][0]))
    maps = illustrate(found, tmp_path / "adapters", cut).maps
    assert {value for row in maps[0].kinds.values() for value in row} == set(cut.values())
    assert maps[0].layers == ("0", "1")


def test_settings_that_cannot_be_are_all_named_on_the_command_line(tmp_path, capsys):
    options = ["--model", "m", "--data", "d", "--out", str(tmp_path / "o"), "--ranks", "8", "--seeds", "1"]
    with pytest.raises(SystemExit, match="2"):
        main(["rank", "sweep", *options, "--delta", "-1"])
    message = capsys.readouterr().err
    assert all(word in message for word in ("--ranks", "--seeds", "--delta"))
    with pytest.raises(SystemExit, match="2"):
        main(["rank", "sweep", *with_options(options, "--ranks", "1,2", "--seeds", "2"), "--seed", str(2**64 - 1)])
    assert "the last seed, --seed + --seeds - 1, can be at most" in capsys.readouterr().err
    assert main(["rank", "sweeep"]) == 2
    assert "nearest: 'sweep'" in capsys.readouterr().err
