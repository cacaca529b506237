"""The code of docs/python.md, run as it stands but for a tiny model and few rows."""

import json
import re

import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

from rankwise import load_adapter_

ROWS = 12


def test_the_page_s_code_trains_adapters_that_rankwise_and_peft_load(tiny_llama_folder, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    code_lines = [line for line in blocks[0].splitlines() if line.strip()]
    assert len(code_lines) < 15
    (tmp_path / "examples/text_to_sql").mkdir(parents=True)
    for name in ("train", "test"):
        rows = (ROOT / f"examples/text_to_sql/{name}.jsonl").read_text().splitlines()[:ROWS]
        (tmp_path / f"examples/text_to_sql/{name}.jsonl").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        small = block.replace('"smollm2-135m"', repr(str(tiny_llama_folder))).replace("max_steps=145", "max_steps=4")
        exec(compile(small, "docs/python.md", "exec"), names)
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
