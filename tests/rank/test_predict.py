"""The reproducible rank of the gradient, against dense gradients and planted ones."""

import json
import math

import pytest
import torch
from conftest import ROOT, tiny

from rankwise import LoraConfig, inject_, paired_runs
from rankwise.cli.main import main
from rankwise.data.examples import TextExample
from rankwise.engine.language import LanguageEngine
from rankwise.errors import ConfigError
from rankwise.lora.places import named_lora_layers
from rankwise.rank.predict import LEAST_SHARE, SIGNAL, LayerSignal, Prediction, layer_signal, predict

WIDTH = 6
ROWS = [TextExample((5 + n, 6, 7 + n % 3, 8, 9), (False, False, True, True, True), "here") for n in range(8)]
HALVES = ([ROWS[:2], ROWS[2:4]], [ROWS[4:6], ROWS[6:]])


def planted(rank, noise, width=24, d=40, k=60, seed=0):
    """Sketches and gradients in their basis, as two passes would give them, of a signal in two noisy halves."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    signal = torch.linalg.qr(normal(d, max(rank, 1))).Q @ torch.linalg.qr(normal(k, max(rank, 1))).Q.T * (rank > 0)
    halves = [signal + noise * normal(d, k) / (d * k) ** 0.5 for _ in range(2)]
    A = normal(width, k)
    sketches = halves[0] @ A.T, halves[1] @ A.T
    Q = torch.linalg.qr(sketches[0]).Q
    return sketches, (Q.T @ halves[0], Q.T @ halves[1])


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_planted_rank_is_found_under_noise(rank):
    found = layer_signal("w", *planted(rank, noise=0.5))
    assert found.rank is not None
    assert SIGNAL * rank <= found.rank <= rank + 1
    assert found.counts


@pytest.mark.parametrize("rank", [1, 4])
def test_noise_does_not_raise_the_rank_of_a_layer_that_counts(rank):
    found = [layer_signal("w", *planted(rank, (2 * rank) ** 0.5, 64, 300, 300, seed)) for seed in range(5)]
    assert [layer.rank for layer in found] == [rank] * 5
    assert all(layer.counts and layer.share < 0.5 for layer in found)


def test_a_layer_that_needs_more_directions_than_were_sketched_says_so():
    found = layer_signal("w", *planted(20, noise=0.5, width=8))
    assert found.rank is None
    assert found.counts
    # All 24 of a matrix that has no more are enough.
    assert layer_signal("w", *planted(20, noise=0.0, width=24, d=24)).rank == 18


def test_pure_noise_has_no_signal_that_counts():
    found = [layer_signal("w", *planted(0, noise=1.0, seed=seed)) for seed in range(20)]
    assert not any(layer.counts for layer in found)
    assert all(abs(layer.share) < LEAST_SHARE for layer in found)
    assert any(layer.rank is None for layer in found)


def reference(gradients, A):
    """The same from dense gradients [d, k] of both halves, step by step."""
    sketches = [G @ A.T for G in gradients]
    signal = (sketches[0] * sketches[1]).sum() / WIDTH
    share = signal * WIDTH / (sketches[0].norm() * sketches[1].norm())
    Q = torch.linalg.qr(sketches[0]).Q
    own, other = (Q.T @ G for G in gradients)
    U, S, Vh = torch.linalg.svd(own, full_matrices=False)
    held = [sum(S[i] * (U[:, i] @ other @ Vh[i]) for i in range(n + 1)) for n in range(WIDTH)]
    rank = min(n + 1 for n in range(WIDTH) if held[n] >= SIGNAL * max(held))
    beyond = max(held) < SIGNAL * signal and rank > WIDTH / 2
    return share.item(), rank if signal > 0 and not beyond else None


def test_it_equals_what_dense_gradients_give_and_makes_none():
    dense = tiny("llama", torch.float64)
    dense.lm_head.weight.data *= 30
    plain = LanguageEngine(dense, 2, ROWS)
    model = tiny("llama", torch.float64)
    model.lm_head.weight.data *= 30
    inject_(model, LoraConfig(r=WIDTH))
    layers = dict(named_lora_layers(model))
    before = plain.logits(ROWS)[0].detach()
    engine = LanguageEngine(model, 2, ROWS)
    found = predict(engine, HALVES, seed=4)
    torch.testing.assert_close(engine.logits(ROWS)[0], before)
    assert all(p.grad is None for p in model.parameters())
    gradients = []
    for half in HALVES:
        dense.zero_grad()
        for batch in half:
            plain.loss(batch).backward()
        gradients.append({name: dense.get_submodule(name).weight.grad.clone() for name in layers})
    generator = torch.Generator().manual_seed(4)
    for layer in found:
        k = layers[layer.name].base.in_features
        A = torch.randn(WIDTH, k, generator=generator, dtype=torch.float64)
        share, rank = reference([half[layer.name] for half in gradients], A)
        assert layer.share == pytest.approx(share)
        assert layer.rank == rank
    assert any(layer.rank for layer in found)


def test_the_range_counts_only_layers_with_a_signal_and_never_names_one_rank_as_enough():
    layers = [LayerSignal(str(n), 0.6, rank, 64) for n, rank in enumerate([3, 3, 5, 5, 12])]
    noisy = [LayerSignal("noise", 0.1, 60, 64), LayerSignal("none", -0.2, None, 64)]
    found = Prediction((*layers, *noisy), bits=1e5, numbers_per_rank=1000)
    assert found.range == Prediction(tuple(layers), 1e5, 1000).range == (8, 16)
    assert "no result" in str(found)
    assert found.capacity == pytest.approx((1e5 / 2750, 1e5 / 1700))
    assert Prediction(tuple(noisy), 1e5, 1000).range is None
    assert "more --signal-batches" in str(Prediction(tuple(noisy), 1e5, 1000))


def test_layers_that_need_more_than_was_sketched_raise_the_range():
    narrow, wide = [LayerSignal("n", 0.5, 2, 8)], [LayerSignal("w", 0.9, None, 8)]
    high = Prediction((*narrow * 2, *wide), 1e5, 1000)
    assert high.range == (2, math.inf)
    assert high.as_dict()["range"] == [2, None]
    assert "r = 2 to more than 8 (" in str(high)
    both = Prediction((*narrow, *wide * 12), 1e5, 1000)
    assert both.range == (math.inf, math.inf)
    assert "Worth trying: more than r = 8 (" in str(both)


def test_an_empty_half_and_other_layers_are_refused():
    model = tiny("llama")
    inject_(model, LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(ConfigError, match=r"linear layers alone.*embed_tokens"):
        predict(LanguageEngine(model, 2, ROWS), HALVES, 0)
    model = tiny("llama")
    inject_(model, LoraConfig(r=2))
    with pytest.raises(ConfigError, match="each half"):
        predict(LanguageEngine(model, 2, ROWS), ([ROWS], []), 0)


@pytest.mark.parametrize("batch", [["--batch-size", "4"], ["--batch-tokens", "300"]])
def test_no_row_stands_in_both_halves_and_repeated_rows_hold_their_bits_once(
    tiny_llama_folder, tmp_path, monkeypatch, batch
):
    rows = (ROOT / "examples/text_to_sql/train.jsonl").read_text().splitlines(keepends=True)[:12]
    seen, bits = [], []

    def watched(engine, halves, seed):
        seen.append([{row.ids for batch in half for row in batch} for half in halves])
        return predict(engine, halves, seed)

    monkeypatch.setattr(paired_runs, "predict", watched)
    for copies in (1, 3):
        (tmp_path / "data.jsonl").write_text("".join(rows * copies))
        out = tmp_path / f"{copies}.json"
        options = ["--model", str(tiny_llama_folder), "--data", str(tmp_path / "data.jsonl"), "--out", str(out)]
        assert main(["rank", "predict", *options, *batch, "--eval-fraction", "0", "--signal-batches", "16"]) == 0
        bits.append(json.loads(out.read_text())["bits"])
    for one, other in seen:
        assert one
        assert other
        assert not one & other
    assert bits[0] == pytest.approx(bits[1], rel=1e-5)


def test_too_few_rows_for_two_batches_of_so_many_tokens_are_refused(tiny_llama_folder, tmp_path, capsys):
    rows = (ROOT / "examples/text_to_sql/train.jsonl").read_text().splitlines(keepends=True)[:4]
    (tmp_path / "data.jsonl").write_text("".join(rows * 9))
    options = ["--model", str(tiny_llama_folder), "--data", str(tmp_path / "data.jsonl"), "--eval-fraction", "0"]
    assert main(["rank", "predict", *options, "--batch-tokens", "4000", "--out", str(tmp_path / "o.json")]) == 2
    assert "one batch of 4000 tokens, and the training data hold 4 different rows" in capsys.readouterr().err


def test_the_command_trains_a_classifiers_head_first_and_keeps_the_result(tmp_path, capsys):
    rows = (ROOT / "examples/intents/train.jsonl").read_text().splitlines(keepends=True)
    some = [row for row in rows if json.loads(row)["label"] in ("translate", "timer", "weather")]
    (tmp_path / "data.jsonl").write_text("".join(some[:90]))
    out = tmp_path / "predict.json"
    options = ["--model", "minilm-l6", "--task", "seq_cls", "--data", str(tmp_path / "data.jsonl"), "--out", str(out)]
    narrow = ["--directions", "16", "--signal-batches", "4", "--target-modules", "query", "value"]
    assert main(["rank", "predict", *options, *narrow]) == 0
    found = json.loads(out.read_text())
    assert len(found["layers"]) == 12
    assert found["numbers_per_rank"] == 12 * 2 * 384
    # A head that is not trained loses log2(3) bits a row.
    assert 0 < found["bits"] < 81 * 1.58
    assert "no result" in capsys.readouterr().out


def test_the_command_looks_for_no_more_directions_than_a_matrix_has_and_names_too_few_rows(
    tiny_llama_folder, tmp_path, capsys
):
    rows = (ROOT / "examples/text_to_sql/train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data.jsonl").write_text("".join(rows[:24]))
    out = tmp_path / "predict.json"
    options = ["--model", str(tiny_llama_folder), "--data", str(tmp_path / "data.jsonl"), "--out", str(out)]
    assert main(["rank", "predict", *options, "--batch-size", "16"]) == 2
    assert "training data hold 21 different rows; give more rows, or --batch-size 10" in capsys.readouterr().err
    assert main(["rank", "predict", *options, "--batch-size", "4", "--eval-fraction", "0"]) == 0
    sketched = {layer["name"].rpartition(".")[2]: layer["sketched"] for layer in json.loads(out.read_text())["layers"]}
    assert sketched["k_proj"] < sketched["q_proj"] < 64
