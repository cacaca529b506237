"""What torch does around a layer: reads of a parameter, nested tensors, derivatives of derivatives, hooks."""

from copy import deepcopy

import pytest
import torch
from conftest import randomise_adapter
from torch import nn

from rankwise import LoraConfig, inject_, merge_, trainable_parameters
from rankwise.lora.linear_function import Term, linear_with_update

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
EXACT = {"rtol": 1e-10, "atol": 1e-10}
NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def adapted(model, **settings):
    torch.manual_seed(0)
    inject_(model.double().eval(), LoraConfig(r=2, **settings))
    randomise_adapter(model)
    return model


def encoder(layers=2):
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), layers)


class Matrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.w.T


class Reads(nn.Module):
    """Computes with the parameter of a module below, and calls it too."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = Matrix(), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(x @ self.inner.w.T) + self.inner(x)


def test_a_parameter_read_past_its_module_holds_the_change():
    model = adapted(Reads(), target_modules=["out"], target_parameters=["inner.w"])
    before = model(X)
    before.sum().backward()
    assert all(parameter.grad is not None for parameter in trainable_parameters(model))
    merge_(model)
    torch.testing.assert_close(model(X), before, **EXACT)


def test_torchs_fast_path_sees_an_adapted_parameter():
    model = adapted(encoder(), target_modules=["linear1"], target_parameters=["self_attn.in_proj_weight"])
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, model(x), **EXACT)


@NESTED
@pytest.mark.parametrize("targets", [["self_attn"], ["layers.1.self_attn"], ["self_attn", "linear1", "linear2"]])
@pytest.mark.parametrize("kind", [{}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_padded_sequences_in_inference_compute_as_in_training(targets, kind):
    model = adapted(encoder(), target_modules=targets, **kind)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    padding = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(fast[~padding], model(x, src_key_padding_mask=padding)[~padding], **EXACT)


class Shares(nn.Module):
    """Two layers of one input, computed together, and a third."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.out = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.out(torch.tanh(self.q_proj(x)) * self.k_proj(x))


def plain(model):
    """A model without adapters that computes as this one; its weights are made of the factors."""
    copy = deepcopy(model)

    def call(x):
        layers = [copy.q_proj, copy.k_proj, copy.out]
        q, k, out = (
            lambda y, layer=layer: nn.functional.linear(y, layer.effective_weight(), layer.base.bias)
            for layer in layers
        )
        return out(torch.tanh(q(x)) * k(x))

    return copy, call


def second_derivatives(call, model, x):
    x = x.clone().requires_grad_()
    own = trainable_parameters(model)
    first = torch.autograd.grad(call(x).square().sum(), [x, *own], create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), [x, *own])]


def test_a_gradient_can_be_differentiated():
    model = adapted(Shares(), target_modules=["q_proj", "k_proj", "out"])
    copy, call = plain(model)
    found, expected = second_derivatives(model, model, X), second_derivatives(call, copy, X)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, **EXACT)


@pytest.mark.parametrize(("layers", "lengths"), [(1, None), (2, None), (1, [1, 3]), (2, [1, 3])])
def test_the_gradient_of_layers_and_parts_computed_together_can_be_differentiated(layers, lengths):
    parts = len(lengths or [4])
    W = [torch.randn(3, 5, dtype=torch.float64) for _ in range(layers)]
    x = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    A, B = (
        [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(layers * parts)]
        for shape in ((2, 5), (3, 2))
    )

    def call(x, *factors):
        pairs = enumerate(zip(factors[: len(A)], factors[len(A) :], strict=True))
        return linear_with_update(x, [Term(W[i // parts], None, a, b, 0.5 + i) for i, (a, b) in pairs], lengths)

    assert torch.autograd.gradgradcheck(call, (x, *A, *B))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own use of it
def test_forward_mode_and_function_transforms_work():
    model = adapted(Shares(), target_modules=["q_proj", "k_proj", "out"])
    _, call = plain(model)
    for transform in (
        lambda f: torch.func.jvp(f, (X,), (X.flip(0),))[1],
        lambda f: torch.func.jacrev(f)(X),
        lambda f: torch.func.vmap(f)(X[:, None]),
    ):
        torch.testing.assert_close(transform(model), transform(call), **EXACT)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_the_base_are_called(register):
    model, called = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), []
    getattr(model[0], register)(lambda *_: called.append(1))
    adapted(model, target_modules=["0"])
    model(X.clone().requires_grad_()).sum().backward()
    assert called == [1]


def test_hooks_of_an_adapted_attention_are_called():
    model, called = nn.Sequential(nn.MultiheadAttention(8, 2)), []
    base = model[0]
    base.register_forward_pre_hook(lambda module, _: called.append(module))
    adapted(model, target_modules=["0"])
    unhooked = deepcopy(model[0])
    unhooked.base._forward_pre_hooks.clear()
    base.register_forward_hook(lambda _module, _args, output: (output[0] * 2, output[1]))
    torch.testing.assert_close(model[0](X, X, X)[0], unhooked(X, X, X)[0] * 2, **EXACT)
    assert called == [base]
    assert "forward" not in base.__dict__
