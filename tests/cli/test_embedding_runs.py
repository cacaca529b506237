"""Embeddings from the command line, on MiniLM and the shipped pairs of questions."""

import json
import runpy

import pytest
import torch
from conftest import ROOT, sweep_two_ranks
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from rankwise.cli.main import main

EXAMPLE = ROOT / "examples/similar_questions"
TRAIN = ["train", "--model", "minilm-l6", "--task", "embedding"]


def some_of(name, count, folder):
    lines = (EXAMPLE / name).read_text().splitlines()[:count]
    path = folder / name
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedding")
    options = ["--data", str(EXAMPLE / "train.jsonl"), "--eval-data", some_of("test.jsonl", 40, folder)]
    steps = ["--max-steps", "4", "--batch-size", "16", "--lr", "2e-3"]
    assert main([*TRAIN, *options, *steps, "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_the_shipped_pairs_are_those_that_the_script_makes():
    made = runpy.run_path(str(EXAMPLE / "make.py"))["pairs"]
    for name, of_each in (("train.jsonl", 10), ("test.jsonl", 1)):
        assert [json.loads(line) for line in (EXAMPLE / name).read_text().splitlines()] == made(name, of_each)


def test_a_short_training_lowers_the_held_out_loss_and_is_measured(run):
    result = json.loads((run / "result.json").read_text())
    assert result["packed"]
    assert result["eval_loss_after"] < result["eval_loss_before"]
    assert result["metric_name"] == "recall@1"
    assert 0 < result["metric_before"] <= 1
    assert set(result["metrics_after"]) == {"loss", "recall@1", "mrr@10"}
    assert result["metrics_after"]["mrr@10"]["value"] >= result["metric_after"]
    assert result["base_sha256_before"] == result["base_sha256_after"]
    assert [sample["reference"] for sample in result["samples"]] == [
        json.loads(line)["positive"] for line in (EXAMPLE / "test.jsonl").read_text().splitlines()[:5]
    ]
    assert "recall@1" in (run / "report.html").read_text()


@torch.no_grad()
def test_peft_gives_the_same_embeddings(run, minilm):
    from rankwise.data.pairs import PairExample
    from rankwise.engine.embedding import EmbeddingEngine
    from rankwise.models.adapted import load_adapted

    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert config["task_type"] == "FEATURE_EXTRACTION"
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    texts = ["wake me at seven", "set an alarm for 7 am, please", "what is the weather"]
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(minilm, dtype=torch.float32), run / "adapter").eval()
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"][:, :, None]
    expected = F.normalize((theirs(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1), dim=1)
    tokens = [tuple(ids) for ids in tokenizer(texts).input_ids]
    adapted = load_adapted(None, run)
    engine = EmbeddingEngine(adapted.model, 0, [PairExample(tokens[0], tokens[1], (), "")])
    assert engine.packs
    torch.testing.assert_close(engine.embed(tokens), expected, rtol=0, atol=2e-6)
    base = AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    plain = F.normalize((base(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1), dim=1)
    assert (expected - plain).abs().max() > 1e-3


def test_eval_measures_what_the_run_measured_and_the_base_too(run, tmp_path, capsys):
    data = some_of("test.jsonl", 40, tmp_path)
    result = json.loads((run / "result.json").read_text())
    for options, side in (
        (["--adapter", str(run)], "after"),
        (["--model", "minilm-l6", "--task", "embedding"], "before"),
    ):
        assert main(["eval", "--data", data, *options]) == 0
        measured = json.loads(capsys.readouterr().out)
        assert measured["loss"] == pytest.approx(result[f"eval_loss_{side}"], rel=1e-5)
        assert measured["recall@1"] == result[f"metric_{side}"]


def test_a_merged_model_embeds_as_the_adapter_does(run, minilm, tmp_path, capsys):
    assert main(["merge", "--adapter", str(run), "--out", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    for name in ("modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (minilm / name).read_bytes()
    merged = ["--model", str(tmp_path / "merged"), "--task", "embedding"]
    assert main(["eval", "--data", some_of("test.jsonl", 40, tmp_path), *merged]) == 0
    result = json.loads((run / "result.json").read_text())
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(result["eval_loss_after"], rel=1e-4)


def test_data_shows_a_pair_and_names_every_bad_row(tmp_path, capsys):
    pair = {"anchor": "how far is it", "positive": "what is the distance", "negative": ["how old is it", "who is it"]}
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(pair) + "\n" + json.dumps({**pair, "negative": None, "anchor": "how far"}) + "\n")
    assert main(["data", str(good), "--model", "minilm-l6", "--task", "embedding"]) == 0
    shown = capsys.readouterr().out
    assert "pairs, 2 rows" in shown
    assert "anchor: [CLS] how far is it [SEP]" in shown
    assert shown.count("negative: ") == 2
    bad = tmp_path / "bad.jsonl"
    rows = [
        pair,
        {**pair, "positive": pair["anchor"]},
        {**pair, "negative": [pair["positive"]]},
        {**pair, "negative": [3]},
        {**pair, "anchor": " "},
    ]
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", str(bad), "--model", "minilm-l6", "--task", "embedding"]) == 2
    shown = capsys.readouterr().out
    assert "bad.jsonl:2: positive is the anchor's own text" in shown
    assert "bad.jsonl:3: a negative is the text of the anchor or of the positive" in shown
    assert "bad.jsonl:4: negative must be a string, found int" in shown
    assert "bad.jsonl:5: anchor is empty" in shown


def test_negatives_and_own_names_of_columns_train(tmp_path):
    rows = [
        {"q": f"question {i}", "a": f"the answer to question {i}", "n": f"the answer to question {i + 1}"}
        for i in range(12)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", str(data), "--columns", "anchor=q", "positive=a", "negative=n", "--max-steps", "2"]
    assert main([*TRAIN, *options, "--eval-fraction", "0.25", "--explain-engine", "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["eval_rows"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train", "--batch-size", "1"], "a row is told apart from the others of its batch"),
        (["train", "--label-smoothing", "0.1"], "--label-smoothing does not go with --task embedding"),
        (["train", "--metrics"], "--metrics needs --task causal_lm or seq2seq_lm"),
        (["train", "--train-on", "all"], "--train-on all needs --task causal_lm"),
        (["rank", "predict"], "try rank nested"),
    ],
)
def test_what_does_not_go_with_embeddings_is_refused(options, message, tmp_path, capsys):
    model = ["--model", "minilm-l6", "--task", "embedding", "--data", str(EXAMPLE / "train.jsonl")]
    with pytest.raises(SystemExit) as end:
        main([*options, *model, "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())


@pytest.mark.parametrize("model", ["minilm-l6", "smollm2-135m"])
def test_a_plan_counts_what_the_run_trains(model, tmp_path, capsys):
    data = ["--model", model, "--task", "embedding", "--data", some_of("train.jsonl", 8, tmp_path), "--r", "2"]
    options = [*data, "--batch-size", "4", "--max-steps", "2", "--eval-fraction", "0"]
    assert main(["plan", *options, "--no-time", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(["train", *options, "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert plan["useful_tokens"] == sum(step["tokens"] for step in steps)
    assert plan["adapter"]["trained"] == result["trainable_parameters"]
    assert plan["adapter"]["file_bytes"] == (tmp_path / "run/adapter/adapter_model.safetensors").stat().st_size
    assert result["predicted_peak_memory_bytes"] > 1e8


def test_a_plan_takes_pairs_without_data(capsys):
    rows = ["--rows", "6", "--batch-size", "3", "--tokens-per-row", "20", "--no-time", "--json"]
    assert main(["plan", "--model", "roberta-base", "--task", "embedding", "--epochs", "1", "--r", "8", *rows]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["steps"], plan["useful_tokens"], plan["counted"]) == (2, 120, 6)


def test_a_single_row_is_refused_and_a_single_held_out_row_is_measured(tiny_llama_folder, tmp_path, capsys):
    options = ["train", "--model", str(tiny_llama_folder), "--task", "embedding", "--out", str(tmp_path / "run")]
    held_out = some_of("test.jsonl", 1, tmp_path)
    data = some_of("train.jsonl", 1, tmp_path)
    assert main([*options, "--data", data, "--eval-fraction", "0"]) == 2
    assert "needs at least two training rows" in capsys.readouterr().err
    data = some_of("train.jsonl", 2, tmp_path)
    assert main([*options, "--data", data, "--eval-data", held_out, "--max-steps", "1", "--r", "2"]) == 0
    assert "held-out loss: 0.0000 → 0.0000 on 1 rows" in capsys.readouterr().out


def test_generate_refuses_an_adapter_for_embeddings(run, capsys):
    assert main(["generate", "--adapter", str(run), "--prompt", "hello"]) == 2
    assert "embeds texts and cannot answer prompts" in capsys.readouterr().err


def test_a_decoder_without_a_template_for_them_is_no_reason_not_to_embed(tiny_llama_folder, tmp_path):
    data = some_of("test.jsonl", 40, tmp_path)
    options = ["--task", "embedding", "--data", data, "--max-steps", "2", "--out", str(tmp_path / "run")]
    assert main(["train", "--model", str(tiny_llama_folder), *options]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["packed"]


def test_ranks_are_compared_and_an_adapter_is_shrunk(tiny_llama_folder, tmp_path):
    pairs = [
        {"anchor": f"{word} {n}", "positive": f"{n} is {word}"}
        for n in range(12)
        for word in ("red", "green", "blue", "grey", "black", "white", "pink", "brown", "gold", "silver")
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    common = ["--model", str(tiny_llama_folder), "--task", "embedding", "--data", str(data), "--eval-fraction", "0.5"]
    settings = [*common, "--max-steps", "40", "--batch-size", "16", "--seed", "0", "--lr", "1e-3"]
    assert main(["rank", "nested", *settings, "--r", "4", "--out", str(tmp_path / "nested.json")]) == 0
    sweep_two_ranks(settings, tmp_path / "sweep")
    assert main(["train", *settings, "--r", "4", "--out", str(tmp_path / "run")]) == 0
    shrink = ["shrink", str(tmp_path / "run"), "--data", str(data), "--delta", "0.2", "--out", str(tmp_path / "small")]
    assert main(shrink) == 0
    assert (tmp_path / "small" / "adapter_config.json").is_file()
