"""The commands as a user types them, on a tiny model with SmolLM2's tokenizer and on MiniLM."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, with_options
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from rankwise import load_adapter_, read_adapter
from rankwise.cli.main import main
from rankwise.errors import ModelError
from rankwise.models.load import load_model

SQL = [json.loads(line) for line in (ROOT / "examples/text_to_sql/train.jsonl").read_text().splitlines()[:40]]
INTENTS = [json.loads(line) for line in (ROOT / "examples/intents/train.jsonl").read_text().splitlines()]


def jsonl(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def sql(tmp_path):
    return jsonl(tmp_path / "sql.jsonl", SQL)


@pytest.fixture
def train(tiny_llama_folder, sql, tmp_path):
    """Run `rankwise train` on the tiny model; returns (exit code, run folder)."""

    def run(*options: str, out: str = "run", data: str = sql) -> tuple[int, Path]:
        target = tmp_path / out
        base = ["--model", str(tiny_llama_folder), "--data", data, "--out", str(target), "--max-steps", "6"]
        return main(["train", *with_options([*base, "--lr", "0.01", "--r", "4"], *options)]), target

    return run


def test_train_leaves_a_complete_run_folder(train, tiny_llama_folder):
    code, run = train("--eval-answers", "2")
    assert code == 0
    result = json.loads((run / "result.json").read_text())
    assert result["eval_loss_after"] < result["eval_loss_before"]
    assert result["metric_name"] == "exact_match"
    assert result["metric_before"] == 0.0
    assert result["base_sha256_before"] == result["base_sha256_after"]
    assert result["steps"] == 6
    assert not result["interrupted"]
    assert result["useful_tokens_per_second"] == pytest.approx(result["useful_tokens"] / result["seconds"])
    assert result["peak_memory_bytes"] > 1e8
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    assert result["total_parameters"] == sum(p.numel() for p in plain.parameters())
    update = load_adapter_(plain, run / "adapter")
    assert result["trainable_parameters"] == update.trainable_parameters
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["number"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000005", "step-000006"]
    assert (run / "report.html").is_file()


def test_the_same_seed_gives_the_same_adapter_byte_for_byte_and_run_yaml_repeats_it(train, tmp_path):
    _, first = train("--eval-fraction", "0", "--lora-dropout", "0.1", "--seed", "5")
    assert main(["train", "--config", str(first / "run.yaml"), "--out", str(tmp_path / "again")]) == 0
    _, other = train("--eval-fraction", "0", "--lora-dropout", "0.1", "--seed", "6", out="other")
    names = ["adapter_config.json", "adapter_model.safetensors"]
    same = [(run / "adapter" / name).read_bytes() for run in (first, tmp_path / "again") for name in names]
    assert same[:2] == same[2:]
    assert (other / "adapter" / names[1]).read_bytes() != same[1]
    assert json.loads((first / "result.json").read_text())["eval_loss_before"] is None


def test_a_classifier_learns_and_is_evaluated_and_merged_with_its_labels(tmp_path, capsys):
    labels = {"translate", "timer", "weather", "tell_joke"}
    rows = [row for row in INTENTS if row["label"] in labels]
    data = jsonl(tmp_path / "data.jsonl", rows[:150])
    test = jsonl(tmp_path / "test.jsonl", rows[150:])
    run = tmp_path / "run"
    options = ["--model", "minilm-l6", "--task", "seq_cls", "--data", data, "--out", str(run), "--epochs", "3"]
    assert main(["train", *options]) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["metric_name"] == "accuracy"
    assert result["metric_before"] < 0.8 < 0.9 < result["metric_after"]
    capsys.readouterr()
    assert main(["eval", "--adapter", str(run), "--data", test]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["accuracy"] > 0.9
    assert main(["merge", "--adapter", str(run), "--out", str(tmp_path / "merged")]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    right = 0
    for row in rows[150:]:
        with torch.no_grad():
            logits = merged(**tokenizer(row["text"], return_tensors="pt")).logits
        right += merged.config.id2label[logits.argmax().item()] == row["label"]
    assert right / measured["rows"] == measured["accuracy"]


def test_eval_measures_what_train_measured(train, capsys, tmp_path):
    held_out = [jsonl(tmp_path / f"held_out_{part}.jsonl", SQL[30 + part :: 2]) for part in (0, 1)]
    _, run = train("--eval-data", *held_out, "--eval-answers", "2")
    result = json.loads((run / "result.json").read_text())
    capsys.readouterr()
    assert main(["eval", "--adapter", str(run), "--data", *held_out, "--eval-answers", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(result["eval_loss_after"], rel=1e-5)
    model = read_adapter(run / "adapter").config.base_model_name_or_path
    assert main(["eval", "--model", str(model), "--data", *held_out, "--eval-answers", "0"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["loss"] == pytest.approx(result["eval_loss_before"], rel=1e-5)
    assert measured["rows"] == len(SQL[30:])
    for command in (["eval", "--model", str(model)], ["shrink", str(run), "--out", str(tmp_path / "small")]):
        assert main([*command, "--data", f"{held_out[0]}:2"]) == 2
        assert "a weight says how often rows train; leave it out of held-out data" in capsys.readouterr().err
    assert train("--eval-data", f"{held_out[0]}:2", "--out", str(tmp_path / "other"))[0] == 2
    assert "leave it out of held-out data" in capsys.readouterr().err


def test_generate_answers_one_prompt_or_a_file_with_base_adapter_or_both(train, capsys, tmp_path, tiny_llama_folder):
    _, run = train("--eval-fraction", "0")
    capsys.readouterr()
    common = ["generate", "--adapter", str(run), "--max-new-tokens", "4"]
    assert main([*common, "--prompt", "hi"]) == 0
    adapter = capsys.readouterr().out
    assert main(["generate", "--model", str(tiny_llama_folder), "--max-new-tokens", "4", "--prompt", "hi"]) == 0
    base = capsys.readouterr().out
    assert main([*common, "--prompt", "hi", "--use", "both"]) == 0
    assert capsys.readouterr().out == f"base: {base}adapter: {adapter}"
    file = jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a long prompt to answer"}, {"prompt": "hi"}])
    assert main([*common, "--data", file, "--use", "both"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "base", "adapter"}] * 2
    assert rows[1]["base"] + "\n" == base
    assert rows[1]["adapter"] + "\n" == adapter


def test_merge_writes_a_folder_that_plain_transformers_loads(train, tiny_llama_folder, tmp_path):
    _, run = train("--eval-fraction", "0")
    assert main(["merge", "--adapter", str(run), "--out", str(tmp_path / "merged")]) == 0
    adapted = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()
    load_adapter_(adapted, run / "adapter")
    ids = torch.arange(3, 19)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 49152


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--r", "33"], "and r = 33 is larger"),
        (["--target-modules", "q_porj"], "nearest: 'q_proj'"),
        (["--data", "nowhere.jsonl"], "no such data file: nowhere.jsonl"),
        (["--model", "smollm"], "nearest: 'smollm2-135m'"),
        (["--max-length", "60"], "rows are longer than 60 tokens"),
        (["--task", "seq_cls"], "fits --task causal_lm"),
    ],
)
def test_a_wrong_setting_is_one_clear_message_and_exit_code_2(train, capsys, options, message):
    code, run = train(*options)
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert not run.exists(), "nothing is left behind"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval --model m --data d --max-length -5", "--max-length must be at least 2, found -5"),
        ("generate --model m --prompt a --columns prompt=q", "--columns goes with --data"),
        ("generate --model m --prompt a --first 3", "--first goes with --data"),
        ("generate --model m --prompt a --use adapter", "--use adapter needs an --adapter"),
        ("generate --model m --data f:2", "leave it out of held-out data"),
        ("generate --model m --data f --first -22", "--first must be at least 1, found -22"),
        ("generate --model m --data f --first 0", "--first must be at least 1, found 0"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_anything_is_loaded(command, message, capsys):
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err


LONG = "a" * 300


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --model MODEL --data ROWS --out FILE/sub", "FILE/sub: Not a directory"),
        ("train --model MODEL --data ROWS --out /proc/x", "/proc/x: No such file or directory"),
        (f"train --model MODEL --data ROWS --out {LONG}", "File name too long"),
        (f"train --model MODEL --data {LONG} --out o", "File name too long"),
        (f"train --model {LONG} --data ROWS --out o", "File name too long"),
        (f"train --resume {LONG}", "File name too long"),
        (f"data {LONG} --model MODEL", "File name too long"),
        (f"plan --model {LONG}", "File name too long"),
        (f"plan --config {LONG}.json", "File name too long"),
        (f"eval --adapter {LONG} --data ROWS", "File name too long"),
        (f"eval --model MODEL --data {LONG}", "File name too long"),
        (f"generate --model MODEL --data {LONG}", "File name too long"),
    ],
)
def test_a_name_that_the_system_refuses_is_one_message(
    command, message, sql, tmp_path, tiny_llama_folder, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    options = command.replace("MODEL", str(tiny_llama_folder)).replace("ROWS", sql).split()
    assert main(options) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_may_not_be_read_is_not_said_to_be_written(monkeypatch, capsys):
    def refuse(entries):
        yield from ()
        raise PermissionError(13, "Permission denied", entries[0])

    monkeypatch.setattr("rankwise.data.rows.read_sources", refuse)
    assert main(["data", "mine.jsonl", "--model", "smollm2-135m"]) == 2
    assert "error: cannot use mine.jsonl: Permission denied; check the name" in capsys.readouterr().err
    with pytest.raises(PermissionError):
        main(["--traceback", "data", "mine.jsonl", "--model", "smollm2-135m"])


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--lora-alhpa", "3"], ["Unrecognized options: --lora-alhpa", "--lora-alpha"]),
        (["--r", "eight"], ["--r", "eight"]),
        (["--lr", "-1", "--epochs", "0"], ["--lr must be above 0", "--epochs must be above 0"]),
        (
            ["--r", "0", "--lora-dropout", "2", "--lora-alpha", "-1"],
            ["--r must be a whole number of at least 1", "--lora-dropout must lie in", "--lora-alpha must be above 0"],
        ),
        (["--r", "-3"], ["--r must be a whole number of at least 1"]),
    ],
)
def test_a_wrong_flag_names_the_nearest_one(train, capsys, options, messages):
    with pytest.raises(SystemExit) as end:
        train(*options)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert all(message in error for message in messages)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lora_alhpa: 3", "'lora_alhpa' (nearest: 'lora_alpha'"),
        ("r: [1, {}]", "settings.yaml holds invalid settings:\n  - r must be a whole number or auto, found [1,"),
        ("metrics: 1", "metrics must be true or false, found 1"),
        ("metrics: 'yes'", "metrics must be true or false, found 'yes'"),
        ("seed: [1, 2]", "seed must be a whole number, found [1, 2]"),
        ("seed: true", "seed must be a whole number, found True"),
        ("seed: 1.5", "seed must be a whole number, found 1.5"),
        ("lr: fast", "lr must be a number or auto, found 'fast'"),
        ("batches: 3", "batches must be random or alike, found 3"),
        ("columns: [{}]", "columns must be text, or a list of them, found [{}]"),
        ("eval_data: ''", "eval_data must be the name of a file or folder, or a list of them, found ''"),
        ("out: 2026-13-45", "is not valid YAML: month must be in 1..12"),
        ("max_steps: 2\nmax_steps: 3", "'max_steps' is given 2 times"),
        ("max_steps: 2\nmax-steps: 3\nseed: x", "'max_steps' is given 2 times\n  - seed must be a whole number"),
        ("- r", "must hold keys with values"),
        ("r: [", "is not valid YAML"),
        ("r: " + "[" * 5000 + "]" * 5000, "is nested too deeply"),
        ("r: " + "{a: " * 5000 + "1" + "}" * 5000, "is nested too deeply"),
    ],
)
def test_a_wrong_yaml_file_is_one_clear_message(train, capsys, tmp_path, content, message):
    (tmp_path / "settings.yaml").write_text(content)
    code, _ = train("--config", str(tmp_path / "settings.yaml"))
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "place"),
    [(["--data", ""], "--data"), (["--eval-data="], "--eval-data"), (["--data", "a", ""], "a")],
)
def test_an_empty_value_is_refused(train, capsys, options, place):
    assert train(*options)[0] == 2
    assert f"an empty value stands after {place}; is a variable not set?" in capsys.readouterr().err
    assert main(["data", "", "--model", "m"]) == 2
    assert "an empty value stands after rankwise data;" in capsys.readouterr().err


def test_flags_win_over_the_yaml_file(train, tmp_path):
    (tmp_path / "settings.yaml").write_text(
        "lora-alpha: 8\nseed: 3\neval_fraction: 0\ntarget_modules: [q_proj, v_proj]"
    )
    _, run = train("--config", str(tmp_path / "settings.yaml"), "--seed", "4")
    written = yaml.safe_load((run / "run.yaml").read_text())
    assert (written["lora_alpha"], written["seed"], written["target_modules"]) == (8.0, 4, ["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--data b.jsonl", "--data"),
        ("--data=b.jsonl --seed 1 --seed=2", "--data, --seed"),
        ("--metrics --no-metrics", "--metrics"),
        ("--eval-data a --eval_data b --columns prompt=q --columns completion=a", "--eval-data, --columns"),
    ],
)
def test_an_option_that_stands_twice_is_refused_because_one_of_its_values_would_be_lost(options, named, capsys):
    assert main(["train", "--model", "m", "--out", "o", "--data", "a.jsonl", *options.split(), "--print-config"]) == 2
    assert f"given more than once: {named}; " in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_not_touched(train, capsys):
    _, run = train("--eval-fraction", "0")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, _ = train("--eval-fraction", "0")
    assert code == 2
    assert "already holds something" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_what_was_trained_before_a_loss_that_is_not_finite_is_saved(train, capsys, tiny_llama_folder):
    code, run = train("--max-steps", "3", "--lr", "1e9", "--save-steps", "100")
    error = capsys.readouterr().err
    assert code == 2
    assert "not finite at step 2" in error
    assert "try a lower --lr than 1e+09" in error
    assert f"The newest checkpoint, an adapter folder too, is {run / 'checkpoints/step-000001'}" in error
    load_adapter_(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), run / "checkpoints/step-000001")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "options", [[], ["--eval-steps", "1"], ["--eval-fraction", "0"], ["--eval-steps", "1", "--max-steps", "2"]]
)
def test_a_step_that_goes_astray_is_an_error_and_leaves_no_adapter(train, capsys, options):
    code, run = train(*with_options(["--max-steps", "1", "--lr", "1e25"], *options))
    assert code == 2
    error = capsys.readouterr().err
    assert "the loss is not finite after step 1; try a lower --lr than 1e+25. No checkpoint was saved yet" in error
    assert sorted(path.name for path in run.iterdir() if path.name != ".lock") == ["run.yaml", "start.json"]


def test_labels_that_train_lacks_are_named(tmp_path, capsys):
    data = jsonl(tmp_path / "data.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    held_out = jsonl(tmp_path / "held_out.jsonl", [{"text": "c", "label": "z"}])
    options = ["--model", "minilm-l6", "--task", "seq_cls", "--data", data, "--eval-data", held_out]
    assert main(["train", *options, "--out", str(tmp_path / "run")]) == 2
    assert "held_out.jsonl:1: 'z'" in capsys.readouterr().err


def test_an_encoder_is_refused_as_a_language_model(sql, tmp_path, capsys):
    assert main(["train", "--model", "minilm-l6", "--data", sql, "--out", str(tmp_path / "run")]) == 2
    assert "it belongs to another kind of model" in capsys.readouterr().err
    with pytest.raises(ModelError, match="minilm-l6 is no causal language model"):
        load_model("minilm-l6", "causal_lm")


def test_a_model_of_another_task_names_that_task(tmp_path, sql, tokenizer, capsys):
    T5ForConditionalGeneration(T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    assert main(["train", "--model", str(tmp_path), "--data", sql, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "cannot be loaded for causal_lm; give --task seq_cls or" in error
    assert "seq2seq_lm" in error
    assert len(error.splitlines()[-1]) < 400


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "'train'" in capsys.readouterr().err


def test_a_damaged_adapter_is_one_clear_message(train, capsys, sql):
    _, run = train("--eval-fraction", "0")
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    capsys.readouterr()
    assert main(["eval", "--adapter", str(run), "--data", sql]) == 2
    assert "adapter_model.safetensors is damaged" in capsys.readouterr().err
