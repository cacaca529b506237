"""What the adapter core costs beside PEFT's, on one machine in one run.

Each figure is measured for both, interleaved, several times; the table gives the medians, and the last line is JSON.

    python benchmarks/core_vs_peft.py [--repeats 5]

- overhead: what one adapted module adds to a forward pass of one token (microseconds, 210 modules, small matrices)
- inject: putting a first and a tenth adapter (all-linear, 224 modules) into a model of Llama 3 8B's shape that holds no
  memory
- save, load: an adapter of r = 16 on all 210 linear layers of SmolLM2-135M's shape
- bytes: what the forward pass of one linear layer 1,024 × 1,024 over a bf16 base writes for 2,048 tokens, and what it
  keeps for the backward pass beyond its input
- DoRA: a training step of a linear layer 1,024 × 1,024 on 2,048 tokens against plain LoRA's
"""

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import rankwise
from rankwise import LoraConfig

Measured = dict[str, list[float]]


def seconds(action: Callable[[], Any], collect: bool = True) -> float:
    if collect:
        # What earlier models left is not to be collected on this one's time.
        gc.collect()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def llama(hidden: int, inner: int, layers: int, heads: int, groups: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=1_000,
    )
    return LlamaForCausalLM(config).eval()


def in_peft(model: nn.Module, **config: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **config))


def overhead(repeats: int) -> Measured:
    """Seconds that a module adds to a forward pass of one token."""
    plain, theirs, ours = (llama(64, 96, 30, 4, 2) for _ in range(3))
    theirs = in_peft(theirs, r=8)
    modules = len(rankwise.inject_(ours, LoraConfig(r=8)).matrices)
    ids = torch.tensor([[5]])
    models = {"plain": plain, "peft": theirs, "rankwise": ours}
    extra: Measured = {"peft": [], "rankwise": []}
    # One thread, and one token of each model after the other: a second one wakes too late to help with so little, and
    # a machine's clock drifts by more in a second than a module adds.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for _ in range(40 * repeats):
                times = {name: seconds(lambda m=model: m(ids), collect=False) for name, model in models.items()}
                for name in extra:
                    extra[name].append((times[name] - times["plain"]) / modules)
    finally:
        torch.set_num_threads(threads)
    return extra


def injection(repeats: int) -> tuple[Measured, Measured]:
    """Seconds for the first adapter, and for the tenth."""
    first: Measured = {"peft": [], "rankwise": []}
    tenth: Measured = {"peft": [], "rankwise": []}
    for _ in range(repeats):
        with torch.device("meta"):
            ours, theirs = (llama(4096, 14336, 32, 32, 8) for _ in range(2))
        first["rankwise"].append(seconds(lambda m=ours: rankwise.inject_(m, LoraConfig(r=8), adapter="a0")))
        for index in range(1, 9):
            rankwise.inject_(ours, LoraConfig(r=8), adapter=f"a{index}")
        tenth["rankwise"].append(seconds(lambda m=ours: rankwise.inject_(m, LoraConfig(r=8), adapter="a9")))
        wrapped: list[Any] = []
        first["peft"].append(seconds(lambda m=theirs, w=wrapped: w.append(in_peft(m, r=8))))
        config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=8)
        for index in range(1, 9):
            wrapped[0].add_adapter(f"a{index}", config)
        tenth["peft"].append(seconds(lambda w=wrapped, c=config: w[0].add_adapter("a9", c)))
    return first, tenth


def files(repeats: int) -> tuple[Measured, Measured]:
    """Seconds to save an adapter, and to load it into a fresh model."""
    saving: Measured = {"peft": [], "rankwise": []}
    loading: Measured = {"peft": [], "rankwise": []}
    ours, theirs = llama(576, 1536, 30, 9, 3), in_peft(llama(576, 1536, 30, 9, 3), r=16)
    rankwise.inject_(ours, LoraConfig(r=16))
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            here, there = Path(folder, "rankwise"), Path(folder, "peft")
            saving["rankwise"].append(seconds(lambda to=here: rankwise.save_adapter(ours, to)))
            saving["peft"].append(seconds(lambda to=there: theirs.save_pretrained(to)))
            fresh, other = llama(576, 1536, 30, 9, 3), llama(576, 1536, 30, 9, 3)
            loading["rankwise"].append(seconds(lambda m=fresh, at=here: rankwise.load_adapter_(m, at)))
            loading["peft"].append(seconds(lambda m=other, at=there: peft.PeftModel.from_pretrained(m, at)))
    return saving, loading


