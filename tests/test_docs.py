"""The code of docs/python.md and docs/rank.md, run as it stands but for a tiny model and few rows."""

import json
import re

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

from rankwise import load_adapter_, verdict

ROWS = 12


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture
def run_page(tiny_llama_folder, tmp_path, monkeypatch):
    """Runs all code of a page; returns the names that it defined."""
    (tmp_path / "examples/text_to_sql").mkdir(parents=True)
    for name in ("train", "test"):
        rows = (ROOT / f"examples/text_to_sql/{name}.jsonl").read_text().splitlines()[:ROWS]
        (tmp_path / f"examples/text_to_sql/{name}.jsonl").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)

    def run(page):
        names = {}
        for block in blocks_of(page):
            small = block.replace('"smollm2-135m"', repr(str(tiny_llama_folder)))
            exec(compile(small.replace("max_steps=165", "max_steps=4"), page, "exec"), names)
        return names

    return run


def test_the_code_on_ranks_sweeps_predicts_and_estimates(run_page, capsys):
    names = run_page("docs/rank.md")
    shown = capsys.readouterr().out
    assert verdict(names["found"]) in shown
    assert names["found"].costs[4].parameters == 2 * names["found"].costs[2].parameters > 0
    assert [signal.name for signal in names["signals"]] == [matrix.name for matrix in names["layers"]]
    assert "This errs high" in shown
    assert not any("lora" in name for name, _ in names["model"].named_parameters())


def test_the_page_s_code_trains_adapters_that_rankwise_and_peft_load(run_page, tiny_llama_folder, tmp_path, capsys):
    code_lines = [line for line in blocks_of("docs/python.md")[0].splitlines() if line.strip()]
    assert len(code_lines) < 15
    names = run_page("docs/python.md")
    result = json.loads((tmp_path / "runs/demo/result.json").read_text())
    assert names["result"] == result
    assert (result["steps"], result["eval_rows"]) == (4, ROWS)
    assert "held-out loss" in capsys.readouterr().out
    assert not torch.equal(names["with_adapter"], names["base"])
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    assert torch.equal(plain(**names["prompt"]).logits, names["base"])
    assert names["losses"][-1] < names["losses"][0]
    load_adapter_(plain, tmp_path / "my-adapter")
    torch.testing.assert_close(plain(**names["batch"]).logits, names["model"](**names["batch"]).logits)
    assert [training.done for training in names["trainings"]] == [10, 10]
    load_adapter_(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), tmp_path / "rank4")
