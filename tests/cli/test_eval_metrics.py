"""`rankwise train --metrics` and `rankwise eval --metrics` measure the same."""

import json

import pytest
from conftest import ROOT

from rankwise.cli.main import main
from rankwise.train import text_metrics

ROWS = (ROOT / "examples/text_to_sql/train.jsonl").read_text().splitlines()
NAMES = ["loss", "perplexity", "token_accuracy", "exact_match", "bleu", "chrf", "rouge1", "rouge2", "rougeL"]


def write(path, rows):
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def test_train_and_eval_measure_the_same_with_intervals_and_samples(tiny_llama_folder, tmp_path, capsys):
    data, held_out = write(tmp_path / "train.jsonl", ROWS[:24]), write(tmp_path / "held_out.jsonl", ROWS[24:34])
    run = tmp_path / "run"
    options = ["--model", str(tiny_llama_folder), "--data", data, "--eval-data", held_out, "--out", str(run)]
    assert main(["train", *options, "--max-steps", "3", "--r", "2", "--eval-answers", "4", "--metrics"]) == 0
    result = json.loads((run / "result.json").read_text())
    assert list(result["metrics_before"]) == list(result["metrics_after"]) == NAMES
    assert len(result["samples"]) == 4
    assert [set(sample) for sample in result["samples"]] == [{"prompt", "reference", "before", "after"}] * 4
    assert [s["reference"] for s in result["samples"]] == [json.loads(row)["completion"] for row in ROWS[24:28]]
    report = (run / "report.html").read_text()
    for part in (
        "token accuracy",
        "The first held-out rows",
        "model.layers.1.self_attn.q_proj",
        "10 rows are held out",
    ):
        assert part in report
    capsys.readouterr()
    command = ["eval", "--adapter", str(run), "--data", held_out, "--eval-answers", "4", "--metrics"]
    assert main(command) == 0
    measured = json.loads(capsys.readouterr().out)
    for name in NAMES:
        expected = result["metrics_after"][name]
        assert measured[name] == pytest.approx(expected["value"], rel=1e-5)
        assert measured["intervals"][name] == pytest.approx([expected["lower"], expected["upper"]], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics", "--task", "seq_cls"], "--metrics needs --task causal_lm"),
        (["--metrics", "--eval-answers", "0"], "give --eval-answers above 0"),
    ],
)
def test_metrics_without_answers_are_refused(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--model", "m", "--data", "d", "--out", str(tmp_path / "run"), *options])
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_metrics_of_rows_that_ask_nothing_are_refused(tiny_llama_folder, tmp_path, capsys):
    data = tmp_path / "texts.txt"
    data.write_text("one text\n\nanother one\n" * 10)
    common = ["--model", str(tiny_llama_folder), "--data", str(data), "--metrics"]
    train = ["train", *common, "--eval-data", str(data), "--max-steps", "1", "--out", str(tmp_path / "run")]
    other = tmp_path / "others.txt"
    other.write_text("a third text\n")
    train[train.index("--eval-data") + 1] = str(other)
    for command in (["eval", *common], train):
        assert main(command) == 2
        assert "no held-out row asks anything that fits" in capsys.readouterr().err


def test_a_missing_package_stops_train_and_eval_before_anything_is_loaded(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(text_metrics, "find_spec", lambda name: None)
    common = ["--model", "nowhere", "--data", "nowhere.jsonl", "--metrics"]
    for command in (["train", *common, "--out", str(tmp_path / "run")], ["eval", *common]):
        assert main(command) == 2
        assert "pip install 'rankwise[metrics]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
