"""Adapted models under DistributedDataParallel and FSDP2: two processes on the CPU, against one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny
from safetensors.torch import load_file

from rankwise import LoraConfig, inject_, load_adapter_, save_adapter
from rankwise.lora.inject import trainable_parameters

WORKER = Path(__file__).with_name("distributed_worker.py")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
IDS = torch.arange(3, 35).view(4, 8)


def one_process(folder):
    """Two steps of SGD on all rows at once."""
    model = tiny("llama")
    inject_(model, LoraConfig(r=2, lora_alpha=64), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.5)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(model, folder)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_the_adapter_that_one_does(how, tmp_path):
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(WORKER), how, str(tmp_path / how)]
    workers = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=120)[0].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    one_process(tmp_path / "one")
    together, alone = (load_file(tmp_path / name / "adapter_model.safetensors") for name in (how, "one"))
    assert together.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-6)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in alone.items() if "lora_B" in name)
    load_adapter_(tiny("llama"), tmp_path / how)
    checkpoint = tmp_path / how / "checkpoint-2"
    assert {path.name for path in checkpoint.iterdir()} == {*ADAPTER_FILES, "model.safetensors"}
    for name, tensor in load_file(checkpoint / "adapter_model.safetensors").items():
        assert torch.equal(tensor, together[name])
    assert len(load_file(checkpoint / "model.safetensors")) == len(together)
