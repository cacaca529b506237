"""Would training with merged weights, W0 + s·B·A computed once a step, be faster than A and B beside W0?

Merged weights spare two of the six thin products of a layer, h·Bᵀ in the forward and (s·g·B)·A in the backward pass;
the other four make the gradients of A and B. They cost a pass over all adapted weights in each step. The two take turns
on the matrices of SmolLM2-135M's blocks, r = 8; the table gives medians of a step's milliseconds, and the last line is
JSON.

    python benchmarks/merged_weights.py [--repeats 9]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

BLOCKS, RANK = 30, 8
MATRICES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
"""d × k of q, k, v, o, gate, up and down."""
TOKENS = (256, 1024, 4096)


def measure(tokens: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of a step for each way, by name."""
    layers = []
    for d, k in MATRICES:
        layer: dict[str, Any] = {"A": torch.randn(RANK, k), "B": torch.randn(d, RANK)}
        # As many weights as the model has: they must not stay in the processor's cache between two steps.
        layer["W"] = [torch.randn(d, k) for _ in range(BLOCKS)]
        layer["merged"] = torch.empty(d, k)
        layer |= {"y": torch.randn(tokens, d), "x": torch.randn(tokens, k), "h": torch.randn(tokens, RANK)}
        layers.append(layer)

    def merge() -> None:
        for layer in layers:
            for weight in layer["W"]:
                torch.addmm(weight, layer["B"], layer["A"], alpha=2.0, out=layer["merged"])

    def beside() -> None:
        for layer in layers:
            for _ in range(BLOCKS):
                layer["y"].addmm_(layer["h"], layer["B"].T, alpha=1e-9)
                layer["x"].addmm_(layer["h"], layer["A"], alpha=1e-9)

    ways: dict[str, Callable[[], None]] = {"merge": merge, "beside": beside}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, run in ways.items():
            begin = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(times[1:]) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    figures = []
    for tokens in TOKENS:
        found = measure(tokens, arguments.repeats)
        figures.append({"tokens": tokens, **found})
        print(f"{tokens} tokens: merging {found['merge']:.0f} ms, products that it spares {found['beside']:.0f} ms")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
