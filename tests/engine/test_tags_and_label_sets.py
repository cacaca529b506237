"""Tagged words and texts with several labels: packed and padded against each row by itself, written out."""

import random

import pytest
import torch
from conftest import tiny
from test_last_block import linear_inputs
from test_model_types import CAUSAL, CLASSIFIERS, assert_same, build
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from rankwise.data.labelled import SEVERAL_LABELS, LabelExample, LabelSetExample, TagExample
from rankwise.engine.batch import rounded_up
from rankwise.engine.blocks import blocks_of
from rankwise.engine.classifiers import ClassifierEngine, LabelSetEngine, TagEngine
from rankwise.engine.tasks import engine_for
from rankwise.errors import ConfigError

pytestmark = pytest.mark.usefixtures("in_fp64")
LABELS = 4
PACKED = {*CLASSIFIERS, "llama", "mistral", "qwen2", "gpt2", "gpt_neox"} - {"deberta-v2"}
DECODERS = {kind: CAUSAL[kind] for kind in ("llama", "mistral", "qwen2", "gpt2", "gpt_neox")}


def sentences(count=6, seed=0, most=3):
    """Random sentences whose words have up to `most` tokens, between a first and a last special token."""
    draw = random.Random(seed)
    examples = []
    for _ in range(count):
        ids, words = [1], []
        for _ in range(draw.randrange(1, 6)):
            words.append(len(ids))
            ids += [draw.randrange(3, 96) for _ in range(draw.randrange(1, most + 1))]
        tags = tuple(draw.randrange(LABELS) for _ in words)
        examples.append(TagExample((*ids, 2), tuple(words), tags, "here"))
    return examples


def label_sets(count=6, seed=0):
    draw = random.Random(seed)
    return [
        LabelSetExample(
            tuple(draw.randrange(3, 96) for _ in range(draw.randrange(3, 12))),
            tuple(draw.random() < 0.4 for _ in range(LABELS)),
            "here",
        )
        for _ in range(count)
    ]


def tagger(kind, r=3):
    overrides = {**CLASSIFIERS, **DECODERS}[kind]
    return build(AutoModelForTokenClassification, kind, overrides, r, num_labels=LABELS)


def reference(model, examples, label_smoothing=0.0):
    """The definition: each sentence by itself, all of its logits, the first token of each word."""
    losses = []
    for example in examples:
        logits = model(torch.tensor([example.ids])).logits[0]
        losses += [
            F.cross_entropy(logits[place], torch.tensor(tag), label_smoothing=label_smoothing)
            for place, tag in zip(example.words, example.tags, strict=True)
        ]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("kind", [*CLASSIFIERS, *DECODERS])
def test_loss_and_gradients_of_tagged_words_are_those_of_each_sentence_by_itself(kind, packs):
    model, examples = tagger(kind), sentences()
    engine = TagEngine(model, 0, examples)
    assert engine.packs or (kind not in PACKED and "attention" in engine.padded_because), engine.padded_because
    engine.packs &= packs
    assert_same(engine, examples, reference(model, examples))
    torch.testing.assert_close(engine.loss(examples, 0.1), reference(model, examples, 0.1), rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in (*CLASSIFIERS, *DECODERS) if kind in PACKED])
def test_a_last_block_that_is_cut_to_the_first_tokens_of_words_gives_the_same(kind):
    model, examples = tagger(kind), sentences(most=6)
    engine = TagEngine(model, 0, examples)
    assert engine.whole_last_block_because is None
    read, tokens = sum(len(example.words) for example in examples), sum(len(example.ids) for example in examples)
    assert engine.cuts_last_block(read, tokens)
    assert_same(engine, examples, reference(model, examples))


def test_no_layer_behind_attention_sees_more_than_the_first_token_of_each_word():
    model, examples = tagger("bert"), sentences(most=6)
    engine = TagEngine(model, 0, examples)
    read = sum(len(example.words) for example in examples)
    with linear_inputs(blocks_of(model)[-1]) as seen:
        engine.loss(examples)
    behind = {name: counts for name, counts in seen.items() if "self" not in name}
    assert behind == {
        name: [rounded_up(read)] for name in ("attention.output.dense", "intermediate.dense", "output.dense")
    }


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "llama"])
def test_a_text_with_several_labels_loses_what_transformers_says(kind, packs):
    overrides = {**CLASSIFIERS, **DECODERS}[kind]
    model = build(
        AutoModelForSequenceClassification, kind, overrides, 3, num_labels=LABELS, problem_type=SEVERAL_LABELS
    )
    examples = label_sets()
    engine = engine_for("seq_cls", model, 0, examples)
    assert isinstance(engine, LabelSetEngine)
    engine.packs &= packs
    losses = [model(torch.tensor([e.ids]), labels=torch.tensor([e.labels]).double()).loss for e in examples]
    assert_same(engine, examples, torch.stack(losses).mean())
    own, counts = engine.example_losses(examples)
    torch.testing.assert_close(own, torch.stack(losses), rtol=1e-10, atol=0)
    assert counts.tolist() == [1] * len(examples)


def test_label_smoothing_of_several_labels_is_that_of_a_choice_between_yes_and_no():
    engine = LabelSetEngine(tiny("bert"), 0, label_sets_of_five())
    logits, targets = torch.randn(7, 5), torch.rand(7, 5) < 0.4
    two = torch.stack([torch.zeros_like(logits), logits], dim=1)
    expected = F.cross_entropy(two, targets.long(), reduction="none", label_smoothing=0.2).mean(1)
    torch.testing.assert_close(engine.losses_from_logits(logits, targets, 0.2), expected, rtol=1e-12, atol=0)


def label_sets_of_five():
    return [LabelSetExample((3, 4, 5), (True, False, True, False, False), "here")]


@pytest.mark.parametrize("several", [True, False])
def test_a_model_for_one_label_refuses_rows_with_several_and_the_other_way_round(several):
    model = tiny("bert")
    model.config.problem_type = None if several else SEVERAL_LABELS
    rows = label_sets_of_five() if several else [LabelExample((3, 4, 5), 1, "here")]
    with pytest.raises(ConfigError, match="trained on rows of the shape text/label"):
        engine_for("seq_cls", model, 0, rows)
    model.config.problem_type = SEVERAL_LABELS if several else None
    engine = engine_for("seq_cls", model, 0, rows)
    assert type(engine) is (LabelSetEngine if several else ClassifierEngine)


def test_losses_of_sentences_are_sums_over_their_words():
    model, examples = tagger("bert"), sentences()
    engine = TagEngine(model, 0, examples)
    losses, counts = engine.example_losses(examples)
    expected = torch.stack([reference(model, [example]) * len(example.words) for example in examples])
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)
    assert counts.tolist() == [len(example.words) for example in examples]
