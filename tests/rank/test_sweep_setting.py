"""Values of a setting compared as ranks are: the first is the reference, and no words of order are said."""

import json

import numpy as np
import pytest
from conftest import ROOT, with_options

from rankwise import sweep_setting, verdict
from rankwise.cli.main import main
from rankwise.errors import ConfigError
from rankwise.rank.crossed import largest_deviation
from rankwise.rank.page import page
from rankwise.rank.report import as_dict, table
from rankwise.rank.runs import RunResult
from rankwise.rank.verdict import notes

EXAMPLES = 150


def made_up(losses, parameters=(100, 100, 100), noise=0.05):
    """run(number, seed, factor) whose true losses are 2.5 for the base and `losses` for the values."""

    def run(number, seed, factor):
        own = np.random.default_rng([seed, number + 1])
        hard = np.random.default_rng(7).uniform(-0.5, 0.5, EXAMPLES)
        true = (2.5, *losses)[number] + (0.05 * np.log(factor) ** 2 if number else 0.0)
        size = (0, *parameters)[number]
        return RunResult(true + hard + own.normal(0, noise, EXAMPLES), np.ones(EXAMPLES), 1.0, size)

    return run


VALUES = ["32", "8", "16"]


def test_a_better_value_is_taken_and_a_worse_one_is_said_to_be_worse():
    found = sweep_setting(made_up([1.5, 1.4, 1.8]), "lora_alpha", VALUES, range(3))
    said = verdict(found)
    assert said.startswith("Take lora_alpha = 8: its held-out loss is at least 0.0")
    assert "below that of lora_alpha = 32, the reference" in said
    assert "lora_alpha = 16 is worse by 0.3" in said
    assert "saturate" not in said + " ".join(notes(found))


def test_where_none_is_better_the_reference_stays():
    found = sweep_setting(made_up([1.5, 1.5, 1.9]), "lora_alpha", VALUES, range(3))
    assert verdict(found).startswith("Stay with lora_alpha = 32: ")
    assert "lora_alpha = 8 is not worse" in verdict(found)


def test_a_value_that_is_not_worse_with_fewer_numbers_is_taken():
    found = sweep_setting(made_up([1.5, 1.5, 1.9], (100, 20, 10)), "target_modules", ["all-linear", "q", "v"], range(3))
    assert verdict(found).startswith("Take target_modules = q: it trains 5.0 times fewer numbers than")


def test_each_of_two_comparisons_has_half_the_error_and_a_single_one_has_all_of_it():
    two = sweep_setting(made_up([1.5, 1.5, 1.5]), "lr", VALUES, range(3))
    one = sweep_setting(made_up([1.5, 1.5]), "lr", VALUES[:2], range(3))
    assert two.comparisons.ranks[0].beyond_margin.confidence == pytest.approx(0.975)
    assert one.comparisons.ranks[0].beyond_margin.confidence == pytest.approx(0.95)
    assert any("97.5%" in note for note in notes(two))
    assert "95 % interval" in table(two)


def test_equal_values_are_called_better_or_worse_in_no_more_than_5_percent_of_sweeps():
    wrong, draws = 0, 200
    for draw in range(draws):
        own = np.random.default_rng(draw)

        def run(number, seed, factor, own=own):
            level = (2.5, 1.5, 1.5, 1.5)[number] + own.normal(0, 0.02)
            return RunResult(level + own.normal(0, 0.1, 40), np.ones(40), 1.0, 100 * min(number, 1))

        found = sweep_setting(run, "lr", VALUES, range(3), check_rates=False)
        wrong += any(rank.upper < 0 or rank.outcome == "worse" for rank in found.comparisons.ranks)
    # Three standard errors above 5 %.
    assert wrong <= draws * (0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5)


def test_each_value_trains_with_its_own_best_rate():
    base = made_up([1.5, 1.5, 1.5])

    def run(number, seed, factor):
        return base(number, seed, factor / 3 if number == 2 else factor)

    assert sweep_setting(run, "lora_alpha", VALUES, range(2)).factors == {0: 1.0, 1: 1.0, 2: 3.0, 3: 1.0}


@pytest.mark.parametrize("setting", ["lora_alpha", "lr"])
def test_the_head_of_the_base_trains_with_its_own_best_rate(setting):
    plain = made_up([1.5, 1.5, 1.5], (200, 200, 200))

    def run(number, seed, factor):
        result = plain(number, seed, factor)
        if number:
            return result
        return RunResult(result.losses - min(0.5, 0.25 * np.log(factor) / np.log(3)), result.counts, 1.0, 100)

    found = sweep_setting(run, setting, VALUES, range(2))
    assert found.factors == {0: pytest.approx(9.0), 1: 1.0, 2: 1.0, 3: 1.0}
    assert found.comparisons.base_loss == pytest.approx(2.0, abs=0.02)
    assert any("checked at the base's head" in note for note in notes(found))
    assert sweep_setting(run, setting, VALUES, range(2), check_rates=False).factors[0] == 1.0


