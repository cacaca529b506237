"""The curve, and the nested run: an adapter cut to its first directions."""

import json
from contextlib import suppress

import numpy as np
import pytest
import torch
from conftest import ROOT, randomise_adapter, tiny

from rankwise import LoraConfig, eject_, inject_, trainable_parameters
from rankwise.cli.main import main
from rankwise.data.examples import TextExample
from rankwise.engine.language import LanguageEngine
from rankwise.errors import ConfigError
from rankwise.lora.inject import DEFAULT_ADAPTER
from rankwise.lora.places import named_lora_layers
from rankwise.paired_runs import PairedRuns
from rankwise.rank.curve import Curve, fit_curve, interval, rank_within, resampled
from rankwise.rank.nested import (
    NestedEngine,
    cut_,
    direction_weights,
    losses_by_rank,
    nested,
    nested_estimate,
    nested_ranks,
)
from rankwise.train.config import TrainConfig
from rankwise.train.loop import Training
from rankwise.train.progress import Reporter

RANKS = [1, 2, 4, 8]
EXAMPLES = [TextExample((5, 6, 7 + n, 8 + n), (False, False, True, True), "here") for n in range(6)]


@pytest.mark.parametrize("curve", [Curve(1.2, 0.5, 0.4), Curve(0.0, 2.0, 1.45), Curve(3.0, 0.1, 3.0)])
def test_a_curve_is_recovered_from_its_own_points(curve):
    found = fit_curve({rank: curve.loss(rank) for rank in [*RANKS, 16, 32]})
    assert (found.limit, found.excess, found.exponent) == pytest.approx(
        (curve.limit, curve.excess, curve.exponent), rel=1e-3, abs=1e-4
    )


def test_a_loss_that_rises_with_the_rank_is_a_flat_curve():
    assert fit_curve({1: 1.0, 2: 1.1, 4: 1.2}).excess == 0


@pytest.mark.parametrize(
    ("losses", "margin", "rank"),
    [
        ({1: 1.0, 2: 1.1, 4: 1.2}, 0.01, 1),
        ({1: 0.9, 2: 0.5, 4: 0.1, 8: 0.1}, 0.1, 2 * 2**0.75),
        ({1: 0.1, 2: 0.5, 4: 0.1, 8: 0.1}, 0.2, 2 * 2**0.5),
        ({1: 0.9, 4: 0.5, 16: 0.1}, 0.1, 4 * 4**0.75),
        ({1: 0.9, 2: 0.8, 4: 0.7}, 0.1, 2),
    ],
)
def test_the_rank_within_the_margin_is_read_between_the_measured_ones_from_the_largest_down(losses, margin, rank):
    assert rank_within(losses, margin) == pytest.approx(rank)


def test_bootstrap_intervals_cover_the_truth_and_shrink_with_more_examples():
    truth, rng = Curve(1.0, 0.4, 1.0), np.random.default_rng(0)

    def limits(examples):
        hard = rng.normal(0, 0.5, examples)
        losses = {rank: truth.loss(rank) + hard + rng.normal(0, 0.05, examples) for rank in RANKS}
        return interval([fit_curve(sample).limit for sample in resampled(losses, np.ones(examples), draws=60)])

    small, large = limits(100), limits(1600)
    assert large[1] - large[0] < small[1] - small[0]
    covered = [low <= truth.limit <= high for low, high in (limits(200) for _ in range(12))]
    assert sum(covered) >= 8


def engine(rank=8):
    model = tiny("llama", torch.float64)
    inject_(model, LoraConfig(r=rank))
    randomise_adapter(model)
    return LanguageEngine(model, 2, EXAMPLES)


def test_a_cut_adapter_is_the_adapter_of_its_first_directions():
    whole, factors = engine(), {}
    for name, layer in named_lora_layers(whole.model):
        update = layer.update(DEFAULT_ADAPTER)
        factors[name] = (update.lora_A.detach().clone(), update.lora_B.detach().clone())
    for rank in (1, 3, 8):
        cut_(whole.model, rank)
        nested = whole.logits(EXAMPLES)[0]
        own = tiny("llama", torch.float64)
        inject_(own, LoraConfig(r=rank, lora_alpha=rank))
        for name, layer in named_lora_layers(own):
            A, B = factors[name]
            layer.update(DEFAULT_ADAPTER).set(A[:rank], B[:, :rank] * B.new_tensor(direction_weights(rank)) * 32)
        torch.testing.assert_close(nested, LanguageEngine(own, 2, EXAMPLES).logits(EXAMPLES)[0])


