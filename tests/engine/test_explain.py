"""What the engine says about itself."""

import re

from conftest import tiny

from rankwise import LoraConfig, inject_
from rankwise.data.examples import TextExample
from rankwise.data.labelled import LabelExample
from rankwise.engine.classifiers import ClassifierEngine
from rankwise.engine.explain import explain
from rankwise.engine.language import LanguageEngine


def rows():
    """Two batches: three rows that share 20 tokens, whose last two train, and one of which all but the first does."""
    start = tuple(range(3, 23))
    batch = [TextExample((*start, 30 + i, 40 + i, 50 + i, 60 + i), (*[False] * 22, True, True), "") for i in range(3)]
    return [batch, [TextExample(tuple(range(3, 11)), (False, *[True] * 7), "")]]


def engine(**config):
    model = tiny("llama")
    inject_(model, LoraConfig(r=2, **config))
    return LanguageEngine(model, 0, rows()[0])


def test_the_counts_are_those_of_the_batches():
    text = explain(engine(), rows())
    assert "2 batches (4 rows, 80 tokens)" in text
    assert "0 tokens of padding saved" in text
    assert "40 tokens computed once instead of again" in text
    assert "0 tokens of filler" in text
    assert "output head in chunks: yes, of 81,920 tokens" in text
    assert "head at trained tokens only: yes, 13 of 40 positions" in text
    # Of the row that stands alone, seven of eight tokens predict.
    assert "last block at trained tokens only: yes, in 1 of 2 batches, 6 of 32 positions (19%)" in text
    assert re.search(r"by hand: 14 of 14 adapted layers\n", text)
    assert "lowest adapter: model.layers.0.self_attn.q_proj" in text


def test_what_is_not_used_is_said_with_its_reason():
    text = explain(engine(lora_dropout=0.1), [rows()[1]])
    assert "rows of a batch do not begin alike" in text
    assert "0 of 14 adapted layers (not with dropout" in text
    padded = engine()
    assert "last block at trained tokens only: nothing to gain" in text
    padded.packs, padded.padded_because = False, "its scores are soft-capped"
    padded.whole_last_block_because = "it needs packed streams"
    assert "last block at trained tokens only: no, because it needs packed streams" in explain(padded, rows())
    assert "packed streams: no, because its scores are soft-capped" in explain(padded, rows())
    adapted = explain(engine(target_modules=["lm_head"]), rows())
    assert "output head in chunks: no, because the output head is a LoraLinear" in adapted


def test_a_classifier_has_no_head_at_tokens():
    model = tiny("bert")
    inject_(model, LoraConfig(r=2, task_type="SEQ_CLS"))
    batch = [LabelExample((3, 4, 5), 0, ""), LabelExample((6, 7), 1, "")]
    text = explain(ClassifierEngine(model, 0, batch), [batch])
    assert "1 tokens of padding saved (17%)" in text
    assert "head" not in text
    assert "3 tokens of filler" in text
    assert "last block at trained tokens only: yes, in 1 of 1 batches, 2 of 8 positions" in text
