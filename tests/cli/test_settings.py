"""Every setting of `rankwise train` is a flag and a YAML key, and --print-config shows what a run would be given."""

import re
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml
from conftest import ROOT

from rankwise.cli.arguments import parse
from rankwise.cli.main import main
from rankwise.cli.rank_config import READ_BY_TRAIN_ALONE
from rankwise.cli.rank_predict import PredictConfig
from rankwise.cli.rank_sweep import SweepConfig
from rankwise.train.config import TrainConfig

REQUIRED = {"model": "smollm2-135m", "data": "rows.jsonl", "out": "runs/a"}
OTHER = {
    "model": "a model",
    "data": ["one.jsonl", "two.csv:2"],
    "out": "runs/ä b",
    "task": "seq_cls",
    "format": "text",
    "columns": ["prompt=question", "completion=answer"],
    "train_on": "last",
    "eval_data": ["held out.jsonl", "more"],
    "eval_fraction": 0.25,
    "eval_answers": 7,
    "metrics": True,
    "r": 5,
    "lora_alpha": 5.5,
    "lora_dropout": 0.1,
    "target_modules": [r".*\.(q|v)_proj"],
    "layers_to_transform": [1, 3],
    "init_lora_weights": "pissa",
    "use_rslora": True,
    "use_dora": True,
    "epochs": 2.5,
    "max_steps": 9,
    "batch_size": 3,
    "batch_tokens": 4000,
    "accumulate": 2,
    "batches": "alike",
    "max_length": 99,
    "long_rows": "cut",
    "lr": "auto",
    "lr_schedule": "cosine",
    "warmup": 0.5,
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,
    "lora_plus_ratio": 16.0,
    "preconditioned": True,
    "label_smoothing": 0.1,
    "eval_steps": 11,
    "patience": 0,
    "save_steps": 13,
    "tracker": ["tensorboard", "wandb"],
    "base_dtype": "bf16",
    "recompute": "auto",
    "cache_gb": 0.5,
    "explain_engine": True,
    "seed": 14,
}
"""A value of each setting that is not the default."""


def flags(settings):
    found = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        found += [flag] if value is True else [flag, *map(str, value if isinstance(value, list) else [value])]
    return found


def printed(capsys, *options):
    capsys.readouterr()
    assert main(["train", *map(str, options), "--print-config"]) == 0
    return capsys.readouterr().out


def names_in_help(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    listed = re.findall(r"^[│ ] --([a-z][a-z-]*)", capsys.readouterr().out, re.MULTILINE)
    return {flag.removeprefix("no-").replace("-", "_") for flag in listed}


def test_the_flags_of_the_help_are_the_keys_of_the_settings(capsys):
    assert names_in_help("train", capsys) == {field.name for field in fields(TrainConfig)} == OTHER.keys()


def test_flags_that_a_command_does_not_read_are_not_in_its_help(capsys):
    for command in ("rank sweep", "rank nested", "rank predict"):
        assert names_in_help(command, capsys) & OTHER.keys() >= OTHER.keys() - {*READ_BY_TRAIN_ALONE, "r"}
        assert not names_in_help(command, capsys) & set(READ_BY_TRAIN_ALONE)


@pytest.mark.parametrize("task", ["causal_lm", "seq_cls"])
@pytest.mark.parametrize(("config_class", "command"), [(SweepConfig, "rank sweep"), (PredictConfig, "rank predict")])
def test_a_rank_command_takes_any_run_yaml_and_passes_over_what_it_does_not_read(task, config_class, command, tmp_path):
    named = READ_BY_TRAIN_ALONE if task == "causal_lm" else ("eval_steps", "patience", "save_steps", "tracker")
    run = parse(TrainConfig, flags(REQUIRED | {"task": task} | {name: OTHER[name] for name in named}), "train")
    (tmp_path / "run.yaml").write_text(run.as_yaml())
    given = parse(config_class, ["--config", str(tmp_path / "run.yaml")], command)
    assert given == config_class(**REQUIRED | {"task": task})
    assert given.as_dict().keys() & OTHER.keys() == OTHER.keys() - set(READ_BY_TRAIN_ALONE)


@pytest.mark.parametrize("name", OTHER)
def test_a_setting_means_the_same_as_a_flag_as_a_yaml_key_and_after_printing(name, tmp_path, capsys):
    settings = {**REQUIRED, name: OTHER[name]}
    by_flags = parse(TrainConfig, flags(settings), "train")
    for key in (name, name.replace("_", "-")):
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump({**REQUIRED, key: OTHER[name]}))
        assert parse(TrainConfig, ["--config", str(tmp_path / "settings.yaml")], "train") == by_flags
    text = printed(capsys, *flags(settings))
    assert yaml.safe_load(text).keys() == OTHER.keys()
    assert by_flags.as_dict()[name] == OTHER[name]
    (tmp_path / "printed.yaml").write_text(text)
    assert parse(TrainConfig, ["--config", str(tmp_path / "printed.yaml")], "train") == by_flags
    assert printed(capsys, "--config", tmp_path / "printed.yaml") == text


def test_names_that_begin_with_a_dash_come_back_from_a_file(tmp_path, capsys):
    settings = {"model": "-m", "out": "-run", "data": ["-d.jsonl", "-e.jsonl"], "eval_data": "-h.jsonl"}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    found = yaml.safe_load(printed(capsys, "--config", tmp_path / "settings.yaml"))
    assert {name: found[name] for name in settings} == settings


def test_what_is_printed_is_what_run_yaml_holds(tiny_llama_folder, tmp_path, capsys):
    rows = (ROOT / "examples/text_to_sql/train.jsonl").read_text().splitlines()[:6]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    options = ["--model", tiny_llama_folder, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "run"]
    options += ["--max-steps", "1", "--r", "2", "--eval-fraction", "0"]
    text = printed(capsys, *options)
    assert not (tmp_path / "run").exists()
    assert main(["train", *map(str, options)]) == 0
    assert (tmp_path / "run/run.yaml").read_text() == text


def test_printing_loads_no_model_and_no_torch_and_wrong_settings_are_still_refused():
    code = (
        "import sys\nfrom rankwise.cli.main import main\n"
        "assert main(['train', '--print-config', '--model', 'm', '--data', 'd', '--out', 'o']) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "main(['train', '--print-config', '--model', 'm', '--data', 'd', '--out', 'o', '--epochs', '0'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "--epochs must be above 0" in result.stderr
    assert yaml.safe_load(result.stdout)["model"] == "m"