def test_the_power_of_joint_comparisons_is_said_before_the_first_run():
    said = []
    sweep_setting(made_up([1.5, 1.5, 1.5]), "lr", VALUES, range(3), say=said.append)
    assert "exactly as good as the first, lr = 32, passes in 80% of sweeps" in said[0]
    assert f"varies by {largest_deviation(3, 0.975):.2g}·δ from seed to seed" in said[0]


def test_values_that_no_verdict_can_tell_apart_are_spoken_of_as_such():
    found = sweep_setting(made_up([2.5, 2.5, 2.5]), "lora_alpha", VALUES, range(3), check_rates=False)
    assert verdict(found).startswith("These data cannot tell which lora_alpha is better: lora_alpha = 32 has not")


def test_the_headline_of_the_page_is_whole_whatever_the_values_hold():
    values = [".*(?:query|value)", "all-linear"]
    html = page(sweep_setting(made_up([1.5, 1.4]), "target_modules", values[::-1], range(3)), {"model": "m"})
    assert "<strong>Take target_modules = .*(?:query|value)</strong>its held-out loss" in html


def test_page_table_and_data_name_the_values():
    found = sweep_setting(made_up([1.5, 1.4, 1.8]), "lora_alpha", VALUES, range(3))
    html = page(found, {"model": "<m>", "data": "d"})
    assert html.index("Take lora_alpha = 8") < html.index("<svg")
    assert not any(line in html for line in ("polygon", "polyline"))
    assert as_dict(found)["reference"] == "32"
    assert [line["name"] for line in as_dict(found)["ranks"]] == ["base", *VALUES]
    assert as_dict(found)["sufficient_rank"] is None


def test_all_problems_of_a_call_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        sweep_setting(made_up([1.5]), "lr", ["1", "1"], [0], margin=-1.0)
    assert all(word in str(error.value) for word in ("--over", "two different seeds", "--delta"))


def test_the_command_compares_modules_and_refuses_what_cannot_be(tiny_llama_folder, tmp_path, capsys):
    rows = (ROOT / "examples/text_to_sql/train.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("train", rows[:16]), ("test", rows[16:28])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    out = tmp_path / "sweep"
    options = ["rank", "sweep", "--model", str(tiny_llama_folder), "--data", str(tmp_path / "train.jsonl")]
    options += ["--eval-data", str(tmp_path / "test.jsonl"), "--batch-size", "4", "--max-steps", "2", "--lr", "0.02"]
    options += ["--no-check-rates", "--seeds", "2", "--out", str(out)]
    modules = ["--over", "target_modules=all-linear,q_proj+v_proj"]
    assert main([*options, "--ranks", "2", *modules]) == 0
    found = json.loads((out / "sweep.json").read_text())
    assert found["verdict"] in capsys.readouterr().out
    base, whole, some = found["ranks"]
    assert [line["name"] for line in (whole, some)] == ["all-linear", "q_proj+v_proj"]
    # Two layers of 32 × 32 (q) and 16 × 32 (v).
    assert some["parameters"] == 2 * 2 * (64 + 48) < whole["parameters"]
    assert len({base["loss"], whole["loss"], some["loss"]}) == 3
    capsys.readouterr()
    fresh = [*options[:-1], str(tmp_path / "other")]
    assert main([*fresh, "--ranks", "2", "--over", "target_modules=all-linear,q_porj"]) == 2
    printed = capsys.readouterr().err
    assert "'q_proj'" in printed
    assert "held-out loss" not in printed
    few = tmp_path / "few.jsonl"
    few.write_text(rows[16])
    assert main(with_options([*fresh, "--ranks", "2", *modules], "--eval-data", str(few))) == 2
    assert "at least 10 different held-out rows, found 1" in capsys.readouterr().err
    for wrong, messages in (
        (["--ranks", "1,2", "--over", "lr=1"], ["at one rank", "at least two values"]),
        (["--ranks", "2", "--over", "lora_alhpa=1,2", "--with-full"], ["nearest: 'lora_alpha'", "--with-full"]),
        (["--ranks", "2", "--over", "lr=1,x"], ["finite numbers above 0"]),
        (["--ranks", "2", "--over", "lora_alpha=32,32.0,8"], ["all different"]),
        (["--ranks", "2", "--over", "target_modules=q_proj+v_proj,v_proj+q_proj"], ["all different"]),
        (["--ranks", "2", "--over", "lr=0.01,inf", "--delta", "inf"], ["finite numbers above 0", "--delta must be"]),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*options, *wrong])
        error = " ".join(capsys.readouterr().err.split())
        assert all(message in error for message in messages)
