"""What an evaluation says, against the plain model row by row, and the scores of texts against their definitions."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import randomise_adapter, tiny
from torch.nn import functional as F

from rankwise import LoraConfig, inject_
from rankwise.data.examples import Prompt, TextExample
from rankwise.data.labelled import LabelExample
from rankwise.engine.classifiers import ClassifierEngine
from rankwise.engine.language import LanguageEngine
from rankwise.errors import MissingDependency
from rankwise.train import evaluate as evaluation
from rankwise.train import text_metrics
from rankwise.train.evaluate import SAMPLES, evaluate, held_out_loss

TEXTS = [
    TextExample(tuple(5 + (7 * n + m) % 60 for m in range(4 + n)), (False, False, True) + (True,) * (1 + n), f"r{n}")
    for n in (3, 0, 5, 1, 2, 4, 6)
]
LABELLED = [LabelExample(tuple(5 + (11 * n + m) % 60 for m in range(3 + n % 4)), n % 5, f"r{n}") for n in range(23)]


class Words:
    """A tokenizer that writes ids as words."""

    eos_token_id = pad_token_id = 2
    chat_template = None

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))

    def batch_decode(self, rows, skip_special_tokens=False):
        return [self.decode(row) for row in rows]

    def __call__(self, texts, add_special_tokens=True):
        return SimpleNamespace(input_ids=[[int(word) for word in text.split()] for text in texts])


def adapted(family):
    model = tiny(family)
    head = model.lm_head if family == "llama" else model.classifier
    head.weight.data *= 30
    inject_(model, LoraConfig(r=2))
    randomise_adapter(model)
    return model


def test_loss_perplexity_and_token_accuracy_equal_those_of_the_plain_model_row_by_row():
    model = adapted("llama")
    nats, right, counted = 0.0, 0, 0
    for example in TEXTS:
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double()
        for place, trained in enumerate(example.trained[1:], start=1):
            if trained:
                nats -= F.log_softmax(logits[place - 1], -1)[ids[0, place]].item()
                right += logits[place - 1].argmax().item() == example.ids[place]
                counted += 1
    engine = LanguageEngine(model, 2, TEXTS)
    found = evaluate(engine, Words(), TEXTS)
    assert found.loss == pytest.approx(nats / counted, rel=1e-5)
    assert found.loss == found.metrics["loss"].value == pytest.approx(held_out_loss(engine, TEXTS), rel=1e-6)
    assert found.metrics["perplexity"].value == pytest.approx(math.exp(nats / counted), rel=1e-4)
    assert found.metrics["token_accuracy"].value == right / counted
    assert (found.metric_name, found.metric, found.samples) == ("exact_match", None, ())


def test_a_classifier_s_samples_and_scores_belong_to_their_rows():
    model = adapted("bert")
    model.config.id2label = {n: f"label {n}" for n in range(5)}
    with torch.no_grad():
        answers = [model(input_ids=torch.tensor([e.ids])).logits.argmax().item() for e in LABELLED]
    found = evaluate(ClassifierEngine(model, 0, LABELLED), Words(), LABELLED)
    assert found.metric == found.metrics["accuracy"].value
    assert found.metric == sum(a == e.label for a, e in zip(answers, LABELLED, strict=True)) / len(LABELLED)
    assert len(set(answers)) > 1, "otherwise the order of rows would not show"
    assert [(s.prompt, s.reference, s.answer) for s in found.samples] == [
        (" ".join(map(str, e.ids)), f"label {e.label}", f"label {a}")
        for e, a in zip(LABELLED[:SAMPLES], answers, strict=False)
    ]


def test_answers_are_kept_beside_their_prompts_and_references():
    engine = LanguageEngine(adapted("llama"), 2, TEXTS)
    prompts = [Prompt((5 + n, 9), "7 8") for n in range(SAMPLES + 2)]
    found = evaluate(engine, Words(), TEXTS, prompts).samples
    assert [(s.prompt, s.reference) for s in found] == [(f"{5 + n} 9", "7 8") for n in range(SAMPLES)]
    longest = 2
    # One token more than the reference, unless the model ends before.
    assert {len(s.answer.split()) for s in found} <= set(range(longest + 2))


def test_exact_match_forgives_blanks_at_the_ends_alone_and_leaves_out_prompts_without_an_answer(monkeypatch):
    said = {(5,): " 7 8\n", (6,): "7  8", (7,): "7 9", (8,): "7 8"}

    def generate(model, tokenizer, prompts, *rest, **more):
        return [said[prompt.ids] for prompt in prompts]

    monkeypatch.setattr(evaluation, "generate", generate)
    prompts = [Prompt((5,), "7 8"), Prompt((4,), None), Prompt((6,), "7 8"), Prompt((7,), "7 8"), Prompt((8,), "7 8 ")]
    found = evaluate(LanguageEngine(tiny("llama"), 2, TEXTS), Words(), TEXTS, prompts)
    assert found.metric == found.metrics["exact_match"].value == 2 / 4


ANSWERS = [
    "the cat sat on the old mat",
    "a dog runs through the green park every day",
    "birds sing early",
    "we walk home when it is late in the evening",
]
REFERENCES = [
    "the cat sat on a mat",
    "the dog runs through the green park on each day",
    "birds sing early in spring",
    "we walk home when it is late at night",
]


def grams(text, n):
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def slow_bleu(answers, references):
    logs = 0.0
    for n in range(1, 5):
        pairs = [(grams(a, n), grams(r, n)) for a, r in zip(answers, references, strict=True)]
        logs += math.log(sum((a & r).total() for a, r in pairs) / sum(a.total() for a, _ in pairs)) / 4
    lengths = [sum(len(text.split()) for text in side) for side in (answers, references)]
    return 100 * math.exp(logs + min(0.0, 1 - lengths[1] / lengths[0]))


def slow_chrf(answers, references):
    precision, recall = [], []
    for n in range(1, 7):
        sides = [[text.replace(" ", "") for text in side] for side in (answers, references)]
        counts = [[Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in side] for side in sides]
        same = sum((a & r).total() for a, r in zip(*counts, strict=True))
        precision.append(same / sum(c.total() for c in counts[0]))
        recall.append(same / sum(c.total() for c in counts[1]))
    scores = [5 * p * r / (4 * p + r) for p, r in zip(precision, recall, strict=True)]
    return 100 * sum(scores) / 6


def slow_rouge(answer, reference, n):
    a, r = grams(answer, n), grams(reference, n)
    return 2 * (a & r).total() / (a.total() + r.total())


def test_bleu_chrf_and_rouge_equal_their_definitions():
    found = text_metrics.text_scores(ANSWERS, REFERENCES)
    assert found["bleu"].value == pytest.approx(slow_bleu(ANSWERS, REFERENCES))
    assert found["chrf"].value == pytest.approx(slow_chrf(ANSWERS, REFERENCES))
    for n in (1, 2):
        pairs = zip(ANSWERS, REFERENCES, strict=True)
        assert found[f"rouge{n}"].value == pytest.approx(sum(slow_rouge(a, r, n) for a, r in pairs) / len(ANSWERS))
    for estimate in found.values():
        assert estimate.lower <= estimate.value <= estimate.upper


def test_equal_texts_have_the_highest_scores_and_unlike_ones_the_lowest():
    best = text_metrics.text_scores(REFERENCES, REFERENCES)
    worst = text_metrics.text_scores(["0 0"] * 4, REFERENCES)
    for name, highest in {"bleu": 100, "chrf": 100, "rouge1": 1, "rouge2": 1, "rougeL": 1}.items():
        assert best[name].value == pytest.approx(highest)
        assert worst[name].value == 0


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(text_metrics, "find_spec", lambda name: None if name == "rouge_score" else object())
    with pytest.raises(MissingDependency, match=r"needs rouge-score, .*pip install 'rankwise\[metrics\]'"):
        text_metrics.check_installed()
