"""The hand-written backward pass against autograd's on the formula itself."""

import pytest
import torch
from torch import nn

import rankwise
from rankwise import LoraConfig
from rankwise.lora.linear_function import Term, linear_with_update


@pytest.mark.parametrize("trained", ["x A B", "A B", "x B", "x A", "x"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (1, 1), ()])
def test_result_and_gradients_are_those_of_the_formula(shape, bias, trained):
    torch.manual_seed(0)
    base = nn.Linear(11, 5, bias=bias, dtype=torch.float64).requires_grad_(False)
    given = {"x": torch.randn(*shape, 11), "A": torch.randn(3, 11), "B": torch.randn(5, 3)}
    x, A, B = (value.double().requires_grad_(name in trained) for name, value in given.items())
    ours = linear_with_update(x, [Term(base.weight, base.bias, A, B, 0.7)])[0]
    theirs = base(x) + 0.7 * (x @ A.T @ B.T)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    wanted = [value for value in (x, A, B) if value.requires_grad]
    upstream = torch.randn_like(theirs)
    for one, other in zip(
        torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(theirs, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_result_may_be_changed_in_place():
    x = torch.randn(2, 3, 11, dtype=torch.float64)
    base = nn.Linear(11, 5, dtype=torch.float64).requires_grad_(False)
    A, B = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 11), (5, 3)))
    ours = linear_with_update(x, [Term(base.weight, base.bias, A, B, 0.7)])[0]
    ours /= 2
    theirs = (base(x) + 0.7 * (x @ A.T @ B.T)) / 2
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(ours.sum(), [A, B]), torch.autograd.grad(theirs.sum(), [A, B]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_several_terms_of_one_input_have_the_gradients_of_their_sum_also_where_a_result_goes_unused():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 11, dtype=torch.float64, requires_grad=True)
    bases = [nn.Linear(11, d, dtype=torch.float64).requires_grad_(False) for d in (5, 4, 3)]
    A = [torch.randn(r, 11, dtype=torch.float64, requires_grad=True) for r in (2, 3, 1)]
    B = [torch.randn(d, r, dtype=torch.float64, requires_grad=True) for d, r in ((5, 2), (4, 3), (3, 1))]
    scales = (0.7, 2.0, -1.0)
    terms = [Term(base.weight, base.bias, a, b, s) for base, a, b, s in zip(bases, A, B, scales, strict=True)]
    ours = linear_with_update(x, terms)
    theirs = [base(x) + s * (x @ a.T @ b.T) for base, a, b, s in zip(bases, A, B, scales, strict=True)]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    wanted = [x, A[0], A[2], B[0], B[2]]
    of_ours = torch.autograd.grad(ours[0].sin().sum() + ours[2].sin().sum(), wanted)
    of_theirs = torch.autograd.grad(theirs[0].sin().sum() + theirs[2].sin().sum(), wanted)
    for one, other in zip(of_ours, of_theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("changed", ["forward", "hook", "pre-hook"])
@pytest.mark.parametrize("trains", [True, False])
def test_a_base_layer_that_does_more_than_its_product_is_called(changed, trains):
    torch.manual_seed(0)
    base = nn.Linear(11, 5, dtype=torch.float64)
    model = nn.Sequential(base)
    rankwise.inject_(model, LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(2, 11, dtype=torch.float64)
    with torch.no_grad():
        plain, doubled = model(x), model(x) + base(x)
    if changed == "forward":
        base.forward = lambda x: 2 * nn.functional.linear(x, base.weight, base.bias)
    elif changed == "hook":
        base.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    else:
        doubled = plain + nn.functional.linear(x, base.weight)
        base.register_forward_pre_hook(lambda _module, inputs: (2 * inputs[0],))
    with torch.set_grad_enabled(trains):
        torch.testing.assert_close(model(x), doubled, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [(2, 3, 1), (2, 0, 1)])
def test_parts_of_the_input_have_the_result_and_the_gradients_of_their_own_factors(ranks):
    torch.manual_seed(0)
    x = torch.randn(1, 9, 11, dtype=torch.float64, requires_grad=True)
    lengths = (4, 2, 3)
    bases = [nn.Linear(11, d, dtype=torch.float64).requires_grad_(False) for d in (5, 4)]
    A = [[torch.randn(r, 11, dtype=torch.float64, requires_grad=True) for r in ranks] for _ in bases]
    B = [[torch.randn(base.out_features, r, dtype=torch.float64, requires_grad=True) for r in ranks] for base in bases]
    scales = (0.7, 2.0, -1.0)
    terms = [
        Term(base.weight, base.bias, a, b, scale)
        for base, of_A, of_B in zip(bases, A, B, strict=True)
        for a, b, scale in zip(of_A, of_B, scales, strict=True)
    ]
    ours = linear_with_update(x, terms, lengths)
    theirs = [
        base(x)
        + torch.cat(
            [s * (own @ a.T @ b.T) for own, a, b, s in zip(x.split(lengths, 1), of_A, of_B, scales, strict=True)], 1
        )
        for base, of_A, of_B in zip(bases, A, B, strict=True)
    ]
    wanted = [x, *(factor for of_layer in (*A, *B) for factor in of_layer if factor.numel())]
    of_ours, of_theirs = (torch.autograd.grad(sum(y.sin().sum() for y in made), wanted) for made in (ours, theirs))
    for one, other in zip((*ours, *of_ours), (*theirs, *of_theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
