import pytest
import torch
from conftest import randomise_adapter, tiny

from rankwise import LoraConfig, adapters_off, eject_, inject_, merge_, merge_and_remove_, unmerge_
from rankwise.errors import MergeError

IDS = torch.arange(3, 19).view(2, 8)
CASES = [
    ("llama", ["q_proj", "down_proj", "embed_tokens"]),
    ("llama-tied", ["embed_tokens"]),
    ("llama-tied", ["lm_head", "v_proj"]),
    ("gpt2", ["c_attn", "c_proj", "wte"]),
    ("bert", ["query", "dense", "word_embeddings"]),
]


@pytest.mark.parametrize(("family", "targets"), CASES)
def test_merged_computes_as_unmerged_and_unmerge_returns_the_very_tensors(family, targets):
    model = tiny(family, torch.float64)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject_(model, LoraConfig(target_modules=targets))
    randomise_adapter(model)
    adapted = model(IDS).logits
    for _ in range(3):
        merge_(model)
        torch.testing.assert_close(model(IDS).logits, adapted, rtol=1e-12, atol=1e-12)
        unmerge_(model)
        assert torch.equal(model(IDS).logits, adapted)
    merge_(model)
    eject_(model)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_merge_leaves_the_module_that_shares_the_weight_unchanged(target):
    model = tiny("llama-tied")
    other = model.lm_head if target == "embed_tokens" else model.model.embed_tokens
    shared = other.weight
    values = shared.clone()
    inject_(model, LoraConfig(target_modules=[target]))
    randomise_adapter(model)
    report = merge_(model)
    assert len(report.untied) == 1
    assert other.weight is shared
    assert torch.equal(shared, values)


def test_adapters_off_while_merged_is_the_base_and_stays_merged_afterwards():
    model = tiny("llama")
    before = model(IDS).logits
    inject_(model, LoraConfig())
    randomise_adapter(model)
    merge_(model)
    merged = model(IDS).logits
    with adapters_off(model):
        assert torch.equal(model(IDS).logits, before)
    assert torch.equal(model(IDS).logits, merged)


def test_a_low_precision_merge_rounds_once_and_reports_what_rounding_lost():
    model = tiny("llama", torch.bfloat16)
    weight = model.model.layers[0].self_attn.q_proj.weight.clone()
    inject_(model, LoraConfig(r=4, target_modules=["q_proj"]))
    randomise_adapter(model, std=0.001)
    layer = model.model.layers[0].self_attn.q_proj
    update = layer.update("default")
    exact = weight.double() + update.scale * (update.lora_B.double() @ update.lora_A.double())
    report = merge_(model)
    torch.testing.assert_close(layer.base.weight, exact.bfloat16(), rtol=0, atol=0)
    unchanged = [
        (layer.unmerged["weight"] == layer.base.weight).sum().item()
        for layer in (block.self_attn.q_proj for block in model.model.layers)
    ]
    assert report.lost_to_rounding == sum(unchanged) > 0
    assert report.changed_by_update == 2 * 32 * 32


def test_merging_twice_or_to_infinity_is_refused_and_changes_nothing():
    model = tiny("llama")
    inject_(model, LoraConfig())
    merge_(model)
    with pytest.raises(MergeError, match="already holds merged"):
        merge_(model)
    unmerge_(model)
    layer = model.model.layers[1].mlp.up_proj
    layer.update("default").lora_B.data[:] = float("inf")
    with pytest.raises(MergeError, match=r"layers\.1\.mlp\.up_proj"):
        merge_(model)
    assert not any(getattr(m, "merged", False) for m in model.modules())


def test_merge_and_remove_leaves_a_plain_model():
    model = tiny("bert")
    inject_(model, LoraConfig(task_type="SEQ_CLS"))
    randomise_adapter(model)
    adapted = model(IDS).logits
    merge_and_remove_(model)
    assert model.state_dict().keys() == tiny("bert").state_dict().keys()
    torch.testing.assert_close(model(IDS).logits, adapted, rtol=1e-5, atol=1e-5)
