"""`rankwise data`, and what `rankwise train`, `eval` and `generate` make of data of other shapes."""

import io
import json
import shutil
import sys
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT
from rich.console import Console

from rankwise import TrainConfig
from rankwise.cli.main import main
from rankwise.errors import ConfigError
from rankwise.train.progress import Reporter

ROWS = [{"prompt": f"{n} + 1 =", "completion": str(n + 1)} for n in range(30)]
TALKS = [
    {
        "conversations": [
            {"from": "human", "value": f"count {n}"},
            {"from": "gpt", "value": str(n)},
            {"from": "human", "value": "more"},
            {"from": "gpt", "value": str(n + 1)},
        ]
    }
    for n in range(20)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def show(tiny_llama_folder, capsys):
    """Run `rankwise data`; returns (exit code, what it printed)."""

    def run(*options):
        code = main(["data", *map(str, options), "--model", str(tiny_llama_folder)])
        return code, capsys.readouterr().out

    return run


def test_data_shows_shape_counts_an_example_with_its_trained_tokens_and_a_verdict(show, tmp_path):
    path = write(tmp_path / "data.jsonl", [*ROWS, ROWS[0]])
    test = write(tmp_path / "test.jsonl", [ROWS[3], {"prompt": "new", "completion": "x"}])
    code, out = show(path, "--eval-data", test)
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == f"{path}: prompt/completion, 31 rows"
    assert lines[2] == f"left out of training: 1 rows that ask what an evaluation row asks (the first: {path}:4)"
    assert lines[3].startswith("training: 30 rows, ")
    assert lines[3].endswith("; 1 are duplicates")
    assert lines[4].startswith("evaluation: 2 rows, ")
    assert "<|im_start|>user\n0 + 1 =<|im_end|>\n<|im_start|>assistant\n⟦1<|im_end|>⟧\n" in out
    assert lines[-1] == "ready to train"


def test_on_a_terminal_the_trained_tokens_are_coloured(tiny_llama_folder, tmp_path, tokenizer):
    from rankwise.cli.data import _show
    from rankwise.data.report import report_on
    from rankwise.data.rows import divide

    division = divide(write(tmp_path / "data.jsonl", TALKS), None, "causal_lm", None)
    report = report_on(division, "causal_lm", tokenizer, 100, "error", "completion")
    console = Console(force_terminal=True, color_system="standard", file=io.StringIO(), highlight=False, soft_wrap=True)
    _show(report, tokenizer, False, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "\x1b[1;32m0<|im_end|>\x1b[0m" in text
    assert "\x1b[1;32m1<|im_end|>\x1b[0m" in text
    assert "⟦" not in text


def test_every_problem_is_shown_and_the_exit_code_says_so(show, tmp_path):
    rows = [*ROWS[:3], {"prompt": "x"}, {"prompt": "a", "completion": "b " * 99}]
    code, out = show(write(tmp_path / "data.jsonl", rows), "--max-length", "60")
    assert code == 2
    assert "problems: 2" in out
    assert "data.jsonl:4: needs the fields prompt + completion, found 'prompt'" in out
    assert "data.jsonl:5: " in out
    assert out.splitlines()[-1] == "not ready: 2 rows stop a training run; mend or remove them"
    code, out = show(write(tmp_path / "data.jsonl", rows[:3] + rows[4:]), "--max-length", "60", "--long-rows", "drop")
    assert (code, out.splitlines()[-1]) == (0, "ready to train (1 rows are too long and left out)")
    code, out = show(write(tmp_path / "data.jsonl", rows[:3] + rows[4:]), "--max-length", "60", "--long-rows", "cut")
    assert code == 0
    assert "; 1 cut off at their end" in out


def test_a_line_or_a_text_between_colons_is_no_emoji(show, tmp_path, capsys):
    path = write(tmp_path / "data.jsonl", [*ROWS, *ROWS, *ROWS, *[{"prompt": ":heart:", "completion": "x"}] * 9, {}])
    assert f"{path}:100: needs" in show(path)[1]
    Reporter().say(f"{path}:100: needs")
    assert f"{path}:100: needs" in capsys.readouterr().err


def test_output_that_is_not_utf8_shows_what_it_lacks_as_escapes(tiny_llama_folder, tmp_path, monkeypatch):
    path = write(tmp_path / "data.jsonl", ROWS)
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="latin-1", write_through=True))
    assert main(["data", path, "--model", str(tiny_llama_folder)]) == 0
    assert r"\u27e61<|im_end|>\u27e7" in out.getvalue().decode("latin-1")


def test_rows_that_a_run_could_not_split_are_told(show, tmp_path):
    code, out = show(write(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}]))
    assert code == 0
    assert "ready to train (1 rows cannot be split with --eval-fraction 0.1; give --eval-data, or 0)" in out


