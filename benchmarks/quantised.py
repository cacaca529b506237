"""Adapters over quantised layers of other libraries, on the CPU: start, training, saving, merging, taking out.

Each step is checked; the last line is JSON. Libraries that are not installed are named as such.

    pip install bitsandbytes torchao
    python benchmarks/quantised.py
"""

import copy
import json
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import rankwise
from rankwise.errors import MergeError


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()


def bitsandbytes_8(model: nn.Sequential) -> None:
    import bitsandbytes  # pyright: ignore[reportMissingImports]

    _replace(model, lambda d, k: bitsandbytes.nn.Linear8bitLt(k, d, has_fp16_weights=False))


def bitsandbytes_4(model: nn.Sequential) -> None:
    import bitsandbytes  # pyright: ignore[reportMissingImports]

    _replace(model, lambda d, k: bitsandbytes.nn.Linear4bit(k, d, compute_dtype=torch.float32, quant_type="nf4"))


def torchao_8(model: nn.Sequential) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]

    quantize_(model, Int8WeightOnlyConfig())


def _replace(model: nn.Sequential, kind: Callable[[int, int], Any]) -> None:
    for index, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            quantised = kind(layer.out_features, layer.in_features)
            quantised.load_state_dict(layer.state_dict())
            model[index] = quantised.to("cpu")


def trial(quantise: Callable[[nn.Sequential], None]) -> dict[str, Any]:
    """What came of the steps for one kind of layer."""
    exact, x, target = plain(), torch.randn(16, 64), torch.randn(16, 64)
    model = plain()
    quantise(model)
    before = model(x)
    rankwise.inject_(model, rankwise.LoraConfig(r=8))
    found: dict[str, Any] = {"starts as the base": torch.equal(model(x), before)}
    rankwise.start_from_original_(model, {name: p.detach() for name, p in exact.named_parameters()})
    found["error"], found["error with LoftQ"] = (float((y - exact(x)).abs().max()) for y in (before, model(x)))
    optimizer = rankwise.lora_optimizer(model, 1e-2)

    def loss() -> Tensor:
        return (model(x) - target).square().mean()

    found["loss before"] = loss().item()
    for _ in range(30):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    found["loss after"] = loss().item()
    with tempfile.TemporaryDirectory() as folder:
        rankwise.save_adapter(model, folder)
        other = copy.deepcopy(exact)
        quantise(other)
        rankwise.load_adapter_(other, folder)
        found["reloads"] = torch.equal(other(x), model(x))
    try:
        rankwise.merge_(model)
        found["merge"] = "merged"
    except MergeError as error:
        found["merge"] = str(error)
    rankwise.eject_(model)
    found["ejects"] = torch.equal(model(x), before)
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {}
    for name, quantise in (
        ("bitsandbytes 8 bit", bitsandbytes_8),
        ("bitsandbytes 4 bit (nf4)", bitsandbytes_4),
        ("torchao int8", torchao_8),
    ):
        try:
            results[name] = trial(quantise)
        except ImportError as error:
            results[name] = {"not installed": str(error)}
        print(name, *(f"    {key}: {value}" for key, value in results[name].items()), sep="\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
