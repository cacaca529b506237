"""The packed path against the plain padded one, loss and gradients."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import tiny
from torch import nn
from torch.nn import functional as F

from rankwise import LoraConfig, inject_, trainable_parameters
from rankwise.data.examples import TextExample
from rankwise.data.files import Row
from rankwise.data.labelled import LabelExample
from rankwise.data.tasks import examples_for
from rankwise.engine.attention import Packing
from rankwise.engine.batch import pack, rounded_up
from rankwise.engine.classifiers import ClassifierEngine
from rankwise.engine.language import LanguageEngine

pytestmark = pytest.mark.usefixtures("attention_each_way")

CAUSAL = ["llama", "llama-tied", "qwen2", "mistral-window", "gpt2", "gpt-neox"]


def conversations(count, common, seed=0):
    """Random conversations that begin with `common` equal tokens; some have several trained stretches."""
    draw = random.Random(seed)
    start = [draw.randrange(3, 96) for _ in range(common)]
    examples = []
    for _ in range(count):
        ids, trained = list(start), [False] * common
        for _ in range(draw.randrange(1, 3)):
            for is_trained in (False, True):
                length = draw.randrange(2, 9)
                ids += [draw.randrange(3, 96) for _ in range(length)]
                trained += [is_trained] * length
        examples.append(TextExample(tuple(ids), tuple(trained), "here"))
    return examples


def reference_loss(model, examples):
    """The definition: each example by itself, no packing, no padding, the whole logits."""
    losses = []
    for example in examples:
        logits = model(torch.tensor([example.ids])).logits[0]
        losses += [
            F.cross_entropy(logits[place - 1], torch.tensor(example.ids[place]))
            for place in range(1, len(example.ids))
            if example.trained[place]
        ]
    return torch.stack(losses).mean()


def adapted(family):
    """An fp64 model with an adapter; transformers' own RMSNorm rounds to fp32 inside, so torch's takes its place."""
    model = tiny(family, torch.float64)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            model.set_submodule(name, norm)
    inject_(model, LoraConfig(r=4, task_type="SEQ_CLS" if family == "bert" else "CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model):
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.05
    return model


def gradients(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainable_parameters(model))])


def assert_same(engine, examples, expected, of_loss=1e-10, of_gradients=1e-10):
    """The engine's loss and gradients are those of `expected`, up to these shares."""
    loss = engine.loss(examples)
    torch.testing.assert_close(loss, expected, rtol=of_loss, atol=0)
    ours, theirs = gradients(engine.model, loss), gradients(engine.model, expected)
    assert (ours - theirs).abs().max() <= of_gradients * theirs.abs().max()


