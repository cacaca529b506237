"""What adapters have in common: φ by its definition, its mean for random subspaces, and modules by type and layer."""

import pytest
import torch

from rankwise.lora.low_rank import LowRank
from rankwise.rank.similarity import compare_adapters, input_directions, layer_map, similarities, types_and_layers


def update(r, d=20, k=30, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(r, k, generator=draw), torch.randn(d, r, generator=draw), 0.5)


def test_directions_are_the_right_singular_vectors_of_the_dense_update():
    some = update(4)
    found = input_directions(some)
    expected = torch.linalg.svd(some.delta(torch.float64)).Vh[:4].T
    torch.testing.assert_close((found.T @ expected).abs(), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)


def test_similarity_is_one_minus_the_squared_distance_of_the_projections_over_n():
    one, other = (input_directions(update(4, seed=seed)) for seed in (0, 1))
    found = similarities(one, other)
    for n in range(1, 5):
        projections = one[:, :n] @ one[:, :n].T, other[:, :n] @ other[:, :n].T
        # Half the squared Frobenius distance of the projections is n - ‖V1ᵀ·V2‖².
        distance = (projections[0] - projections[1]).square().sum() / 2
        assert found[n - 1] == pytest.approx(1 - distance.item() / n)


def test_an_update_is_wholly_similar_to_itself_and_to_one_that_spans_the_same():
    some = update(4)
    mixed = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    same = LowRank(mixed @ some.A.double(), some.B.double() @ torch.linalg.inv(mixed), some.scale)
    assert torch.allclose(similarities(input_directions(some), input_directions(some)), torch.ones(4).double())
    assert similarities(input_directions(some), input_directions(same))[-1] == pytest.approx(1.0)


def test_random_updates_have_n_over_k_in_common_in_the_mean():
    pairs = [(update(4, seed=2 * n), update(4, seed=2 * n + 1)) for n in range(200)]
    found = torch.stack([similarities(input_directions(a), input_directions(b)) for a, b in pairs])
    errors = found.std(0) / len(pairs) ** 0.5
    assert torch.all((found.mean(0) - torch.arange(1, 5) / 30).abs() < 4 * errors)


def test_adapters_are_compared_by_module_type_where_both_have_the_module():
    one = {f"h.{n}.{kind}": update(r=4, seed=n) for n in range(3) for kind in ("q", "v")}
    other = {f"h.{n}.{kind}": update(r=2, seed=n if kind == "q" else 9 + n) for n in range(3) for kind in ("q", "v")}
    del other["h.1.v"]
    found = compare_adapters("two", one, other, [1, 2, 4])
    assert found.sizes == (1, 2)
    assert found.random == {"q": (1 / 30, 2 / 30), "v": (1 / 30, 2 / 30)}
    expected = similarities(*(input_directions(adapter["h.0.v"]) for adapter in (one, other)))
    expected += similarities(*(input_directions(adapter["h.2.v"]) for adapter in (one, other)))
    assert found.kinds["v"] == pytest.approx((expected / 2).tolist())


def test_modules_are_told_apart_by_what_they_are_and_where():
    bert = [f"encoder.layer.{n}.{kind}" for n in (0, 10) for kind in ("attention.output.dense", "output.dense")]
    split = types_and_layers([*bert, "pooler.dense"])
    assert split[bert[0]] == ("attention.output.dense", "0")
    assert split[bert[3]] == ("output.dense", "10")
    assert split["pooler.dense"] == ("pooler.dense", "")
    found = layer_map("ranks", {**{name: n for n, name in enumerate(bert)}, "pooler.dense": 7})
    assert found.layers == ("", "0", "10")
    assert found.kinds["output.dense"] == (None, 1, 3)
    assert found.kinds["pooler.dense"] == (7, None, None)


def test_the_layers_of_an_encoder_and_of_a_decoder_are_told_apart():
    t5 = [
        f"{stack}.block.{n}.layer.0.SelfAttention.{kind}"
        for stack, depth in (("encoder", 2), ("decoder", 3))
        for n in range(depth)
        for kind in ("q", "v")
    ]
    t5 += [f"decoder.block.{n}.layer.1.EncDecAttention.q" for n in range(3)]
    found = layer_map("ranks", {name: n for n, name in enumerate(t5)})
    assert found.kinds["encoder.block.SelfAttention.q"] == (0, 2, None)
    assert found.kinds["decoder.block.SelfAttention.q"] == (4, 6, 8)
    assert found.kinds["EncDecAttention.q"] == (10, 11, 12)
    assert sorted(value for value in found.values if value is not None) == list(range(len(t5)))
