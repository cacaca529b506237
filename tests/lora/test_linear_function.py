"""The hand-written backward pass against autograd's on the formula itself."""

import pytest
import torch
from torch import nn

from rankwise.lora.linear_function import LinearWithUpdate


@pytest.mark.parametrize("trained", ["x A B", "A B", "x B", "x A", "x"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (1, 1), ()])
def test_result_and_gradients_are_those_of_the_formula(shape, bias, trained):
    torch.manual_seed(0)
    base = nn.Linear(11, 5, bias=bias, dtype=torch.float64).requires_grad_(False)
    given = {"x": torch.randn(*shape, 11), "A": torch.randn(3, 11), "B": torch.randn(5, 3)}
    x, A, B = (value.double().requires_grad_(name in trained) for name, value in given.items())
    ours = LinearWithUpdate.apply(x, base.weight, base.bias, A, B, 0.7)
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
    ours = LinearWithUpdate.apply(x, base.weight, base.bias, A, B, 0.7)
    ours /= 2
    theirs = (base(x) + 0.7 * (x @ A.T @ B.T)) / 2
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(ours.sum(), [A, B]), torch.autograd.grad(theirs.sum(), [A, B]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
