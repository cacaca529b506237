"""Encoders with decoders from the command line, on a tiny random T5 that reads characters."""

import json

import pytest
import torch
from conftest import reads_characters, sweep_two_ranks
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM

from rankwise import load_adapter_
from rankwise.cli.main import main
from rankwise.data.rows import read_rows
from rankwise.data.seq2seq import tokenised_answers
from rankwise.data.tasks import examples_for

ROWS = [
    {"prompt": f"shout {word}", "completion": word[0] * 3} for word in ("ab", "ba", "cd", "dc", "ef", "fe", "gh")
] * 6


@pytest.fixture(scope="module")
def folder(tiny_t5_folder):
    return tiny_t5_folder


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("seq2seq")
    data = jsonl(place / "rows.jsonl", ROWS)
    options = ["--model", str(folder), "--task", "seq2seq_lm", "--data", data, "--eval-data", data]
    # All rows are held out too, so none is left to train on: other white space makes other rows of them.
    jsonl(place / "train.jsonl", [{**row, "prompt": row["prompt"] + " now"} for row in ROWS])
    options[5] = str(place / "train.jsonl")
    assert (
        main(["train", *options, "--epochs", "4", "--lr", "2e-2", "--eval-answers", "7", "--out", str(place / "run")])
        == 0
    )
    return place / "run"


def test_a_run_lowers_the_held_out_loss_and_answers_are_compared(run):
    result = json.loads((run / "result.json").read_text())
    assert result["eval_loss_after"] < result["eval_loss_before"] / 2
    assert result["metric_name"] == "exact_match"
    assert set(result["metrics_after"]) == {"loss", "perplexity", "token_accuracy", "exact_match"}
    assert not result["packed"]
    assert [sample["reference"] for sample in result["samples"]] == [row["completion"] for row in ROWS[:5]]
    assert "the decoder also attends" in (run / "report.html").read_text()


@torch.no_grad()
def test_peft_gives_the_same_logits(run, folder):
    assert json.loads((run / "adapter/adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "labels": torch.tensor([[3, 4, 1]])}
    theirs = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(folder), run / "adapter").eval()
    ours = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    base = ours(**inputs).logits
    load_adapter_(ours, run / "adapter")
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert (ours(**inputs).logits - base).abs().max() > 1e-2


def test_eval_generate_and_merge_agree_with_the_run(run, folder, tmp_path, capsys):
    data = jsonl(tmp_path / "rows.jsonl", ROWS)
    result = json.loads((run / "result.json").read_text())
    assert main(["eval", "--adapter", str(run), "--data", data, "--eval-answers", "7"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["loss"] == pytest.approx(result["eval_loss_after"], rel=1e-5)
    assert measured["exact_match"] == result["metric_after"]
    assert main(["merge", "--adapter", str(run), "--out", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    answers = []
    prompt = ["--prompt", ROWS[0]["prompt"], "--max-new-tokens", "5"]
    for source in (["--adapter", str(run)], ["--model", str(tmp_path / "merged"), "--task", "seq2seq_lm"]):
        assert main(["generate", *source, *prompt]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert answers[0].strip() == result["samples"][0]["after"].strip()


def test_source_and_target_have_the_tokenizers_own_ends(folder, tmp_path):
    tokenizer = reads_characters()
    rows = read_rows(jsonl(tmp_path / "a.jsonl", [{"instruction": "ab", "input": "c", "output": "d"}]), "seq2seq_lm")
    [example] = examples_for("seq2seq_lm", rows, tokenizer, [], 64, "error")
    assert tokenizer.decode(example.source) == "ab\nc</s>"
    assert tokenizer.decode(example.target) == "d</s>"
    assert example.counted == 2


def test_what_a_decoder_cannot_write_is_named_row_by_row(tmp_path, tokenizer):
    user, answer = {"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}
    talks = [[user, answer], [user, answer, user], [user, {**answer, "weight": 0}]]
    rows = read_rows(jsonl(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks]), "seq2seq_lm")
    examples, problems = tokenised_answers(rows, tokenizer)
    assert len(examples) == 1
    assert tokenizer.decode(examples[0].target) == f"c{tokenizer.eos_token}"
    assert [str(problem).split(": ")[0][-9:] for problem in problems] == ["a.jsonl:2", "a.jsonl:3"]
    examples, problems = tokenised_answers(rows[:1], reads_characters())
    assert (examples, len(problems)) == ([], 1)
    assert "no chat template" in str(problems[0])


def test_data_shows_what_encoder_and_decoder_get(folder, tmp_path, capsys):
    data = jsonl(tmp_path / "rows.jsonl", ROWS[:7])
    assert main(["data", data, "--model", str(folder), "--task", "seq2seq_lm"]) == 0
    shown = capsys.readouterr().out
    assert "28 of them trained" in shown
    assert "encoder: shout ab</s>" in shown
    assert "decoder, trained: aaa</s>" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train", "--train-on", "all"], "--train-on all needs --task causal_lm"),
        (["train", "--batches", "alike"], "--batches alike needs --task causal_lm"),
    ],
)
def test_what_does_not_go_with_a_decoder_is_refused(options, message, folder, tmp_path, capsys):
    model = ["--model", str(folder), "--task", "seq2seq_lm", "--data", jsonl(tmp_path / "rows.jsonl", ROWS)]
    with pytest.raises(SystemExit) as end:
        main([*options, *model, "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_a_long_source_is_an_error_that_names_its_row(folder, tmp_path, capsys):
    data = jsonl(tmp_path / "rows.jsonl", ROWS)
    options = ["--task", "seq2seq_lm", "--data", data, "--eval-fraction", "0", "--max-length", "8"]
    assert main(["train", "--model", str(folder), *options, "--out", str(tmp_path / "out")]) == 2
    assert "42 of 42 rows are longer than 8 tokens" in capsys.readouterr().err


def test_a_causal_model_is_no_sequence_to_sequence_model(tiny_llama_folder, tmp_path, capsys):
    data = jsonl(tmp_path / "rows.jsonl", ROWS)
    options = ["--task", "seq2seq_lm", "--data", data, "--out", str(tmp_path / "out")]
    assert main(["train", "--model", str(tiny_llama_folder), *options]) == 2
    assert "cannot be loaded for seq2seq_lm" in capsys.readouterr().err


def test_ranks_are_predicted_and_compared(folder, tmp_path):
    rows = [{**row, "prompt": f"{row['prompt']} {number}"} for number, row in enumerate(ROWS)]
    data = jsonl(tmp_path / "rows.jsonl", rows)
    common = ["--model", str(folder), "--task", "seq2seq_lm", "--data", data]
    common += ["--eval-fraction", "0.4", "--max-steps", "3"]
    sweep_two_ranks(common, tmp_path / "sweep")
    predict = ["--signal-batches", "2", "--directions", "4", "--batch-size", "4"]
    assert main(["rank", "predict", *common, *predict, "--out", str(tmp_path / "predict.json")]) == 0
