"""Scores of tagged words and of label sets against their definitions, written slowly."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from transformers import BertForTokenClassification

from rankwise import LoraConfig, inject_
from rankwise.data.labelled import SEVERAL_LABELS, LabelSetExample, TagExample
from rankwise.engine.classifiers import LabelSetEngine, TagEngine
from rankwise.train.evaluate import evaluate, held_out_loss
from rankwise.train.label_scores import entities, is_bio, label_set_scores, tag_scores
from rankwise.train.metrics import Estimate

NAMES = ["B-a", "B-b", "I-a", "I-b", "O"]


class Words:
    """A tokenizer that writes ids as words."""

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))


def random_tags(rows, seed, right=0.6):
    draw = random.Random(seed)
    targets = [[draw.randrange(5) for _ in range(draw.randrange(1, 9))] for _ in range(rows)]
    answers = [[tag if draw.random() < right else draw.randrange(5) for tag in row] for row in targets]
    return [np.array(row) for row in targets], [np.array(row) for row in answers]


def slow_entities(tags):
    """By the rules of CoNLL's script: where a chunk starts, and where it ends."""
    padded = ["O", *tags, "O"]
    starts, ends = [], []
    for place in range(1, len(padded)):
        (mark, _, kind), (before, _, kind_before) = padded[place].partition("-"), padded[place - 1].partition("-")
        if before in ("B", "I") and (mark in ("B", "O") or kind != kind_before):
            ends.append(place - 1)
        if mark == "B" or (mark == "I" and (before == "O" or kind != kind_before)):
            starts.append((place - 1, kind))
    return {(start, end, kind) for (start, kind), end in zip(starts, ends, strict=True)}


def slow_f1(right, of, found):
    precision, recall = right / max(1, found), right / max(1, of)
    return 2 * precision * recall / (precision + recall) if right else 0.0


@pytest.mark.parametrize("seed", range(30))
def test_entities_are_those_of_conll_s_rules(seed):
    draw = random.Random(seed)
    tags = [draw.choice(NAMES) for _ in range(draw.randrange(12))]
    assert entities(tags) == slow_entities(tags)


def test_an_entity_ends_where_another_begins_and_an_i_without_a_beginning_begins_one():
    tags = ["B-a", "I-a", "O", "I-a", "B-a", "B-a", "I-b", "I-b"]
    assert entities(tags) == {(0, 2, "a"), (3, 4, "a"), (4, 5, "a"), (5, 6, "a"), (6, 8, "b")}


def test_tags_that_mark_no_entities_are_told_from_those_that_do():
    assert is_bio(NAMES)
    assert not any(map(is_bio, [["O"], ["NN", "VB"], ["B-a", "X"], ["B-", "O"], ["B-a", "E-a", "O"], ["B_a", "O"]]))


@pytest.mark.parametrize("seed", range(8))
def test_scores_of_tags_equal_their_definitions(seed):
    targets, answers = random_tags(20, seed)
    found = tag_scores(targets, answers, NAMES)
    assert list(found) == ["entity_f1", "token_accuracy", "macro_f1"]
    both = (np.concatenate(side).tolist() for side in (targets, answers))
    flat = [(NAMES[t], NAMES[a]) for t, a in zip(*both, strict=True)]
    assert found["token_accuracy"].value == pytest.approx(sum(t == a for t, a in flat) / len(flat))
    per_tag = [
        slow_f1(sum(t == a == n for t, a in flat), sum(t == n for t, _ in flat), sum(a == n for _, a in flat))
        for n in NAMES
        if any(n in pair for pair in flat)
    ]
    assert found["macro_f1"].value == pytest.approx(sum(per_tag) / len(per_tag))
    spans = [[slow_entities([NAMES[t] for t in row]) for row in pair] for pair in zip(targets, answers, strict=True)]
    counts = [sum(len(part) for part in side) for side in zip(*((a & b, a, b) for a, b in spans), strict=True)]
    assert found["entity_f1"].value == pytest.approx(slow_f1(*counts))


@pytest.mark.parametrize("seed", range(8))
def test_scores_of_label_sets_equal_their_definitions(seed):
    draw = np.random.default_rng(seed)
    targets = draw.random((15, 6)) < 0.3
    answers = np.where(draw.random((15, 6)) < 0.8, targets, ~targets)
    targets[:, 5] = answers[:, 5] = False
    found = label_set_scores(targets, answers)
    counts = [(t & a, t, a) for t, a in zip(targets.T, answers.T, strict=True)]
    sums = [[int(part.sum()) for part in label] for label in counts]
    assert found["micro_f1"].value == pytest.approx(slow_f1(*(sum(column) for column in zip(*sums, strict=True))))
    assert found["macro_f1"].value == pytest.approx(np.mean([slow_f1(*label) for label in sums[:5]]))
    same = [t.tolist() == a.tolist() for t, a in zip(targets, answers, strict=True)]
    assert found["subset_accuracy"].value == pytest.approx(sum(same) / 15)


