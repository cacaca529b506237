"""Swapping an adapter's values in place."""

import pytest
import torch
from conftest import randomise_adapter, tiny
from torch import nn

from rankwise import LoraConfig, eject_, inject_, load_adapter_, save_adapter, swap_adapter_
from rankwise.errors import CheckpointError

IDS = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])
WIDE = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "embed_tokens"]}


def saved(folder, seed=3, **config):
    """An adapter of its own in `folder`, and the logits that it gives."""
    model = tiny("llama")
    inject_(model, LoraConfig(**{**WIDE, **config}))
    randomise_adapter(model, seed)
    save_adapter(model, folder)
    return model(IDS).logits


def host(**config):
    model = tiny("llama")
    inject_(model, LoraConfig(**{**WIDE, **config}))
    randomise_adapter(model, 1)
    return model


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"r": 2, "lora_alpha": 50},
        {"use_rslora": True},
        {"target_modules": ["v_proj"]},
        {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"v_proj": 3}},
    ],
    ids=str,
)
def test_the_model_computes_as_with_the_other_adapter_loaded(config, tmp_path):
    expected = saved(tmp_path, **config)
    model = host()
    swap_adapter_(model, tmp_path)
    torch.testing.assert_close(model(IDS).logits, expected)
    save_adapter(model, tmp_path / "again")
    eject_(model)
    load_adapter_(model, tmp_path / "again")
    torch.testing.assert_close(model(IDS).logits, expected)


# torch warns of its own way to trace an autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_is_not_compiled_again(tmp_path):
    expected = {name: saved(tmp_path / name, seed, r=r) for name, seed, r in (("one", 5, 2), ("two", 6, 4))}
    model = host().eval()
    compilations = []

    def backend(graph, _):
        compilations.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(IDS, use_cache=False)
        first = len(compilations)
        for name, logits in expected.items():
            swap_adapter_(model, tmp_path / name)
            torch.testing.assert_close(compiled(IDS, use_cache=False).logits, logits)
    assert first
    assert len(compilations) == first


@pytest.mark.parametrize(
    ("config", "of_host", "message"),
    [
        ({"r": 6}, {}, "rank 6 does not fit into rank 4"),
        ({"target_modules": ["k_proj", "o_proj"]}, {}, "k_proj: the model's adapter does not adapt it(.|\n)*o_proj"),
        ({"use_dora": True, "target_modules": ["q_proj"]}, {}, "lora_magnitude_vector: there is no place"),
        ({}, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, "trains more than low-rank updates"),
        ({}, {"init_lora_weights": "pissa", "target_modules": ["q_proj", "v_proj"]}, "cannot be swapped"),
    ],
)
def test_what_does_not_fit_is_told_and_changes_nothing(config, of_host, message, tmp_path):
    saved(tmp_path, **config)
    model = host(**of_host)
    before = model(IDS).logits
    with pytest.raises(CheckpointError, match=message):
        swap_adapter_(model, tmp_path)
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(
    ("theirs", "here", "message"),
    [
        (nn.Conv2d(3, 4, (3, 1)), nn.Conv2d(3, 4, (1, 3)), r"lora_A.weight of \[r, 3, 1, 3\].*\[r, 3, 3, 1\]"),
        (nn.Embedding(6, 4), nn.Linear(6, 4), r"lora_A.weight of \[r, 6\].*lora_embedding_A of \[r, 6\]"),
    ],
)
def test_a_layer_of_another_kind_or_kernel_is_told(theirs, here, message, tmp_path):
    other, model = (nn.Sequential(layer) for layer in (theirs, here))
    for own in (other, model):
        inject_(own, LoraConfig(r=2, target_modules=["0"]))
    randomise_adapter(other)
    save_adapter(other, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        swap_adapter_(model, tmp_path)
