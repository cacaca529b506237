"""Products with frozen weights, whichever library computes them, against the formula in fp64."""

import pytest
import torch
from conftest import randomise_adapter, tiny
from torch import nn

from rankwise import LoraConfig, inject_
from rankwise.lora.frozen_product import frozen_linear, prepare, runs_in_onednn
from rankwise.lora.prepared import preparable, prepared_weights, shared_inputs

needs_onednn = pytest.mark.skipif(not runs_in_onednn(torch.empty(2, 2)), reason="torch has no oneDNN here")


def assert_close(ours, x, weight, bias=None):
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (700,), (2, 400)])
def test_a_product_is_that_of_the_formula_and_no_view(shape, biased):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*shape, 48), torch.randn(400, 48), torch.randn(400)
    ours = frozen_linear(x, weight, bias if biased else None)
    assert_close(ours, x, weight, bias if biased else None)
    assert not ours._is_view()
    assert ours.is_contiguous()


@needs_onednn
@pytest.mark.parametrize("rows", [1, 7, 512, 1000])
def test_prepared_copies_give_the_products_of_both_directions(rows):
    torch.manual_seed(0)
    weight = torch.randn(72, 48)
    prepared = prepare(weight)
    x, gradient = torch.randn(rows, 48), torch.randn(rows, 72)
    assert_close(frozen_linear(x, prepared.forward), x, weight)
    assert_close(frozen_linear(gradient, prepared.backward), gradient, weight.T)


def adapted():
    model = tiny("llama")
    inject_(model, LoraConfig(r=2))
    randomise_adapter(model)
    return model


def gradients(model):
    ids = torch.arange(40)[None] % 60
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])


@needs_onednn
def test_training_with_prepared_weights_has_the_same_gradients_and_leaves_nothing_behind():
    model = adapted()
    expected = gradients(model)
    with prepared_weights(model, 1e9):
        assert preparable(model)
        assert all(layer.prepared is not None for layer in preparable(model))
        ours = gradients(model)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert all(layer.prepared is None for layer in preparable(model))


@needs_onednn
def test_a_weight_that_is_replaced_meanwhile_is_used_as_it_is():
    model, other = adapted(), adapted()
    with prepared_weights(model, 1e9):
        for changed in (model, other):
            for layer in preparable(changed):
                layer.base.weight = nn.Parameter(layer.base.weight * 2, requires_grad=False)
        assert torch.equal(gradients(model), gradients(other))


def test_copies_that_take_more_than_may_be_are_not_made():
    model = adapted()
    with prepared_weights(model, 100):
        assert all(layer.prepared is None for layer in preparable(model))


def test_layers_with_the_same_input_compute_together_with_the_same_gradients():
    model = adapted()
    expected = gradients(model)
    with shared_inputs(model, lambda: model(input_ids=torch.arange(9)[None])):
        together = {layer.shared_input for layer in preparable(model) if layer.shared_input is not None}
        blocks = model.config.num_hidden_layers
        assert sorted(len(shared.layers) for shared in together) == [2] * blocks + [3] * blocks
        ours = gradients(model)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert all(layer.shared_input is None for layer in preparable(model))


def test_an_input_that_is_changed_in_place_between_two_calls_counts_as_another():
    model = adapted()
    first, second = preparable(model)[:2]
    with shared_inputs(model, lambda: model(input_ids=torch.arange(9)[None])):
        x = torch.randn(1, 4, first.base.in_features)
        first(x)
        x *= 2
        torch.testing.assert_close(second(x), second.with_changes(x, second.base(x)))
