"""Norms, gated activations and rotary positions by hand, against their definitions and in whole models."""

from contextlib import suppress

import pytest
import torch
from conftest import tiny
from test_engine import conversations, gradients, reference_loss
from test_model_types import CAUSAL, build
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from rankwise import LoraConfig, inject_
from rankwise.engine.elementwise import (
    _ACTIVATIONS,
    GatedMlp,
    RmsNorm,
    _Gated,
    _RmsNorm,
    _Rotated,
    elementwise_by_hand,
    stand_ins,
)
from rankwise.engine.language import LanguageEngine
from rankwise.lora.places import named_places

EXPECTED = {
    # RMS norms, gated MLPs, whether positions are rotated half by half
    "bloom": (0, 0, False), "cohere": (0, 2, False), "falcon": (0, 0, True), "gemma": (5, 2, True),
    "gemma2": (9, 2, True), "gpt2": (0, 0, False), "gpt_neox": (0, 0, True), "granite": (5, 2, True),
    "helium": (5, 2, False), "llama": (5, 2, True), "mistral": (5, 2, True), "nemotron": (0, 0, True),
    "olmo": (0, 2, True), "olmo2": (9, 2, True), "opt": (0, 0, False), "phi": (0, 0, True), "phi3": (5, 0, True),
    "qwen2": (5, 2, True), "qwen3": (9, 2, True), "smollm3": (5, 2, True), "stablelm": (0, 2, True),
    "starcoder2": (0, 0, True),
}  # fmt: skip
"""In models of two blocks. Cohere and Helium rotate neighbours, a LayerNorm is one operation already."""


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.double)


def assert_same(found, expected, *inputs):
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    gradient = numbers(*expected.shape)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_a_norm_is_its_definition():
    x, weight = numbers(2, 5, 24).requires_grad_(), numbers(24)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    assert_same(_RmsNorm.apply(x, weight, 1e-3), expected, x)


@pytest.mark.parametrize("index", range(3))
def test_a_gated_activation_is_its_definition(index):
    plain = [F.silu, lambda u: F.gelu(u, approximate="tanh"), F.gelu][index]
    u, v = numbers(2, 5, 24).requires_grad_(), numbers(3, 5, 24)[1:].clone().requires_grad_()
    assert_same(_Gated.apply(u, v, _ACTIVATIONS[index]), plain(u) * v, u, v)


@pytest.mark.parametrize("rotated", [8, 4])
def test_rotated_positions_are_their_definition(rotated):
    # As the model has them: a view of [T, heads·w], and cosines for all heads.
    x = numbers(1, 5, 3, 8).requires_grad_()
    (cos, sin), half = numbers(2, 1, 1, 5, rotated), rotated // 2
    whole = x.transpose(1, 2)
    q, rest = whole[..., :rotated], whole[..., rotated:]
    turned = torch.cat([-q[..., half:], q[..., :half]], dim=-1)
    assert_same(_Rotated.apply(whole, cos, sin), torch.cat([q * cos + turned * sin, rest], dim=-1), x)


@pytest.mark.usefixtures("in_fp64")
@pytest.mark.parametrize("kind", CAUSAL)
def test_loss_and_gradients_of_whole_models_stay(kind):
    model = build(AutoModelForCausalLM, kind, CAUSAL[kind], 3)
    examples = conversations(4, 6)
    engine = LanguageEngine(model, 0, examples)
    expected = reference_loss(model, examples)
    theirs = gradients(model, expected)
    found = stand_ins(model)
    assert (found.count(RmsNorm), found.count(GatedMlp), bool(found.files)) == EXPECTED[kind]
    with elementwise_by_hand(model):
        loss = engine.loss(examples)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        ours = gradients(model, loss)
    assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()


def test_afterwards_the_model_is_as_it_was_and_meanwhile_its_places_have_their_names():
    model = tiny("llama")
    inject_(model, LoraConfig(r=2))
    before, rotation = named_places(model), modeling_llama.apply_rotary_pos_emb
    with suppress(KeyError), elementwise_by_hand(model):
        assert modeling_llama.apply_rotary_pos_emb is not rotation
        assert [name for name, _ in named_places(model)] == [name for name, _ in before]
        assert sum(isinstance(module, RmsNorm | GatedMlp) for module in model.modules()) == 7
        raise KeyError
    assert named_places(model) == before
    assert modeling_llama.apply_rotary_pos_emb is rotation


def test_what_is_watched_trained_or_of_another_kind_stays():
    model = tiny("llama")
    first, second = model.model.layers
    first.input_layernorm.register_forward_hook(lambda *_: None)
    first.mlp.act_fn.register_forward_pre_hook(lambda *_: None)
    second.input_layernorm.weight.requires_grad_(True)
    second.post_attention_layernorm.variance_epsilon = 1.0
    second.post_attention_layernorm.forward = lambda x: 2 * x
    second.mlp.act_fn = torch.nn.Tanh()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is second.input_layernorm.weight)
    found = stand_ins(model)
    assert set(found.modules) == {first.post_attention_layernorm, model.model.norm}