def test_intervals_are_those_of_resampled_rows():
    targets, answers = random_tags(60, 3)
    found = tag_scores(targets, answers, NAMES)
    draw = np.random.default_rng(1)
    values: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(1500):
        rows = draw.integers(0, 60, 60)
        flat = [np.concatenate([side[row] for row in rows]) for side in (targets, answers)]
        values["token_accuracy"].append((flat[0] == flat[1]).mean())
        pairs = [
            (np.sum((flat[0] == n) & (flat[1] == n)), np.sum(flat[0] == n), np.sum(flat[1] == n)) for n in range(5)
        ]
        values["macro_f1"].append(float(np.mean([slow_f1(*pair) for pair in pairs])))
        spans = [[entities([NAMES[t] for t in side[row]]) for side in (targets, answers)] for row in rows]
        counts = [sum(map(len, part)) for part in zip(*((a & b, a, b) for a, b in spans), strict=True)]
        values["entity_f1"].append(slow_f1(*counts))
    for name, sample in values.items():
        lower, upper = np.quantile(sample, [0.025, 0.975])
        assert found[name].lower == pytest.approx(lower, abs=0.15 * (upper - lower))
        assert found[name].upper == pytest.approx(upper, abs=0.15 * (upper - lower))


def test_nothing_there_and_nothing_found_scores_nothing():
    empty = [np.array([4, 4]), np.array([4])]
    assert tag_scores(empty, empty, NAMES)["entity_f1"] == Estimate(0.0, 0.0, 0.0)
    none = np.zeros((3, 2), dtype=bool)
    found = label_set_scores(none, none)
    assert (found["micro_f1"].value, found["macro_f1"].value, found["subset_accuracy"].value) == (0.0, 0.0, 1.0)


def tagger():
    torch.manual_seed(0)
    config = tiny("bert").config
    model = BertForTokenClassification(config).eval()
    model.config.id2label = dict(enumerate(NAMES))
    model.classifier.weight.data *= 30
    inject_(model, LoraConfig(r=2))
    return model


def test_an_evaluation_of_tags_is_that_of_the_plain_model_row_by_row():
    draw = random.Random(0)
    examples = [
        TagExample(
            tuple(draw.randrange(5, 90) for _ in range(7)), (1, 2, 4), tuple(draw.randrange(5) for _ in "abc"), f"r{n}"
        )
        for n in range(21)
    ]
    model = tagger()
    answers, nats = [], []
    for example in examples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.ids])).logits[0, list(example.words)]
        answers.append(logits.argmax(-1).numpy())
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(example.tags), reduction="none").tolist()
    engine = TagEngine(model, 0, examples)
    found = evaluate(engine, Words(), examples)
    assert found.loss == pytest.approx(np.mean(nats), rel=1e-5) == pytest.approx(held_out_loss(engine, examples))
    expected = tag_scores([np.array(example.tags) for example in examples], answers, NAMES)
    assert found.metrics == {"loss": found.metrics["loss"], **expected}
    assert (found.metric_name, found.metric) == ("entity_f1", expected["entity_f1"].value)
    assert len({tuple(row) for row in answers}) > 5, "otherwise the order of rows would not show"
    first, ids = examples[0], examples[0].ids
    ends = (2, 4, 7)
    for text, tags in ((found.samples[0].reference, first.tags), (found.samples[0].answer, answers[0])):
        words = [" ".join(map(str, ids[i:j])) for i, j in zip(first.words, ends, strict=True)]
        marks = [f"{w}/{NAMES[t]}" if NAMES[t] != "O" else w for w, t in zip(words, tags, strict=True)]
        assert text == " ".join(marks)


def test_an_evaluation_of_label_sets_is_that_of_the_plain_model_row_by_row():
    draw = random.Random(0)
    examples = [
        LabelSetExample(
            tuple(draw.randrange(5, 90) for _ in range(3 + n % 5)), tuple(draw.random() < 0.4 for _ in NAMES), f"r{n}"
        )
        for n in range(21)
    ]
    model: Any = tiny("bert")
    model.config.id2label, model.config.problem_type = dict(enumerate(NAMES)), SEVERAL_LABELS
    model.classifier.weight.data *= 30
    inject_(model, LoraConfig(r=2))
    answers, nats = [], []
    for example in examples:
        with torch.no_grad():
            output = model(input_ids=torch.tensor([example.ids]), labels=torch.tensor([example.labels]).float())
        answers.append((output.logits[0].sigmoid() > 0.5).numpy())
        nats.append(output.loss.item())
    found = evaluate(LabelSetEngine(model, 0, examples), Words(), examples)
    assert found.loss == pytest.approx(np.mean(nats), rel=1e-5)
    expected = label_set_scores(np.array([example.labels for example in examples]), np.array(answers))
    assert found.metrics == {"loss": found.metrics["loss"], **expected}
    assert (found.metric_name, found.metric) == ("micro_f1", expected["micro_f1"].value)
    assert len({tuple(row) for row in answers}) > 2
    assert [s.answer for s in found.samples] == [
        ", ".join(name for name, has in zip(NAMES, row, strict=True) if has) or "(no label)" for row in answers[:5]
    ]
