"""Recall and MRR against a search written out here."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from rankwise.data.pairs import PairExample
from rankwise.engine.embedding import EmbeddingEngine
from rankwise.train.evaluate import evaluate, held_out_loss
from rankwise.train.retrieval import retrieve


class Decoder:
    """Stands for a tokenizer."""

    def batch_decode(self, texts, skip_special_tokens):
        return [" ".join(map(str, text)) for text in texts]


def held_out(count):
    """Pairs of two texts that share their middle; every fifth positive is also another row's."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for row in range(count):
        middle = torch.randint(3, 96, (4,), generator=generator).tolist()
        anchor, positive = ((start, *middle, 95 - start) for start in (3 + row % 9, 40 + row % 7))
        rows.append(PairExample(anchor, rows[-1].positive if row % 5 == 4 else positive, ((7, row),), f"row {row}"))
    return [*rows, PairExample(rows[0].anchor, (5, 5, 5), (), "a second positive of the first anchor")]


@pytest.fixture
def engine():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return EmbeddingEngine(BertModel(config).double().eval(), 0, held_out(3))


def ranks_by_search(engine, examples):
    """For each anchor: how many different positives of other anchors are as similar as its own, and it."""
    own = {text: engine.embed([text])[0] for example in examples for text in (example.anchor, example.positive)}
    ranks = []
    for example in examples:
        right = {other.positive for other in examples if other.anchor == example.anchor} | {example.anchor}
        others = {other.positive for other in examples} - right
        similarity = [float(own[example.anchor] @ own[text]) for text in others]
        ranks.append(1 + sum(value >= float(own[example.anchor] @ own[example.positive]) for value in similarity))
    return np.array(ranks)


@torch.no_grad()
def test_ranks_losses_and_metrics_are_those_of_a_search(engine):
    examples = held_out(40)
    ranks = ranks_by_search(engine, examples)
    assert ranks.max() > 1
    assert 1 in ranks
    found = retrieve(engine, examples)
    assert found.ranks.tolist() == ranks.tolist()
    measured = evaluate(engine, Decoder(), examples)
    assert measured.metric_name == "recall@1"
    assert measured.metric == pytest.approx((ranks == 1).mean())
    assert measured.metrics["mrr@10"].value == pytest.approx(np.where(ranks <= 10, 1 / ranks, 0).mean())
    assert measured.loss == pytest.approx(held_out_loss(engine, examples), rel=1e-10)
    for estimate in measured.metrics.values():
        assert estimate.lower < estimate.value < estimate.upper
    assert measured.samples[0].reference == " ".join(map(str, examples[0].positive))


@torch.no_grad()
def test_the_nearest_text_is_shown_and_is_the_positive_where_that_is_found_first(engine):
    examples = held_out(40)
    found = retrieve(engine, examples)
    for example, rank, nearest in zip(examples, found.ranks, found.nearest, strict=True):
        assert (nearest == example.positive) == (rank == 1)


def test_a_model_that_embeds_all_texts_alike_finds_nothing(engine, monkeypatch):
    monkeypatch.setattr(engine, "embed", lambda texts: torch.ones(len(texts), 4) / 2)
    examples = held_out(40)
    found = retrieve(engine, examples)
    assert found.found_first.sum() == 0
    assert (found.ranks > 10).all()
    assert found.reciprocal_ranks.sum() == 0


def test_a_similarity_matrix_in_parts_is_the_whole_one(engine, monkeypatch):
    examples = held_out(40)
    whole = retrieve(engine, examples)
    monkeypatch.setattr("rankwise.train.retrieval.ROWS_AT_ONCE", 7)
    monkeypatch.setattr("rankwise.train.retrieval.TEXTS_AT_ONCE", 5)
    parts = retrieve(engine, examples)
    assert parts.ranks.tolist() == whole.ranks.tolist()
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-10)
