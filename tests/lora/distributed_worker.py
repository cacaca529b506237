"""One of two processes of test_distributed.py: HOW FOLDER RANK."""

import sys
from types import SimpleNamespace

import torch
from conftest import tiny
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rankwise import LoraConfig, inject_, save_adapter, trainable_parameters
from rankwise.models.trainer import AdapterCheckpoints

IDS = torch.arange(3, 35).view(4, 8)


def main() -> None:
    how, folder, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # They meet in a file: a port that was free may be taken by now.
    distributed.init_process_group("gloo", f"file://{folder}-meeting", rank=rank, world_size=2)
    model = tiny("llama")
    inject_(model, LoraConfig(r=2, lora_alpha=64), generator=torch.Generator().manual_seed(0))
    if how == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = distributed.init_device_mesh("cpu", (2,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.5)
    own = IDS[2 * rank : 2 * rank + 2]
    for _ in range(2):
        wrapped(own, labels=own).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(model, folder if rank == 0 else f"{folder}-{rank}")
    state = SimpleNamespace(is_world_process_zero=rank == 0, global_step=2)
    AdapterCheckpoints().on_save(SimpleNamespace(output_dir=folder), state, None, model=model)
    # If the wrapper dies after its group, its reducer joins gloo's threads and holds the GIL that they may wait for.
    del wrapped
    distributed.destroy_process_group()


main()