def test_a_step_trains_one_drawn_rank_with_one_pass_and_no_direction_beyond_it():
    whole = engine()
    seen, count = [], 0

    class Counting:
        model = whole.model

        def loss(self, examples, label_smoothing):
            nonlocal count
            count += 1
            return whole.loss(examples, label_smoothing)

    nested = NestedEngine(Counting(), RANKS, seed=0)
    for _ in range(12):
        for parameter in trainable_parameters(whole.model):
            parameter.grad = None
        nested.begin_step()
        nested.loss(EXAMPLES).backward()
        gradient = next(iter(dict(named_lora_layers(whole.model)).values())).update(DEFAULT_ADAPTER).lora_A.grad
        trained = int((gradient.abs().sum(1) > 0).sum())
        assert not gradient[trained:].any()
        seen.append(trained)
    assert count == 12
    assert set(seen) <= set(RANKS)
    assert len(set(seen)) > 2


def test_a_step_of_the_loop_trains_one_rank_in_all_its_batches():
    whole, ranks = engine(), []
    update = next(iter(dict(named_lora_layers(whole.model)).values())).update(DEFAULT_ADAPTER)

    class Noting(NestedEngine):
        def loss(self, examples, label_smoothing=0.0):
            ranks.append(len(update.directions))
            return super().loss(examples, label_smoothing)

    config = TrainConfig(model="m", data=("d",), out="o", batch_size=2, accumulate=2, epochs=9)
    steps = list(Training(Noting(whole, RANKS, seed=0), EXAMPLES[:4], config).steps())
    assert len(ranks) == 2 * len(steps) == 18
    assert ranks[::2] == ranks[1::2]
    assert len(set(ranks)) > 2


def test_a_loop_that_begins_no_step_trains_no_single_rank_by_mistake():
    with pytest.raises(RuntimeError, match="begin_step"):
        NestedEngine(engine(), RANKS, seed=0).loss(EXAMPLES)


def test_measuring_the_ranks_leaves_the_adapter_whole_and_agrees_with_base_and_whole():
    whole = engine()
    before = whole.logits(EXAMPLES)[0]
    losses, counts = losses_by_rank(whole, EXAMPLES, RANKS)
    torch.testing.assert_close(whole.logits(EXAMPLES)[0], before)
    cut_(whole.model, 8)
    assert losses[8].sum() / counts.sum() == pytest.approx(whole.loss(EXAMPLES).item())
    cut_(whole.model, None)
    eject_(whole.model)
    assert losses[0].sum() / counts.sum() == pytest.approx(whole.loss(EXAMPLES).item())


def test_examples_that_ask_the_same_are_one_when_the_ranks_are_measured():
    losses, counts = losses_by_rank(engine(), EXAMPLES * 3, RANKS)
    once, counts_of_once = losses_by_rank(engine(), EXAMPLES, RANKS)
    np.testing.assert_allclose(counts, 3 * counts_of_once)
    for rank in (0, *RANKS):
        np.testing.assert_allclose(losses[rank], 3 * once[rank])


def test_a_doubling_of_the_rank_adds_half_of_what_the_first_direction_counts():
    assert direction_weights(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 8, *[1 / 16] * 4]
    assert [sum(direction_weights(2**n)) for n in range(7)] == [1 / 2 + n / 4 for n in range(7)]


def test_the_ranks_double_up_to_the_largest():
    assert nested_ranks(16) == [1, 2, 4, 8, 16]
    assert nested_ranks(12) == [1, 2, 4, 8, 12]


def test_an_estimate_says_that_it_errs_high_and_a_run_that_learned_nothing_gives_none():
    rng = np.random.default_rng(1)
    hard = rng.normal(2, 0.3, 200)
    losses = {rank: hard + 0.3 / rank + rng.normal(0, 0.02, 200) for rank in RANKS} | {0: hard + 1.5}
    found = nested_estimate(losses, np.ones(200), draws=40)
    assert "errs high" in str(found)
    assert "too low" not in str(found)
    risen = nested_estimate(losses | {max(RANKS): losses[1]}, np.ones(200), draws=40)
    assert "the loss rises again above r = 4" in str(risen)
    assert found.rank_interval[0] <= found.rank <= found.rank_interval[1]
    with pytest.raises(ConfigError, match="did not lower"):
        nested_estimate(losses | {0: hard}, np.ones(200))
    with pytest.raises(ConfigError, match=r"went astray at its larger ranks: .* lower --lr or --r"):
        nested_estimate(losses | {max(RANKS): hard + 1.4}, np.ones(200))
    with pytest.raises(ConfigError, match="three ranks"):
        nested_estimate({0: hard, 1: hard, 2: hard}, np.ones(200))


