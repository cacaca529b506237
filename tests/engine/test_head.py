"""The chunked loss at the output head against cross_entropy of all logits, and what it must not hold."""

import random
from typing import Any

import pytest
import torch
from conftest import tiny
from test_engine import adapted, conversations, gradients, reference_loss
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2ForCausalLM, OPTConfig, OPTForCausalLM

from rankwise import LoraConfig, inject_
from rankwise.engine.head import CHUNK_BYTES, OutputHead
from rankwise.engine.language import LanguageEngine


def some_head(draw, vocabulary, width, dtype, **transform):
    linear = nn.Linear(width, vocabulary, bias=draw.random() < 0.5, dtype=dtype).requires_grad_(False)
    linear.weight.mul_(8)
    return OutputHead(linear, **transform)


def reference_losses(head, hidden, targets, label_smoothing):
    """All logits, and autograd."""
    logits = F.linear(hidden, head.linear.weight, head.linear.bias) * head.scale
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_losses_and_gradient_are_those_of_cross_entropy_whatever_the_chunks(
    scale, cap, label_smoothing, dtype, tolerance
):
    draw = random.Random(0)
    torch.manual_seed(0)
    for rows in (1, 3, 7, 100):
        n, vocabulary, width = draw.randrange(1, 24), draw.randrange(2, 200), draw.randrange(1, 40)
        head = some_head(draw, vocabulary, width, dtype, scale=scale, cap=cap)
        hidden = torch.randn(n, width, dtype=dtype, requires_grad=True)
        targets, weights = torch.randint(vocabulary, (n,)), torch.randn(n, dtype=dtype)
        ours = head.losses(hidden, targets, label_smoothing, rows)
        theirs = reference_losses(head, hidden, targets, label_smoothing)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        of_ours, of_theirs = (torch.autograd.grad((x * weights).sum(), hidden)[0] for x in (ours, theirs))
        assert (of_ours - of_theirs).abs().max() <= tolerance * of_theirs.abs().max().clamp(min=1)


def test_logits_far_beyond_the_range_of_exp_give_finite_losses():
    torch.manual_seed(0)
    head = OutputHead(nn.Linear(4, 9).requires_grad_(False), scale=1e4)
    hidden, targets = torch.randn(6, 4, requires_grad=True), torch.arange(6)
    losses = head.losses(hidden, targets)
    torch.testing.assert_close(losses, reference_losses(head, hidden, targets, 0.0))
    assert torch.isfinite(torch.autograd.grad(losses.sum(), hidden)[0]).all()


def test_a_second_backward_pass_adds_the_same_gradient():
    head = OutputHead(nn.Linear(4, 9).requires_grad_(False))
    hidden = torch.randn(6, 4, requires_grad=True)
    loss = head.losses(hidden, torch.arange(6)).mean()
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that any operation made, but for views of what was there."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        there = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in there:
                self.numbers = max(self.numbers, made.numel())
        return result


@pytest.mark.parametrize("transform", [{}, {"scale": 0.5, "cap": 30.0}])
@pytest.mark.parametrize("needs_gradient", [True, False])
def test_nothing_larger_than_a_chunk_of_logits_is_ever_made(needs_gradient, transform):
    n, vocabulary, rows = 64, 500, 8
    head = OutputHead(nn.Linear(16, vocabulary).requires_grad_(False), **transform)
    hidden, targets = torch.randn(n, 16, requires_grad=needs_gradient), torch.randint(vocabulary, (n,))
    with Largest() as largest:
        loss = head.losses(hidden, targets, 0.1, rows).mean()
        if needs_gradient:
            loss.backward()
    assert largest.numbers == rows * vocabulary


@pytest.mark.parametrize("packs", [True, False])
def test_neither_training_nor_evaluation_makes_all_logits_of_a_batch(packs, monkeypatch):
    model, examples = adapted("llama"), conversations(40, 3)
    engine = LanguageEngine(model, 2, examples)
    engine.packs = packs
    monkeypatch.setattr("rankwise.engine.head.CHUNK_BYTES", 8 * 96 * 2)
    # Without the body, whose tensors are larger than those of so small a head.
    made = engine._hidden(examples)
    monkeypatch.setattr(engine, "_hidden", lambda _: made)
    with Largest() as largest:
        engine.loss(examples)
        with torch.no_grad():
            engine.example_losses(examples)
    assert largest.numbers <= max(2 * 96, made[0].numel()) < len(made[1]) * 96