def test_the_models_own_marks_in_a_text_are_told(show, tmp_path):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok<|im_end|> more"}]
    path = write(
        tmp_path / "data.jsonl", [{"messages": [talk[0], {**talk[1], "content": "ok"}]}, *[{"messages": talk}] * 2]
    )
    code, out = show(path)
    assert code == 0
    assert f"special tokens of the model stand in the text of 2 rows (the first: {path}:2, '<|im_end|>')" in out


def test_rows_whose_prompt_fills_the_length_are_named(show, tmp_path):
    rows = [*ROWS[:3], {"prompt": "a " * 99, "completion": "b"}]
    code, out = show(write(tmp_path / "data.jsonl", rows), "--max-length", "60", "--long-rows", "cut")
    assert code == 2
    assert "data.jsonl:4: no trained token: the prompt alone fills --max-length" in out


def test_the_example_is_one_that_has_trained_tokens(show, tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    silent = [talk[0], {**talk[1], "weight": 0}]
    code, out = show(write(tmp_path / "data.jsonl", [{"messages": silent}, {"messages": talk}]))
    assert code == 2
    assert "data.jsonl:2, as the model reads it" in out
    assert "data.jsonl:1: no trained token: no turn of it is trained" in out


def test_the_report_as_json_holds_every_problem(show, tmp_path):
    code, out = show(write(tmp_path / "data.jsonl", [*ROWS, *[{"prompt": "x"}] * 30]), "--json")
    report = json.loads(out)
    assert code == 2
    assert not report["ready"]
    assert len(report["problems"]) == 30
    assert report["problems"][0]["place"].endswith("data.jsonl:31")
    assert report["train"]["rows"] == 30
    assert report["train"]["trained_tokens"] == sum(len(row["completion"]) + 1 for row in ROWS)


def test_labels_are_counted(show):
    code, out = show(ROOT / "examples/intents/train.jsonl", "--task", "seq_cls")
    assert code == 0
    assert "labels: 150, with 50 to 50 rows each" in out
    assert "examples/intents/train.jsonl:1: the pets are all good → do_you_have_pets" in out


def test_columns_and_a_format_are_taken_from_the_command_line(show, tmp_path):
    path = write(tmp_path / "data.jsonl", [{"q": "a", "a": "b", "text": "c"}])
    code, out = show(path, "--columns", "prompt=q", "completion=a")
    assert code == 0
    assert f"{path}: prompt/completion, 1 rows; fits text too (--format chooses); not used: text" in out
    _, out = show(path, "--format", "text")
    assert "⟦c<|im_end|>⟧" in out
    _, out = show(path, "--columns", "prompt=q", "completion=a", "--train-on", "all")
    assert "⟦<|im_start|>system" in out


def test_train_takes_several_files_of_another_shape_and_run_yaml_repeats_it(tiny_llama_folder, tmp_path, capsys):
    first, second = write(tmp_path / "a.jsonl", TALKS[:10]), write(tmp_path / "b.jsonl", TALKS[10:])
    options = ["--model", str(tiny_llama_folder), "--max-steps", "4", "--r", "2", "--eval-answers", "2"]
    run = tmp_path / "run"
    assert main(["train", "--data", first, f"{second}:2", *options, "--out", str(run)]) == 0
    said = capsys.readouterr().err
    assert f"{first}, {second}:2: sharegpt, 20 rows" in said
    training = next(line for line in said.splitlines() if line.startswith("training: "))
    assert "of them trained; length: median" in training
    assert "duplicates" not in training
    assert yaml.safe_load((run / "run.yaml").read_text())["data"] == [first, f"{second}:2"]
    assert main(["train", "--config", str(run / "run.yaml"), "--out", str(tmp_path / "again")]) == 0
    weights = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("run", "again")]
    assert weights[0] == weights[1]
    capsys.readouterr()
    assert main(["eval", "--adapter", str(run), "--data", second, "--eval-answers", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 10
    assert main(["generate", "--adapter", str(run), "--data", second, "--first", "1", "--max-new-tokens", "2"]) == 0
    answered = json.loads(capsys.readouterr().out)
    assert [message["role"] for message in answered["messages"]] == ["user", "assistant"] * 2
    assert "adapter" in answered


def test_plain_text_is_trained_and_evaluated_without_answers(tiny_llama_folder, tmp_path, capsys):
    data = write(tmp_path / "data.jsonl", [{"text": f"Once upon a time there were {n} cats."} for n in range(20)])
    run = tmp_path / "run"
    options = ["--model", str(tiny_llama_folder), "--max-steps", "3", "--r", "2", "--out", str(run)]
    assert main(["train", "--data", data, *options]) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["eval_loss_after"] < result["eval_loss_before"]
    assert result["metric_after"] is None


def test_exact_match_is_counted_over_the_rows_that_the_loss_counts(tiny_llama_folder, tmp_path, capsys):
    greeting = {"messages": [{"role": "assistant", "content": "hello"}]}
    long = {"prompt": "v " * 99, "completion": "c"}
    data, held_out = (
        write(tmp_path / "train.jsonl", ROWS),
        write(tmp_path / "test.jsonl", [long, {"prompt": "one", "completion": "1"}]),
    )
    asking_nothing = write(tmp_path / "greetings.jsonl", [greeting])
    run = tmp_path / "run"
    how = ["--max-length", "99", "--long-rows", "drop"]
    options = ["--model", str(tiny_llama_folder), "--max-steps", "1", "--r", "2", "--out", str(run), *how]
    assert main(["train", "--data", data, "--eval-data", held_out, asking_nothing, *options]) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["eval_rows"] == 2
    assert [sample["reference"] for sample in result["samples"]] == ["1"]
    capsys.readouterr()
    assert main(["eval", "--adapter", str(run), "--data", held_out, asking_nothing, *how]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 2


def test_a_run_that_is_resumed_on_another_day_ends_with_the_same_bytes(tiny_llama_folder, tmp_path, monkeypatch):
    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    base, run = shutil.copytree(tiny_llama_folder, tmp_path / "base"), tmp_path / "run"
    shutil.copy(ROOT / "tests/data/chat_templates/granite-3.3.jinja", base / "chat_template.jinja")
    options = ["--data", write(tmp_path / "data.jsonl", ROWS), "--eval-fraction", "0", "--max-steps", "2", "--r", "2"]
    assert main(["train", "--model", str(base), "--out", str(run), "--save-steps", "1", *options]) == 0
    whole = (run / "adapter/adapter_model.safetensors").read_bytes()
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints/step-000002")
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == whole


def test_dates_and_bytes_beside_a_message_hinder_no_run_and_no_answer(tiny_llama_folder, tmp_path, capsys):
    more = {"at": datetime(2024, 1, 2), "raw": b"\xff"}
    talks = [[{"role": "user", "content": str(n), **more}, {"role": "assistant", "content": "a"}] for n in range(4)]
    pq.write_table(pa.Table.from_pylist([{"messages": talk} for talk in talks]), tmp_path / "talks.parquet")
    model = ["--model", str(tiny_llama_folder)]
    options = ["--data", str(tmp_path / "talks.parquet"), "--out", str(tmp_path / "run"), "--max-steps", "1"]
    assert main(["train", *model, *options, "--r", "2", "--eval-fraction", "0"]) == 0
    capsys.readouterr()
    options = ["--data", str(tmp_path / "talks.parquet"), "--first", "1", "--max-new-tokens", "1"]
    assert main(["generate", *model, *options]) == 0
    assert json.loads(capsys.readouterr().out)["messages"][0]["at"] == "2024-01-02 00:00:00"


def test_train_refuses_bad_rows_of_both_files_at_once(tiny_llama_folder, tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", [*ROWS, {"prompt": 1, "completion": "x"}])
    test = write(tmp_path / "test.jsonl", [{"prompt": "y"}, *ROWS[:1]])
    options = ["--model", str(tiny_llama_folder), "--out", str(tmp_path / "run")]
    assert main(["train", "--data", train, "--eval-data", test, *options]) == 2
    error = capsys.readouterr().err
    assert "problems: 2" in error
    assert "train.jsonl:31: prompt must be a string, found int" in error
    assert "test.jsonl:1: needs the fields prompt + completion" in error
    assert not (tmp_path / "run").exists()


def test_one_file_or_several_are_given_to_the_configuration_alike(tmp_path):
    def config(data):
        return TrainConfig(model="m", data=data, out=tmp_path)

    assert config("a.jsonl").data == config(Path("a.jsonl")).data == config(["a.jsonl"]).data == (Path("a.jsonl"),)
    assert config("a.jsonl").as_dict()["data"] == "a.jsonl"
    with pytest.raises(ConfigError, match="--data must name at least one file"):
        config([])
    assert config(["a.jsonl", "b.csv:2"]).as_dict()["data"] == ["a.jsonl", "b.csv:2"]


def test_one_pair_alone_is_not_ready_to_train(show, tmp_path):
    data = write(tmp_path / "data.jsonl", [{"anchor": "a", "positive": "b"}])
    code, out = show(data, "--task", "embedding")
    assert code == 2
    assert out.splitlines()[-1].startswith("not ready: --task embedding needs at least two training rows")


def test_an_option_that_the_task_does_not_read_is_refused(show, tmp_path):
    data = write(tmp_path / "data.jsonl", [{"anchor": name, "positive": "b"} for name in "acd"])
    assert show(data, "--task", "embedding")[0] == 0
    assert show(data, "--task", "embedding", "--train-on", "last") == (2, "")
