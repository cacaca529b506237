"""Tagged words and texts with several labels, through the commands, on MiniLM and the shipped rows."""

import json

import peft
import pytest
import torch
from conftest import ROOT, sweep_two_ranks, with_options
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
)

from rankwise import load_adapter_
from rankwise.cli.main import main
from rankwise.data.labelled import SEVERAL_LABELS
from rankwise.models.adapted import read_labels
from rankwise.models.load import load_model
from rankwise.paired_runs import PairedRuns
from rankwise.train.config import TrainConfig

TASKS = {"token_cls": "sql_values", "seq_cls": "intents_domains"}
MAIN = {"token_cls": "entity_f1", "seq_cls": "micro_f1"}


def rows_of(task, part, count):
    lines = (ROOT / "examples" / TASKS[task] / f"{part}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:count]]
    if task == "seq_cls":
        # The domains alone, which a few steps suffice to learn.
        rows = [{**row, "labels": row["labels"][1:]} for row in rows]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module", params=TASKS)
def run(request, tmp_path_factory):
    """(task, run folder, held-out file) of a short training."""
    task, folder = request.param, tmp_path_factory.mktemp(request.param)
    (folder / "train.jsonl").write_text(rows_of(task, "train", 600))
    (folder / "test.jsonl").write_text(rows_of(task, "test", 100))
    options = ["--model", "minilm-l6", "--task", task, "--data", str(folder / "train.jsonl")]
    options += ["--eval-data", str(folder / "test.jsonl"), "--out", str(folder / "run"), "--r", "8"]
    assert main(["train", *options, "--max-steps", "24", "--batch-size", "12", "--lr", "3e-3"]) == 0
    return task, folder / "run", folder / "test.jsonl"


def test_a_short_training_learns_and_eval_measures_the_same(run, capsys):
    task, folder, test = run
    result = json.loads((folder / "result.json").read_text())
    assert result["packed"]
    assert result["eval_loss_after"] < 0.6 * result["eval_loss_before"]
    assert result["metric_name"] == MAIN[task]
    before, after = (result[f"metrics_{side}"][MAIN[task]] for side in ("before", "after"))
    assert before["upper"] < after["lower"]
    assert result["base_sha256_before"] == result["base_sha256_after"]
    assert result["predicted_peak_memory_bytes"] > 1e8
    capsys.readouterr()
    assert main(["eval", "--adapter", str(folder), "--data", str(test)]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["loss"] == pytest.approx(result["eval_loss_after"], rel=1e-5)
    for name, found in result["metrics_after"].items():
        assert measured[name] == pytest.approx(found["value"], rel=1e-5)
        assert measured["intervals"][name] == pytest.approx([found["lower"], found["upper"]], rel=1e-4)


def test_the_report_shows_held_out_rows_with_their_labels(run):
    task, folder, test = run
    page = (folder / "report.html").read_text()
    sample = json.loads((folder / "result.json").read_text())["samples"][0]
    first = json.loads(test.read_text().splitlines()[0])
    if task == "token_cls":
        for tag in set(first["tags"]) - {"O"}:
            assert sample["reference"].count(f"/{tag}") == first["tags"].count(tag)
        assert first["tokens"][0].lower() in sample["reference"]
    else:
        assert sample["reference"] == (", ".join(first["labels"]) or "(no label)")
    assert MAIN[task].replace("_", " ") in page
    assert "The first held-out rows" in page


@pytest.mark.filterwarnings("ignore")
def test_peft_and_transformers_read_adapter_and_merged_model_alike(run, minilm, tmp_path, capsys):
    task, folder, test = run
    labels, problem_type = read_labels(folder / "adapter")
    kind = AutoModelForTokenClassification if task == "token_cls" else AutoModelForSequenceClassification
    batch = AutoTokenizer.from_pretrained(minilm)(
        "How many points did South Australia have in 1998 ?", return_tensors="pt"
    )
    more = {} if task == "token_cls" else {"problem_type": problem_type}
    base = kind.from_pretrained(minilm, num_labels=len(labels), **more).eval()
    with torch.no_grad():
        ours = load_model("minilm-l6", task, labels, *more.values())
        load_adapter_(ours, folder / "adapter")
        expected = ours(**batch).logits
        theirs = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
        torch.testing.assert_close(theirs(**batch).logits, expected, rtol=1e-5, atol=1e-5)
        assert main(["merge", "--adapter", str(folder), "--out", str(tmp_path / "merged")]) == 0
        merged = kind.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert [merged.config.id2label[number] for number in range(len(labels))] == labels
    assert merged.config.problem_type == (None if task == "token_cls" else SEVERAL_LABELS)
    capsys.readouterr()
    assert main(["eval", "--model", str(tmp_path / "merged"), "--task", task, "--data", str(test)]) == 0
    after = json.loads((folder / "result.json").read_text())["eval_loss_after"]
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(after, rel=1e-4)


def test_a_base_without_labels_names_what_has_them(run, capsys):
    task, _, test = run
    assert main(["eval", "--model", "minilm-l6", "--task", task, "--data", str(test)]) == 2
    assert "names no labels in its config.json (id2label); give an --adapter" in capsys.readouterr().err


def test_a_file_of_another_shape_is_refused(run, tmp_path, capsys):
    task, folder, _ = run
    label = read_labels(folder / "adapter")[0][0]
    row, message = {"text": "pay", "label": label}, "this model was trained on rows of the shape text/labels"
    if task == "token_cls":
        row, message = {"tokens": ["a"], "tags": ["B-other"]}, "other.jsonl:1: 'B-other' is not among the 4 labels"
    (tmp_path / "other.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["eval", "--adapter", str(folder), "--data", str(tmp_path / "other.jsonl")]) == 2
    assert message in capsys.readouterr().err


def test_a_plan_counts_what_the_run_trains(run, capsys):
    task, folder, test = run
    result = json.loads((folder / "result.json").read_text())
    data = str(test.parent / "train.jsonl")
    options = ["--model", "minilm-l6", "--task", task, "--data", data, "--eval-fraction", "0", "--no-time", "--json"]
    assert main(["plan", *options]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["trainable_parameters"] == result["trainable_parameters"]
    assert plan["total_parameters"] == result["total_parameters"]
    rows = [json.loads(line) for line in (test.parent / "train.jsonl").read_text().splitlines()]
    assert plan["counted"] == sum(len(row["tokens"]) if task == "token_cls" else 1 for row in rows)


def test_data_shows_an_example_with_its_labels_and_is_ready(run, capsys):
    task, _, test = run
    assert main(["data", str(test), "--model", "minilm-l6", "--task", task]) == 0
    out = capsys.readouterr().out
    assert (": tokens/tags, " if task == "token_cls" else ": text/labels, ") in out
    assert ("/B-" if task == "token_cls" else " → ") in out
    assert ("words each" if task == "token_cls" else "rows each") in out


@pytest.mark.parametrize("run", ["token_cls"], indirect=True)
def test_shrink_takes_tagged_words(run, tmp_path):
    _, folder, test = run
    assert main(["shrink", str(folder), "--data", str(test), "--out", str(tmp_path / "small"), "--delta", "0.2"]) == 0
    assert read_labels(tmp_path / "small") == read_labels(folder / "adapter")


@pytest.fixture(scope="module")
def tiny_bert_folder(tmp_path_factory, minilm):
    """A random BERT with MiniLM's tokenizer, on disk: quick to train."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_every_way_to_find_the_rank_takes_the_task(task, tiny_bert_folder, tmp_path):
    (tmp_path / "train.jsonl").write_text(rows_of(task, "train", 120))
    (tmp_path / "test.jsonl").write_text(rows_of(task, "test", 90))
    more = ["--eval-data", str(tmp_path / "test.jsonl"), "--lr", "0.02", "--max-steps", "12"]
    options = ["--model", str(tiny_bert_folder), "--task", task, "--data", str(tmp_path / "train.jsonl"), *more]
    # Beside a base with a trained head, only a model that knows something gains.
    knowing = with_options(options, "--model", "minilm-l6", "--lr", "0.003", "--max-steps", "24")
    assert main(["rank", "nested", *knowing, "--out", str(tmp_path / "nested.json"), "--r", "4"]) == 0
    losses = json.loads((tmp_path / "nested.json").read_text())["losses"]
    assert losses["4"] < losses["0"]
    few = ["--signal-batches", "4", "--directions", "8"]
    assert main(["rank", "predict", *options, "--out", str(tmp_path / "predict.json"), *few]) == 0
    assert json.loads((tmp_path / "predict.json").read_text())["range"]
    sweep_two_ranks(options, tmp_path / "sweep", "1,4")
    assert (tmp_path / "sweep/sweep.html").is_file()


@pytest.mark.parametrize("task", TASKS)
def test_a_resumed_run_ends_with_the_bytes_of_the_whole_one(task, tiny_bert_folder, tmp_path):
    (tmp_path / "train.jsonl").write_text(rows_of(task, "train", 40))
    options = ["--model", str(tiny_bert_folder), "--task", task, "--data", str(tmp_path / "train.jsonl")]
    options += ["--eval-fraction", "0.2", "--max-steps", "6", "--save-steps", "1"]
    assert main(["train", *options, "--out", str(tmp_path / "whole")]) == 0
    (tmp_path / "cut").mkdir()
    for name in ("run.yaml", "start.json"):
        text = (tmp_path / "whole" / name).read_text().replace(str(tmp_path / "whole"), str(tmp_path / "cut"))
        (tmp_path / "cut" / name).write_text(text)
    (tmp_path / "cut/checkpoints").mkdir()
    (tmp_path / "whole/checkpoints/step-000005").rename(tmp_path / "cut/checkpoints/step-000005")
    assert main(["train", "--resume", str(tmp_path / "cut")]) == 0
    names = ("adapter_model.safetensors", "labels.json")
    ends = [[(tmp_path / side / "adapter" / name).read_bytes() for name in names] for side in ("whole", "cut")]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("task", TASKS)
def test_a_language_model_becomes_a_classifier(task, tiny_llama_folder, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text(rows_of(task, "train", 60))
    options = ["--model", str(tiny_llama_folder), "--task", task, "--data", str(tmp_path / "train.jsonl")]
    assert main(["train", *options, "--out", str(tmp_path / "run"), "--max-steps", "6", "--lr", "0.01"]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["packed"]
    assert result["eval_loss_after"] < result["eval_loss_before"]
    assert result["predicted_peak_memory_bytes"]
    capsys.readouterr()
    assert main(["eval", "--adapter", str(tmp_path / "run"), "--data", str(tmp_path / "train.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 60


@pytest.fixture
def classifier(minilm, tmp_path):
    """Options with a model that finds its first label, positive, in any text, and rows of two labels, nine of ten of
    the first."""
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    names = {"id2label": {0: "positive", 1: "negative"}, "label2id": {"positive": 0, "negative": 1}}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes, **names))
    model.classifier.bias.data = torch.tensor([9.0, -9.0])
    model.save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")

    def options(first, second):
        for name in ("train", "test"):
            rows = [{"text": f"{name} {n}", "label": second if n < 2 else first} for n in range(20)]
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        model, train, test = (str(tmp_path / name) for name in ("classifier", "train.jsonl", "test.jsonl"))
        return ["--task", "seq_cls", "--model", model, "--data", train, "--eval-data", test]

    return options


def test_a_classifier_keeps_its_own_order_of_the_labels(classifier, tmp_path, capsys):
    options = classifier("positive", "negative")
    assert main(["train", *options, "--max-steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert read_labels(tmp_path / "run/adapter")[0] == ["positive", "negative"]
    before = json.loads((tmp_path / "run/result.json").read_text())["eval_loss_before"]
    capsys.readouterr()
    assert main(["eval", *options[:4], "--data", str(tmp_path / "test.jsonl")]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["accuracy"] == 0.9
    assert measured["loss"] == pytest.approx(before, rel=1e-5)
    config = TrainConfig(model=options[3], data=options[5], eval_data=options[7], task="seq_cls", out=tmp_path / "no")
    runs = PairedRuns(config, 1)
    assert runs.labels == ["positive", "negative"]
    assert runs.engine(1).model.classifier.bias.tolist() == [9.0, -9.0]


@pytest.mark.parametrize("labels", [("good", "bad"), ("0", "1")])
def test_a_head_for_other_labels_is_drawn_anew(labels, classifier, tmp_path, capsys):
    options = classifier(*labels)
    assert main(["train", *options, "--max-steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert "head is for other labels" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/result.json").read_text())["eval_loss_before"] == pytest.approx(0.69, abs=0.1)
    config = TrainConfig(model=options[3], data=options[5], eval_data=options[7], task="seq_cls", out=tmp_path / "no")
    heads = [PairedRuns(config, 1).engine(seed).model.classifier for seed in (0, 0, 1)]
    assert heads[0].bias.tolist() == [0.0, 0.0]
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)


def test_labels_without_names_are_those_of_their_numbers(classifier, tmp_path, capsys):
    options = classifier("0", "1")
    settings = json.loads((tmp_path / "classifier/config.json").read_text())
    del settings["id2label"], settings["label2id"]
    (tmp_path / "classifier/config.json").write_text(json.dumps(settings))
    assert main(["train", *options, "--max-steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert "head is for other labels" not in capsys.readouterr().err
    assert json.loads((tmp_path / "run/result.json").read_text())["metric_before"] == 0.9
