"""Encoders with decoders against transformers' own loss, on random T5 and BART models."""

import random

import pytest
import torch
from conftest import randomise_adapter
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from rankwise import LoraConfig, inject_, trainable_parameters
from rankwise.data.examples import Prompt
from rankwise.data.seq2seq import Seq2SeqExample
from rankwise.engine.explain import explain
from rankwise.engine.generate import generate
from rankwise.engine.seq2seq import Seq2SeqEngine

T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
MODELS = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)),
    "t5 of version 1.1": lambda: T5ForConditionalGeneration(
        T5Config(**T5, decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
}


class RMSNorm(nn.RMSNorm):
    """transformers' T5LayerNorm takes its mean square in fp32, whatever the model's type."""


def random_model(family, dtype=torch.float64):
    torch.manual_seed(0)
    model = MODELS[family]().to(dtype).eval()
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "T5LayerNorm":
            norm = RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=dtype)
            model.set_submodule(name, norm)
    if family == "bart":
        model.final_logits_bias.normal_()
    return model


def adapted(family, **config):
    model = random_model(family)
    inject_(model, LoraConfig(r=4, task_type="SEQ_2_SEQ_LM", **config))
    randomise_adapter(model)
    return model


def rows(count, seed=0):
    draw = random.Random(seed)
    texts = [tuple(draw.randrange(3, 96) for _ in range(draw.randrange(2, 14))) for _ in range(2 * count)]
    return [Seq2SeqExample(texts[i], (*texts[count + i], 1), f"row {i}") for i in range(count)]


def transformers_loss(model, examples):
    """The loss of transformers on padded rows, with labels of -100 at the padding."""
    sources, targets = ([example.texts[side] for example in examples] for side in (0, 1))
    longest = [max(map(len, texts)) for texts in (sources, targets)]
    ids = torch.tensor([[*text, *[0] * (longest[0] - len(text))] for text in sources])
    mask = torch.tensor([[1] * len(text) + [0] * (longest[0] - len(text)) for text in sources])
    labels = torch.tensor([[*text, *[-100] * (longest[1] - len(text))] for text in targets])
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


@pytest.mark.parametrize("family", MODELS)
def test_loss_and_gradients_are_those_of_transformers(family):
    model, examples = adapted(family), rows(6)
    engine = Seq2SeqEngine(model, 0, examples)
    assert engine.whole_head_because is None
    loss, expected = engine.loss(examples), transformers_loss(model, examples)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    ours, theirs = (
        torch.cat([gradient.flatten() for gradient in torch.autograd.grad(value, trainable_parameters(model))])
        for value in (loss, expected)
    )
    assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()


@pytest.mark.parametrize("family", MODELS)
def test_a_rows_loss_does_not_depend_on_the_padding_that_others_bring(family):
    engine = Seq2SeqEngine(adapted(family), 0, rows(6))
    together, counts = engine.example_losses(rows(6))
    assert counts.tolist() == [len(row.target) for row in rows(6)]
    alone = torch.cat([engine.example_losses([row])[0] for row in rows(6)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=0)


@pytest.mark.parametrize("family", MODELS)
def test_the_output_head_sees_the_targets_tokens_alone(family):
    model, examples = adapted(family), rows(6)
    engine = Seq2SeqEngine(model, 0, examples)
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, args, output: seen.append(output.shape))
    engine.loss(examples)
    handle.remove()
    assert seen == [(sum(len(row.target) for row in examples), 96)]
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_model_whose_head_needs_all_tokens_gets_them_and_says_so(monkeypatch):
    model, examples = random_model("t5"), rows(6)
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: head(hidden) - hidden.mean() * hidden.dim())
    engine = Seq2SeqEngine(model, 0, examples)
    assert engine.whole_head_because == "the model does more to its logits than token by token"
    torch.testing.assert_close(engine.loss(examples), transformers_loss(model, examples), rtol=1e-10, atol=0)


def test_the_reason_for_padding_and_the_heads_share_are_said():
    examples = rows(4)
    text = explain(Seq2SeqEngine(adapted("t5"), 0, examples), [examples])
    assert "packed streams: no, because the decoder also attends to what the encoder read" in text
    sides = [[len(example.texts[side]) for example in examples] for side in (0, 1)]
    padding = sum(4 * max(lengths) - sum(lengths) for lengths in sides)
    assert f"; {padding} tokens of padding" in text
    assert "output head without padding: yes" in text


class Numbers:
    """A tokenizer whose text is the tokens' numbers."""

    pad_token_id, eos_token_id, chat_template = 0, 1, None

    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(str(token) for token in row if token > 2) for row in ids]


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_answers_to_many_are_the_greedy_ones_to_each(family):
    model, examples = adapted(family), rows(6)
    # Settings of a summariser, which would take other tokens.
    model.generation_config.num_beams, model.generation_config.no_repeat_ngram_size = 3, 1
    answers = generate(model, Numbers(), [Prompt(example.source, None) for example in examples], 6)
    for example, answer in zip(examples, answers, strict=True):
        written = [model.config.decoder_start_token_id]
        while (len(written) < 7 and written[-1] not in (1, model.generation_config.eos_token_id)) or len(written) == 1:
            logits = model(input_ids=torch.tensor([example.source]), decoder_input_ids=torch.tensor([written])).logits
            written.append(int(logits[0, -1].argmax()))
        assert answer == " ".join(str(token) for token in written[1:] if token > 2)
