"""How fast products with a frozen weight run: torch's BLAS, oneDNN, and oneDNN with prepared copies of the weight.

The three take turns; the table gives medians in GFLOP/s, and the last line is JSON.

    python benchmarks/frozen_products.py [--repeats 15]
"""

import argparse
import json
import platform
import statistics
import time

import torch

from rankwise.lora.frozen_product import frozen_linear, prepare

WEIGHTS = ((576, 576), (1536, 576), (576, 1536), (384, 384), (2048, 2048))
"""d × k: SmolLM2-135M's, MiniLM's, and a larger one."""
ROWS = (64, 256, 1024)


def measure(d: int, k: int, rows: int, repeats: int) -> dict[str, float]:
    """Median GFLOP/s of each way, by name."""
    weight, x, gradient = torch.randn(d, k), torch.randn(rows, k), torch.randn(rows, d)
    prepared = prepare(weight)
    ways = {
        "forward torch": lambda: torch.mm(x, weight.T),
        "forward oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""),
        "forward prepared": lambda: frozen_linear(x, prepared.forward),
        "backward torch": lambda: torch.mm(gradient, weight),
        "backward prepared": lambda: frozen_linear(gradient, prepared.backward),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, run in ways.items():
            begin = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - begin)
    return {name: 2e-9 * rows * d * k / statistics.median(times[1:]) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    figures = []
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for d, k in WEIGHTS:
        for rows in ROWS:
            rates = measure(d, k, rows, arguments.repeats)
            figures.append({"d": d, "k": k, "rows": rows, **rates})
            print(f"{d} × {k}, {rows} rows: " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
