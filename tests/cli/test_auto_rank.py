"""`rankwise train` without --r: rank 32 trains, and is cut to what held-out rows show to be enough."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import with_options
from transformers import AutoModelForCausalLM

from rankwise import load_adapter_, read_adapter
from rankwise.cli.main import main
from rankwise.data.rows import Row
from rankwise.errors import DataError
from rankwise.rank.shrink import split_held_out
from rankwise.train.config import FIXED_RANK, ROWS_TO_CHOOSE
from rankwise.train.run_folder import RunFolder


def train(folder, model, rows, *options):
    """Rows that ask for a number and are all answered with the same words: a change of very low rank."""
    data = folder / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"what is {n}?", "completion": " it is so"}) + "\n" for n in range(rows))
    )
    settings = ["--max-steps", "25", "--batch-size", "8", "--lr", "0.02", "--eval-answers", "0"]
    settings += ["--eval-fraction", "0.5", "--target-modules", "gate_proj", "up_proj"]
    run = folder / "run"
    usual = ["--data", str(data), "--model", str(model), "--out", str(run), *settings]
    code = main(["train", *with_options(usual, *options)])
    return run, code


def ranks(adapter):
    return {name: update.rank for name, update in read_adapter(adapter).low_rank.items()}


def result_of(run):
    return json.loads((run / "result.json").read_text())


@pytest.fixture(scope="module")
def cut_run(tiny_llama_folder, tmp_path_factory):
    run, code = train(tmp_path_factory.mktemp("auto"), tiny_llama_folder, 160)
    assert code == 0
    return run


def test_the_adapter_is_cut_within_delta_and_both_are_kept(cut_run):
    shrunk = result_of(cut_run)["shrunk"]
    full, cut = ranks(cut_run / "adapter-full"), ranks(cut_run / "adapter")
    assert set(full.values()) == {32}
    assert sum(cut.values()) == sum(shrunk["ranks_after"].values()) < 32
    assert shrunk["lost_at_most"] <= shrunk["delta"]


def test_the_report_tells_the_rows_that_chose_the_ranks_from_those_that_did_not(cut_run):
    shrunk, page = result_of(cut_run)["shrunk"], (cut_run / "report.html").read_text()
    assert sum(shrunk["rows"].values()) == result_of(cut_run)["eval_rows"] == 80
    confirmed = f"on {shrunk['rows']['confirmation']} others, which chose none, the loss is"
    assert f"some of these rows chose the ranks, and {confirmed}" in page
    assert f"{shrunk['loss_shrunk']:.4f} ({shrunk['loss_full']:.4f} before the cut)" in page


def test_a_run_that_was_killed_between_its_two_adapters_ends_with_the_same_bytes(cut_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(cut_run, run)
    names = [f"{adapter}/adapter_model.safetensors" for adapter in ("adapter", "adapter-full")]
    before = [(run / name).read_bytes() for name in names]
    (run / "result.json").unlink()
    shutil.rmtree(run / "adapter")
    assert main(["train", "--resume", str(run)]) == 0
    assert [(run / name).read_bytes() for name in names] == before


def test_a_run_that_is_interrupted_between_its_two_adapters_has_the_one_that_trained(cut_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(cut_run, run)
    (run / "result.json").unlink()
    keep = RunFolder.keep_full_adapter

    def interrupted(self):
        keep(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "keep_full_adapter", interrupted)
    assert main(["train", "--resume", str(run)]) == 130
    assert set(ranks(run / "adapter").values()) == {32}
    assert not (run / "adapter-full").exists()
    assert result_of(run)["interrupted"]


@pytest.mark.parametrize(
    ("rows", "options", "reason"),
    [
        (40, [], "20 held-out rows are too few to choose ranks by"),
        (40, ["--eval-fraction", "0"], "nothing is held out to choose ranks by"),
        (160, ["--use-dora"], "an adapter with --use-dora cannot be cut"),
    ],
)
def test_where_ranks_cannot_be_chosen_a_fixed_one_trains_and_is_named(
    rows, options, reason, tiny_llama_folder, tmp_path, capsys
):
    run, code = train(tmp_path, tiny_llama_folder, rows, "--max-steps", "2", *options)
    assert code == 0
    assert f"--r auto: rank {FIXED_RANK}, which stays, because {reason}" in capsys.readouterr().err
    assert reason in result_of(run)["uncut_because"]
    assert result_of(run)["shrunk"] is None
    assert set(ranks(run / "adapter").values()) == {FIXED_RANK}
    assert not (run / "adapter-full").exists()


def test_rows_that_cannot_choose_ranks_are_not_counted_as_if_they_could(tiny_llama_folder, tmp_path, capsys):
    rows = [{"prompt": f"what is {n}?", "completion": " it is so"} for n in range(40)] * 3
    rows += [{"prompt": f"what is {n}?" + " word" * 200, "completion": " so"} for n in range(160)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--data", str(tmp_path / "mixed.jsonl"), "--long-rows", "drop", "--max-length", "100"]
    run, code = train(tmp_path, tiny_llama_folder, 0, "--max-steps", "2", *given)
    assert code == 0
    said = capsys.readouterr().err
    found = re.search(r"because (\d+) held-out rows are too few to choose ranks by", said)
    assert found
    assert re.search(r"\n\d+ rows are held out; \d+ more are too long and left out; ", said)
    assert 0 < int(found[1]) <= 40
    assert set(ranks(run / "adapter").values()) == {FIXED_RANK}


def test_held_out_rows_that_are_cut_are_counted(tiny_llama_folder, tmp_path, capsys):
    rows = [{"prompt": f"what is {n}?", "completion": " it is so" * (1 + 99 * (n % 2))} for n in range(20)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--data", str(tmp_path / "mixed.jsonl"), "--long-rows", "cut", "--max-length", "100", "--max-steps", "1"]
    assert train(tmp_path, tiny_llama_folder, 0, *given)[1] == 0
    assert re.search(r"\n10 rows are held out, \d of them cut off at their end; ", capsys.readouterr().err)


def test_an_adapter_without_a_gain_stays_as_it_was_trained_and_the_run_says_why(tiny_llama_folder, tmp_path, capsys):
    run, code = train(tmp_path, tiny_llama_folder, 160, "--lr", "1e-30", "--max-steps", "1", "--eval-steps", "0")
    assert code == 0
    assert "the adapter stays as it was trained: there is no gain to keep" in capsys.readouterr().err
    assert "no gain to keep" in result_of(run)["uncut_because"]
    assert set(ranks(run / "adapter").values()) == {32}


def test_smaller_matrices_train_at_their_largest_rank_with_the_same_scale(tiny_llama_folder, tmp_path, capsys):
    run, code = train(tmp_path, tiny_llama_folder, 160, "--target-modules", "all-linear")
    assert code == 0
    # Keys and values of the tiny model are 16 × 32.
    assert "4 of 14 matrices are smaller, and train at min(d, k), from 16 on" in capsys.readouterr().err
    updates = read_adapter(run / "adapter-full").low_rank
    assert {name.rpartition(".")[2] for name, update in updates.items() if update.rank == 16} == {"k_proj", "v_proj"}
    assert {update.rank for update in updates.values()} == {16, 32}
    assert {update.scale for update in updates.values()} == {1.0}


def test_an_adapter_that_starts_from_the_weights_is_cut_and_loads(tiny_llama_folder, tmp_path):
    run, code = train(tmp_path, tiny_llama_folder, 160, "--init-lora-weights", "pissa", "--lr", "0.005")
    assert code == 0
    result = result_of(run)
    assert result["base_sha256_before"] == result["base_sha256_after"]
    load_adapter_(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), run / "adapter")
    # The start is subtracted, so the update is one of twice the rank.
    assert set(ranks(run / "adapter-full").values()) == {64}
    assert sum(ranks(run / "adapter").values()) < 64


def test_of_many_rows_so_many_are_drawn_as_are_wanted():
    rows = [Row(Path("f"), n, {"prompt": f"{n}", "completion": "x"}) for n in range(1000)]
    drawn = [row.line for part in vars(split_held_out(rows, 0, most=100)).values() for row in part]
    assert len(drawn) == len(set(drawn)) == 100
    assert drawn != [row.line for part in vars(split_held_out(rows, 1, most=100)).values() for row in part]


def test_so_many_rows_as_are_said_to_be_needed_can_be_split():
    rows = [Row(Path("f"), n, {"prompt": f"{n}", "completion": "x"}) for n in range(ROWS_TO_CHOOSE)]
    assert sum(map(len, vars(split_held_out(rows, 0)).values())) == ROWS_TO_CHOOSE
    with pytest.raises(DataError, match=f"at least {ROWS_TO_CHOOSE}"):
        split_held_out(rows[1:], 0)