def test_by_default_a_chunk_of_logits_has_the_bytes_that_are_said():
    for vocabulary in (1000, 49152, 152064):
        head = OutputHead(nn.Linear(1, vocabulary, dtype=torch.bfloat16))
        assert CHUNK_BYTES - 4 * vocabulary < head.rows_at_once * vocabulary * 4 <= CHUNK_BYTES


def test_the_projection_that_opt_has_before_its_head_is_kept():
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=64)).double().eval()
    inject_(model, LoraConfig(r=2))
    examples = conversations(3, 3)
    engine = LanguageEngine(model, 1, examples)
    assert engine.head_unchunked_because is None
    torch.testing.assert_close(engine.loss(examples), reference_loss(model, examples), rtol=1e-10, atol=0)


def assert_takes_all_logits(engine, examples, reason):
    assert reason in engine.head_unchunked_because
    loss, expected = engine.loss(examples), reference_loss(engine.model, examples)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    ours, theirs = gradients(engine.model, loss), gradients(engine.model, expected)
    assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()


def test_an_adapted_head_takes_the_ordinary_path():
    model, examples = tiny("llama", torch.float64), conversations(3, 0)
    inject_(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    assert_takes_all_logits(LanguageEngine(model, 2, examples), examples, "is a LoraLinear")


def test_a_head_that_is_set_to_train_after_the_engine_was_made_gets_its_gradient():
    model, examples = adapted("llama"), conversations(3, 0)
    engine = LanguageEngine(model, 2, examples)
    assert engine.head_unchunked_because is None
    model.lm_head.weight.requires_grad_(True)
    assert_takes_all_logits(engine, examples, "is trained")
    engine.loss(examples).backward()
    assert model.lm_head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("part", ["lm_head", ""])
def test_a_hook_on_the_head_or_the_model_takes_the_ordinary_path(part):
    model, examples = adapted("llama"), conversations(3, 0)
    called = []
    model.get_submodule(part).register_forward_hook(lambda *_: called.append(1))
    engine = LanguageEngine(model, 2, examples)
    called.clear()
    assert_takes_all_logits(engine, examples, "hooks")
    assert called


def test_a_replaced_forward_takes_the_ordinary_path():
    model, examples = adapted("llama"), conversations(3, 0)
    plain = model.lm_head.forward
    model.lm_head.forward = lambda hidden: plain(hidden).flip(-1)
    assert_takes_all_logits(LanguageEngine(model, 2, examples), examples, "another forward")


def test_a_model_that_does_something_else_to_its_logits_takes_the_ordinary_path():
    examples = conversations(3, 0)
    model = adapted("llama")

    class Shifted(type(model)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 0.01 * torch.arange(96)
            return output

    model.__class__ = Shifted
    assert_takes_all_logits(LanguageEngine(model, 2, examples), examples, "does more to its logits")


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_a_soft_cap_is_found_and_its_absence_noticed(cap):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "final_logit_softcapping": cap}
    model, examples = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).eval(), conversations(3, 0)
    model.lm_head.weight.data *= 20
    engine = LanguageEngine(model, 2, examples)
    assert engine.head is not None
    assert engine.head.cap == cap

    class Uncapped(type(model)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.config.final_logit_softcapping = None
            try:
                return super().forward(*args, **kwargs)
            finally:
                self.config.final_logit_softcapping = cap

    model.__class__ = Uncapped
    assert LanguageEngine(model, 2, examples).head_unchunked_because is not None


@pytest.mark.parametrize("head", ["chunked", "adapted"])
def test_smoothed_loss_is_that_of_cross_entropy_on_either_path(head):
    model, examples = adapted("llama"), conversations(4, 5)
    if head == "adapted":
        model = tiny("llama", torch.float64)
        inject_(model, LoraConfig(r=2, target_modules=["lm_head"]))
    engine = LanguageEngine(model, 2, examples)
    assert (engine.head is not None) == (head == "chunked")
    expected = F.cross_entropy(*engine.logits(examples), label_smoothing=0.2)
    torch.testing.assert_close(engine.loss(examples, 0.2), expected, rtol=1e-10, atol=0)