def test_noise_alone_gives_no_estimate():
    rng, answers = np.random.default_rng(2), 0
    for _ in range(60):
        hard = rng.normal(2, 0.5, 100)
        losses = {rank: hard + rng.normal(0, 0.05, 100) for rank in (0, *RANKS)}
        with suppress(ConfigError):
            nested_estimate(losses, np.ones(100), draws=60)
            answers += 1
    # One in twenty, and three standard errors.
    assert answers <= 8


def test_the_interval_of_the_rank_knows_that_the_margin_is_measured():
    rng = np.random.default_rng(3)
    hard, noise = rng.normal(2, 0.3, 200), rng.normal(0, 3, 200)
    losses = {rank: hard + 0.5 / rank + rng.normal(0, 0.02, 200) for rank in [*RANKS, 16]}
    low, high = nested_estimate(losses | {0: hard + 1.5}, np.ones(200), draws=40).rank_interval
    unsure = nested_estimate(losses | {0: hard + 1.5 + noise - noise.mean()}, np.ones(200), draws=40).rank_interval
    assert unsure[0] < low <= high < unsure[1]


def test_no_rank_above_the_largest_is_named():
    hard = np.random.default_rng(4).normal(2, 0.3, 100)
    gains = {0: 1.0, 1: 0.5, 2: 0.3, 4: 0.2, 8: 0.1, 12: 0.0}
    assert "at r = 12." in str(nested_estimate({r: hard + g for r, g in gains.items()}, np.ones(100), draws=40))


def test_too_few_ranks_are_told_before_anything_trains():
    def never(_engine):
        raise AssertionError("it trained")

    with pytest.raises(ConfigError, match="--r of at least 3; found the ranks 1, 2"):
        nested(engine(rank=2), never, EXAMPLES, largest=2)


def test_a_classifiers_base_has_a_trained_head(minilm, tmp_path):
    rows = (ROOT / "examples/intents/train.jsonl").read_text().splitlines(keepends=True)
    some = [row for row in rows if json.loads(row)["label"] in ("translate", "timer", "weather")]
    (tmp_path / "train.jsonl").write_text("".join(some[:60]))
    (tmp_path / "test.jsonl").write_text("".join(some[60:90]))
    config = TrainConfig(
        model=str(minilm),
        task="seq_cls",
        data=(tmp_path / "train.jsonl",),
        eval_data=(tmp_path / "test.jsonl",),
        out=tmp_path / "out",
        lr=0.005,
        batch_size=8,
        epochs=2,
        r=4,
    )
    found = PairedRuns(config, 4).nested_run(Reporter())
    base = PairedRuns(config, 4)(0, 0, 1.0)
    assert found.losses[0] == pytest.approx(base.losses.sum() / base.counts.sum(), rel=1e-5)
    # Without a trained head it would be that of three labels by chance.
    assert found.losses[0] < 0.95 * np.log(3)


def test_the_command_prints_a_loss_for_every_rank_and_keeps_the_result(tiny_llama_folder, tmp_path, capsys):
    rows = (ROOT / "examples/text_to_sql/train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data.jsonl").write_text("".join(rows[:24]))
    out = tmp_path / "nested.json"
    options = ["--model", str(tiny_llama_folder), "--data", str(tmp_path / "data.jsonl"), "--out", str(out)]
    assert main(["rank", "nested", *options, "--r", "4", "--max-steps", "6", "--lr", "0.02", "--batch-size", "4"]) == 0
    found = json.loads(out.read_text())
    assert list(found["losses"]) == ["0", "1", "2", "4"]
    assert found["losses"]["4"] < found["losses"]["0"]
    assert "errs high" in capsys.readouterr().out
    assert main(["rank", "nested", *options]) == 2
    assert "exists already" in capsys.readouterr().err
    for command in ("nested", "predict"):
        assert main(["rank", command, *options[:-1], str(out / "below_a_file.json")]) == 2
        told = capsys.readouterr()
        assert f"cannot write {out}/below_a_file.json: Not a directory; choose a place" in told.err
        assert "loading" not in told.err
    out.unlink()
    # As every training without --r leaves it.
    (tmp_path / "run.yaml").write_text("r: auto\nmax_steps: 6\nlr: 0.01\nbatch_size: 4\n")
    for given, largest in ((["--r", "4"], 4), ([], 16)):
        assert main(["rank", "nested", *options, "--config", str(tmp_path / "run.yaml"), *given]) == 0
        found = json.loads(out.read_text())
        assert list(found["losses"])[-1] == str(found["settings"]["r"]) == str(largest)
        out.unlink()
    assert main(["rank", "nested", *options, "--use-dora", "--init-lora-weights", "pissa"]) == 2
    assert "leave out --init-lora-weights and --use-dora" in capsys.readouterr().err