class Written(TorchDispatchMode):
    """Counts the bytes that operations write: new tensors and those that are changed in place, and no views."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else [result]
        for tensor, returned in zip(results, func._schema.returns, strict=False):
            if isinstance(tensor, torch.Tensor) and (returned.alias_info is None or returned.alias_info.is_write):
                # A product's result in another shape is no new memory, though the schema does not say so.
                self.bytes += 0 if func._schema.name == "aten::_unsafe_view" else tensor.nbytes
        return result


def layer_bytes() -> tuple[Measured, Measured]:
    """Bytes that one bf16 linear layer writes, and that autograd keeps for it beyond its input and its weight."""
    written: Measured = {}
    found: Measured = {}
    for name in ("peft", "rankwise"):
        model = nn.Sequential(nn.Linear(1024, 1024, bias=False)).bfloat16()
        if name == "peft":
            model: Any = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=["0"]))
        else:
            rankwise.inject_(model, LoraConfig(r=16, target_modules=["0"]))
        x = torch.randn(2048, 1024, dtype=torch.bfloat16, requires_grad=True)
        known = {x.data_ptr(), *(p.data_ptr() for p in model.parameters())}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor, known: set[int] = known, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(x)
        found[name] = [float(sum(kept.values()))]
        with Written() as counter:
            model(x)
        written[name] = [float(counter.bytes)]
    return written, found


def dora(repeats: int) -> dict[str, float]:
    """How many times longer a DoRA step takes than a plain one."""
    x = torch.randn(2048, 1024)
    steps: dict[str, Callable[[], Any]] = {}
    for name, use_dora in (("rankwise", False), ("rankwise dora", True), ("peft", False), ("peft dora", True)):
        model: Any = nn.Sequential(nn.Linear(1024, 1024))
        if name.startswith("peft"):
            model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=["0"], use_dora=use_dora))
        else:
            rankwise.inject_(model, LoraConfig(r=16, target_modules=["0"], use_dora=use_dora))
        steps[name] = lambda m=model: m(x.requires_grad_()).sum().backward()
    times: Measured = {name: [] for name in steps}
    for _ in range(repeats * 3):
        for name, step in steps.items():
            times[name].append(seconds(step))
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {name: median[f"{name} dora"] / median[name] for name in ("peft", "rankwise")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    warnings.simplefilter("ignore")
    first, tenth = injection(max(1, repeats // 2))
    saving, loading = files(repeats)
    written, kept = layer_bytes()
    rows = {
        "overhead per module (s)": overhead(repeats),
        "inject the first adapter (s)": first,
        "inject the tenth adapter (s)": tenth,
        "save (s)": saving,
        "load (s)": loading,
        "save and load (s)": {name: [*map(sum, zip(saving[name], loading[name], strict=True))] for name in saving},
        "written in forward (bytes)": written,
        "kept for backward (bytes)": kept,
        "DoRA step / plain step": {name: [value] for name, value in dora(repeats).items()},
    }
    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(machine)
    print(f"{'':<30} {'PEFT':>12} {'rankwise':>12} {'ratio':>8}")
    result: dict[str, Any] = {"machine": machine, "peft": peft.__version__, "repeats": repeats}
    for name, both in rows.items():
        theirs, ours = (statistics.median(both[key]) for key in ("peft", "rankwise"))
        print(f"{name:<30} {theirs:>12.4g} {ours:>12.4g} {theirs / ours:>8.2f}")
        result[name] = {"peft": both["peft"], "rankwise": both["rankwise"], "ratio": theirs / ours}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
