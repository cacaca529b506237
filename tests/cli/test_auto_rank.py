"""`rankwise train --r auto`"""

import json

import pytest

from rankwise import read_adapter
from rankwise.cli.main import main


def train(folder, model, rows, *options):
    """Rows that ask for a number and are all answered with the same words: a change of very low rank."""
    data = folder / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"what is {n}?", "completion": " it is so"}) + "\n" for n in range(rows))
    )
    settings = [
        "--max-steps",
        "25",
        "--batch-size",
        "8",
        "--lr",
        "0.02",
        "--eval-answers",
        "0",
        "--eval-fraction",
        "0.5",
    ]
    settings += ["--r", "auto", "--target-modules", "gate_proj", "up_proj"]
    run = folder / "run"
    code = main(["train", "--data", str(data), "--model", str(model), "--out", str(run), *settings, *options])
    return run, code


def test_the_adapter_is_cut_and_both_are_kept(tiny_llama_folder, tmp_path, capsys):
    run, code = train(tmp_path, tiny_llama_folder, 200)
    assert code == 0
    result = json.loads((run / "result.json").read_text())
    shrunk = result["shrunk"]
    full, cut = read_adapter(run / "adapter-full"), read_adapter(run / "adapter")
    assert {update.rank for update in full.low_rank.values()} == {32}
    assert sum(update.rank for update in cut.low_rank.values()) == sum(shrunk["ranks_after"].values()) < 32
    assert shrunk["lost_at_most"] <= shrunk["delta"]
    assert "decided nothing" in capsys.readouterr().err
    # What was promised holds on all held-out rows too, up to the rows' chance.
    assert result["eval_loss_after"] < shrunk["loss_full"] + 2 * shrunk["delta"]


def test_where_the_rows_cannot_tell_the_adapter_stays(tiny_llama_folder, tmp_path, capsys):
    run, code = train(tmp_path, tiny_llama_folder, 40)
    assert code == 0
    assert "the adapter keeps rank 32: 20 held-out rows are too few" in capsys.readouterr().err
    assert json.loads((run / "result.json").read_text())["shrunk"] is None
    assert not (run / "adapter-full").exists()
    assert {update.rank for update in read_adapter(run / "adapter").low_rank.values()} == {32}


@pytest.mark.parametrize("fraction", ["0"])
def test_it_needs_held_out_data(fraction, tiny_llama_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(tmp_path, tiny_llama_folder, 10, "--eval-fraction", fraction)
    assert "needs held-out data" in " ".join(capsys.readouterr().err.split())
