"""Embeddings and the contrastive loss: packed against a padded reference that is written out here."""

import json
import random

import pytest
import torch
from conftest import LLAMA, randomise_adapter
from torch.nn import functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, RobertaConfig, RobertaModel

from rankwise import LoraConfig, inject_, trainable_parameters
from rankwise.data.pairs import PairExample
from rankwise.engine.contrast import Contrast
from rankwise.engine.embedding import EmbeddingEngine
from rankwise.engine.held_out import per_example
from rankwise.errors import ModelError
from rankwise.models.pooling import pooling_of, unread_layers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 1,
}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES, max_position_embeddings=64)),
    "llama": lambda: LlamaModel(LlamaConfig(**LLAMA)),
}


def embedder(family, dtype=torch.float64, **config):
    torch.manual_seed(0)
    model = MODELS[family]().to(dtype).eval()
    inject_(model, LoraConfig(r=4, exclude_modules=unread_layers(model), task_type="FEATURE_EXTRACTION", **config))
    randomise_adapter(model)
    return model


def pairs(count, negatives=(), seed=0):
    """Random pairs; row i has `negatives[i]` negatives of its own, the rows after these none. No text comes twice."""
    draw = random.Random(seed)

    def text():
        return tuple(draw.randrange(3, 96) for _ in range(draw.randrange(2, 12)))

    numbers = [*negatives, *[0] * count][:count]
    return [PairExample(text(), text(), tuple(text() for _ in range(n)), f"row {i}") for i, n in enumerate(numbers)]


def padded_embeddings(model, texts):
    """sentence-transformers' way: a padded batch, the mean over the mask, length 1."""
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[1] * (longest - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    mask = mask[:, :, None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def multiple_negatives_ranking_loss(model, examples):
    """As sentence-transformers computes it: every text embedded where it stands, positive i the label of anchor i."""
    anchors = padded_embeddings(model, [example.anchor for example in examples])
    candidates = [example.positive for example in examples] + [text for e in examples for text in e.negatives]
    scores = 20 * anchors @ padded_embeddings(model, candidates).T
    return F.cross_entropy(scores, torch.arange(len(examples)))


def loss_by_hand(model, examples):
    """Row by row: the positive against every different text that the batch does not call right for this anchor."""
    texts = {text for example in examples for text in example.texts}
    embeddings = {text: padded_embeddings(model, [text])[0] for text in texts}
    losses = []
    for example in examples:
        right = {other.positive for other in examples if other.anchor == example.anchor} | {example.anchor}
        offered = {text for other in examples for text in (other.positive, *other.negatives)}
        others = [example.positive, *sorted(offered - right)]
        scores = torch.stack([20 * embeddings[example.anchor] @ embeddings[other] for other in others])
        losses.append(torch.logsumexp(scores, 0) - scores[0])
    return torch.stack(losses).mean()


def assert_same_loss_and_gradients(model, loss, expected):
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    ours, theirs = (
        torch.cat([gradient.flatten() for gradient in torch.autograd.grad(value, trainable_parameters(model))])
        for value in (loss, expected)
    )
    assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()


@pytest.mark.parametrize("negatives", [(), (1, 0, 3)], ids=["in the batch", "and hard ones"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_packed_loss_and_gradients_are_those_of_sentence_transformers(family, negatives):
    model, examples = embedder(family), pairs(6, negatives)
    engine = EmbeddingEngine(model, 1, examples)
    assert engine.padded_because is None
    assert_same_loss_and_gradients(model, engine.loss(examples), multiple_negatives_ranking_loss(model, examples))


@pytest.mark.parametrize("packs", [True, False])
def test_what_the_batch_calls_right_is_never_a_negative(packs):
    model, (a, b, c, d, e) = embedder("bert"), pairs(5, (1, 0, 1))
    examples = [
        a,
        PairExample(b.anchor, a.positive, (), "the same positive for another anchor"),
        PairExample(a.anchor, b.positive, (), "another positive of the same anchor"),
        PairExample(c.positive, c.anchor, c.negatives, "a pair the other way round"),
        c,
        PairExample(d.anchor, d.positive, (e.positive, a.negatives[0]), "negatives that stand elsewhere too"),
        e,
        a,
    ]
    engine = EmbeddingEngine(model, 1, examples)
    engine.packs = packs
    assert_same_loss_and_gradients(model, engine.loss(examples), loss_by_hand(model, examples))


def test_equal_rows_alone_in_a_batch_have_nothing_to_be_told_apart_from():
    [pair] = pairs(1)
    engine = EmbeddingEngine(embedder("bert"), 1, [pair])
    assert engine.loss([pair, pair]).item() == 0


@pytest.mark.parametrize(("family", "pooling"), [("bert", "first"), ("llama", "last"), ("llama", "mean")])
def test_embeddings_are_those_of_each_text_by_itself(family, pooling, monkeypatch):
    monkeypatch.setattr("rankwise.engine.embedding.pooling_of", lambda model: pooling)
    model, examples = embedder(family), pairs(5)
    engine = EmbeddingEngine(model, 1, examples)
    assert engine.padded_because is None
    texts = Contrast.of(examples).texts
    for packs in (True, False):
        engine.packs = packs
        embeddings = engine.embed(texts)
        for text, embedding in zip(texts, embeddings, strict=True):
            hidden = model(input_ids=torch.tensor([text])).last_hidden_state[0]
            own = {"first": hidden[0], "last": hidden[-1], "mean": hidden.mean(0)}[pooling]
            # transformers' RMSNorm rounds to fp32 inside.
            torch.testing.assert_close(
                embedding, F.normalize(own, dim=0), rtol=0, atol=1e-10 if family == "bert" else 1e-5
            )


def test_a_row_meets_the_same_rows_at_every_evaluation_and_no_row_is_alone():
    examples = pairs(40)
    engine = EmbeddingEngine(embedder("bert"), 1, examples)
    batches = engine.evaluation_batches(examples)
    assert sorted(place for places in batches for place in places) == list(range(40))
    assert min(map(len, batches)) >= 16
    engine.packs = False
    assert engine.evaluation_batches(examples) == batches
    engine.packs = True
    losses, counts = per_example(engine, examples)
    assert counts.tolist() == [1] * 40
    for places in batches:
        expected = engine.example_losses([examples[place] for place in places])[0]
        torch.testing.assert_close(torch.tensor(losses[places]), expected.detach(), rtol=1e-12, atol=0)


def saved(folder, pooling, modules=("Transformer", "Pooling", "Normalize")):
    model = MODELS["bert"]()
    model.save_pretrained(folder)
    parts = [{"type": f"sentence_transformers.models.{name}"} for name in modules]
    (folder / "modules.json").write_text(json.dumps(parts))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls"}, "first"),
    ],
)
def test_the_pooling_is_the_one_that_the_folder_names(tmp_path, config, pooling):
    assert pooling_of(saved(tmp_path, {"word_embedding_dimension": 32, **config})) == pooling


def test_without_a_word_on_pooling_it_is_the_mean():
    assert pooling_of(MODELS["bert"]()) == "mean"


def test_a_pooling_that_is_not_computed_is_an_error(tmp_path):
    two = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    with pytest.raises(ModelError, match="cls_token and mean_tokens"):
        pooling_of(saved(tmp_path / "two", two))
    with pytest.raises(ModelError, match="max_tokens"):
        pooling_of(saved(tmp_path / "max", {"pooling_mode_max_tokens": True}))
    with pytest.raises(ModelError, match="does not compute: Dense"):
        pooling_of(saved(tmp_path / "dense", {"pooling_mode_mean_tokens": True}, ("Transformer", "Pooling", "Dense")))