@pytest.mark.parametrize("common", [0, 7])
@pytest.mark.parametrize("family", CAUSAL)
def test_packed_loss_and_gradients_are_those_of_each_example_by_itself(family, common):
    model, examples = adapted(family), conversations(5, common)
    engine = LanguageEngine(model, 2, examples)
    assert engine.padded_because is None
    assert_same(engine, examples, reference_loss(model, examples))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_turns_in_the_middle_and_texts_trained_from_their_first_token_count_as_in_a_padded_batch(family, tokenizer):
    talk = [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e f g"},
    ]
    fields = [{"messages": talk}, {"messages": talk[:2]}, {"text": "a b c"}, {"text": "a b d"}]
    fields += [{"messages": [*talk[:3], {"role": "assistant", "content": "h"}]}]
    rows = [Row(Path("data.jsonl"), line, one) for line, one in enumerate(fields, start=1)]
    examples = examples_for("causal_lm", rows, tokenizer, [], 100, "error")
    names = {token: number for number, token in enumerate(sorted({token for e in examples for token in e.ids}))}
    examples = [TextExample(tuple(names[token] for token in e.ids), e.trained, e.place) for e in examples]
    assert len(names) < 96
    model = adapted(family)
    engine = LanguageEngine(model, 2, examples)
    assert engine.padded_because is None
    ids = torch.zeros(len(examples), max(len(e.ids) for e in examples), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for index, example in enumerate(examples):
        ids[index, : len(example.ids)], mask[index, : len(example.ids)] = torch.tensor(example.ids), 1
        trained = [
            token if is_trained else -100 for token, is_trained in zip(example.ids, example.trained, strict=True)
        ]
        labels[index, : len(example.ids)] = torch.tensor(trained)
    logits = model(input_ids=ids, attention_mask=mask).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss = engine.loss(examples)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    ours, theirs = gradients(model, loss), gradients(model, expected)
    assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()
    assert engine.logits(examples)[1].numel() == int((labels[:, 1:] != -100).sum())


def a_tree_of_conversations(seed):
    """Random conversations with beginnings shared by all, by some, by equal prompts and by none, in any order."""
    draw = random.Random(seed)

    def tokens(least, most):
        return tuple(draw.randrange(3, 96) for _ in range(draw.randrange(least, most)))

    system, prompts = tokens(0, 40), []
    for _ in range(draw.randrange(1, 4)):
        table = tokens(1, 40)
        questions = [tokens(1, 12) for _ in range(draw.randrange(1, 4))]
        prompts += [system + table + question for question in [*questions, questions[0], questions[0] + tokens(1, 4)]]
    examples = []
    for prompt in [*prompts, tokens(1, 9)]:
        answer = tokens(1, 6)
        examples.append(TextExample(prompt + answer, (False,) * len(prompt) + (True,) * len(answer), "here"))
    draw.shuffle(examples)
    return examples


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gpt2"])
def test_shared_beginnings_on_several_levels_change_neither_loss_nor_gradients(family, seed):
    model, examples = adapted(family), a_tree_of_conversations(seed)
    loss, expected = LanguageEngine(model, 2, examples).loss(examples), reference_loss(model, examples)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    ours, theirs = gradients(model, loss), gradients(model, expected)
    assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()


@pytest.mark.parametrize("seed", range(8))
def test_the_path_to_an_examples_last_segment_holds_its_tokens_in_order(seed):
    examples = a_tree_of_conversations(seed)
    stream = pack(examples, torch.device("cpu"))
    segments = stream.ids[0].split(stream.packing.lengths)
    positions = stream.positions[0].split(stream.packing.lengths)
    leaves = set(range(len(segments) - bool(stream.filler))) - set(stream.packing.before)
    paths = [stream.packing.path(leaf) for leaf in leaves]
    spelled = [tuple(torch.cat([segments[part] for part in path]).tolist()) for path in paths]
    assert sorted(spelled) == sorted(example.ids for example in examples)
    for path in paths:
        place = torch.cat([positions[part] for part in path])
        assert torch.equal(place, torch.arange(len(place)))


def test_streams_and_what_is_read_of_them_have_few_lengths():
    assert [rounded_up(tokens) for tokens in (1, 8, 9, 510, 513, 1023, 1025, 5000)] == [
        8, 8, 16, 512, 528, 1024, 1056, 5120
    ]  # fmt: skip
    for seed in range(8):
        stream = pack(a_tree_of_conversations(seed), torch.device("cpu"))
        assert stream.tokens == rounded_up(stream.tokens - stream.filler) == stream.ids.shape[1]
        read = torch.cat([stream.predictors, stream.spare])
        assert len(read) == len(set(read.tolist())) == rounded_up(len(stream.predictors))


def test_a_beginning_stands_once_in_the_stream():
    first, second, both = (5,) * 20, (6,) * 20, (4,) * 20
    ends = [(*both, *middle, end, 9) for middle in (first, second) for end in (7, 8, 9)]
    examples = [TextExample(ids, (False,) * 41 + (True,), "here") for ids in ends]
    stream = pack(examples, torch.device("cpu"))
    assert stream.packing.lengths == (20, 20, 2, 2, 2, 20, 2, 2, 2)
    assert stream.packing.before == (None, 0, 1, 1, 1, 0, 5, 5, 5)
    assert stream.filler == 0


def test_a_short_common_beginning_is_not_cut_off():
    examples = [TextExample((5, 6, end, 9), (False, False, False, True), "here") for end in (7, 8)]
    assert pack(examples, torch.device("cpu")).packing == Packing.of_whole_examples((4, 4))


def test_a_shared_segment_never_holds_a_predictor_even_if_all_rows_are_equal():
    example = TextExample((*range(5, 25), 7, 8), (False,) * 20 + (True, True), "here")
    stream = pack([example, example], torch.device("cpu"))
    assert stream.packing.lengths == (19, 3, 3, stream.filler)
    assert stream.targets.tolist() == [7, 8, 7, 8]
    assert stream.ids[0, stream.predictors].tolist() == [24, 7, 24, 7]


@pytest.mark.parametrize("family", [*CAUSAL, "bloom"])
def test_the_padded_path_gives_the_same_loss_and_gradients(family):
    model, examples = adapted(family), conversations(5, 3)
    engine = LanguageEngine(model, 2, examples)
    engine.packs = False
    loss, expected = engine.loss(examples), reference_loss(model, examples)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    ours, theirs = gradients(model, loss), gradients(model, expected)
    # BLOOM takes its softmax in fp32 whatever the model's type.
    tolerance = 1e-5 if family == "bloom" else 1e-10
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_a_model_that_packing_cannot_serve_says_why_and_is_padded():
    engine = LanguageEngine(tiny("bloom"), 2, conversations(3, 0))
    assert not engine.packs
    assert engine.padded_because


def test_packed_classification_is_that_of_each_text_by_itself():
    model = adapted("bert")
    draw = random.Random(0)
    texts = [
        LabelExample(tuple(draw.randrange(3, 96) for _ in range(draw.randrange(3, 12))), draw.randrange(5), "here")
        for _ in range(6)
    ]
    engine = ClassifierEngine(model, 0, texts)
    assert engine.padded_because is None
    expected = torch.cat([model(torch.tensor([text.ids])).logits for text in texts])
    torch.testing.assert_close(engine.logits(texts)[0], expected, rtol=1e-10, atol=1e-12)
    loss = F.cross_entropy(expected, torch.tensor([text.label for text in texts]))
    ours, theirs = gradients(model, engine.loss(texts)), gradients(model, loss)
    assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()


def test_the_attention_of_the_model_is_put_back_also_after_an_error():
    model, examples = tiny("llama"), conversations(3, 0)
    before = model.config._attn_implementation
    engine = LanguageEngine(model, 2, examples)
    engine.loss(examples)
    assert model.config._attn_implementation == before
    with pytest.raises(IndexError):
        engine.loss([TextExample((1, 1000), (False, True), "here")])
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("packs", [True, False])
def test_an_evaluation_takes_each_example_once_and_few_tokens_at_a_time(packs, monkeypatch):
    monkeypatch.setattr("rankwise.engine.engine.EVALUATED_AT_ONCE", 40)
    examples = [*conversations(30, 3), TextExample((5,) * 50, (False,) * 49 + (True,), "here")]
    engine = LanguageEngine(tiny("llama"), 2, examples)
    engine.packs = packs
    batches = engine.evaluation_batches(examples)
    assert sorted(place for batch in batches for place in batch) == list(range(31))
    for batch in batches:
        lengths = [len(examples[place].ids) for place in batch]
        assert len(batch) == 1 or (sum(lengths) if packs else max(lengths) * len(lengths)) <= 40
    # None could take the next one in.
    lengths = [[len(examples[place].ids) for place in batch] for batch in batches]
    for own, after in pairwise(lengths):
        more = [*own, after[0]]
        assert (sum(more) if packs else max(more) * len(more)) > 40
