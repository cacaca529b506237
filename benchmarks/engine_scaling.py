"""How a training step's time grows with its tokens, and how much memory LoRA needs beside full fine-tuning.

Each run is a process of its own, on SmolLM2-135M, r = 8 on all linear layers, with rows of tokens drawn at random, so
that they share nothing; every token is trained.

- time: steps of 256 to 16,384 tokens in rows of 128, at most 4,096 of them in one pass, and the slope of log time
  against log tokens (1: linear); then 4,096 tokens in rows of 128 to 4,096, where attention alone grows;
- memory: the most that a process held while it trained, and that less what it held once the model was loaded, for LoRA
  with each means of saving memory and for full fine-tuning (AdamW) in the same engine, 8 rows of --length tokens;
  with --large on random weights in Qwen2.5 0.5B's shape (2 GB of disk, deleted afterwards, and 12 GB of memory).

    python benchmarks/engine_scaling.py [--only time | memory] [--repeats 3] [--length 128] [--large]

The last line is JSON.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

MODEL, RANK, ALPHA, RATE = "smollm2-135m", 8, 32, 1e-4
MOST_IN_A_PASS = 4096
TOTALS = (256, 512, 1024, 2048, 4096, 8192, 16384)
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
LARGE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
MEMORY: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, recomputed": {"recompute": True},
    "LoRA, base in bf16": {"base_dtype": "bf16"},
    "LoRA, base in bf16, recomputed": {"base_dtype": "bf16", "recompute": True},
    "full": {"full": True},
    "full, recomputed": {"full": True, "recompute": True},
}


def make_large(folder: str) -> None:
    """Random weights in Qwen2.5 0.5B's shape."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**LARGE)).save_pretrained(folder)


def run(settings: dict[str, Any]) -> dict[str, float]:
    """Train in this process: median seconds of the steps but the first, and the peak of memory."""
    from rankwise import LoraConfig, inject_
    from rankwise.data.examples import TextExample
    from rankwise.engine.language import LanguageEngine
    from rankwise.models.load import load_model
    from rankwise.train.config import TrainConfig
    from rankwise.train.loop import Training
    from rankwise.train.peak_memory import forget_peak_memory, peak_memory_bytes

    model = load_model(settings.get("model", MODEL), "causal_lm", base_dtype=settings.get("base_dtype", "fp32"))
    parameters = list(model.requires_grad_(True).parameters()) if settings.get("full") else None
    if parameters is None:
        inject_(model, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA))
    rows, length, steps = settings["rows"], settings["length"], settings["steps"]
    generator = random.Random(0)
    examples = [
        TextExample(tuple(generator.randrange(100, 40_000) for _ in range(length)), (True,) * length, str(row))
        for row in range(rows * steps)
    ]
    engine = LanguageEngine(model, 2, examples)
    engine.recomputes = settings.get("recompute", False)
    passes = -(-rows * length // MOST_IN_A_PASS)
    config = TrainConfig(
        model=MODEL,
        data=(Path(),),
        out=Path(),
        batch_size=rows // passes,
        accumulate=passes,
        lr=RATE,
        max_steps=steps,
    )
    forget_peak_memory()
    loaded = peak_memory_bytes()
    ends = [0.0, *(step.seconds for step in Training(engine, examples, config, parameters).steps())]
    seconds = [after - before for before, after in pairwise(ends)]
    return {
        "seconds": statistics.median(seconds[1:]),
        "peak_bytes": peak_memory_bytes(),
        "above_the_model_bytes": peak_memory_bytes() - loaded,
    }


def in_own_process(settings: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, __file__, "--run", json.dumps(settings)]
    output = subprocess.run(command, capture_output=True, text=True)
    if output.returncode:
        raise SystemExit(f"{settings} failed:\n{output.stderr}")
    return json.loads(output.stdout.splitlines()[-1])


def slope(seconds: dict[int, float]) -> float:
    """Of log seconds against log tokens, by least squares."""
    import numpy as np

    return float(np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0])


def times(repeats: int) -> dict[str, Any]:
    """Seconds of a step by its tokens, and by the length of its rows at the same number of tokens."""
    shapes = [(total // 128, 128) for total in TOTALS] + [(MOST_IN_A_PASS // length, length) for length in LENGTHS]
    # Short steps are many, so that each shape is measured for about as long.
    runs: dict[tuple[int, int], list[dict[str, float]]] = {shape: [] for shape in dict.fromkeys(shapes)}
    for _ in range(repeats):
        for (rows, length), found in runs.items():
            steps = 2 + max(1, 4096 // (rows * length))
            found.append(in_own_process({"rows": rows, "length": length, "steps": steps}))
    print("| rows | tokens a row | tokens | s a step | spread | ms a token | peak, GB |\n|---|---|---|---|---|---|---|")
    median: dict[tuple[int, int], float] = {}
    for (rows, length), found in runs.items():
        seconds = sorted(own["seconds"] for own in found)
        median[rows, length] = middle = statistics.median(seconds)
        peak = statistics.median(own["peak_bytes"] for own in found)
        print(
            f"| {rows} | {length:,} | {rows * length:,} | {middle:.2f} | {seconds[0]:.2f}-{seconds[-1]:.2f} "
            f"| {1000 * middle / rows / length:.2f} | {peak / 1e9:.2f} |"
        )
    found_slope = slope({total: median[total // 128, 128] for total in TOTALS})
    print(f"\nslope of log time against log tokens, {TOTALS[0]} to {TOTALS[-1]:,} tokens: {found_slope:.3f}\n")
    return {"slope": found_slope, "seconds": {f"{rows}x{length}": value for (rows, length), value in median.items()}}


def memory(repeats: int, length: int, model: str) -> dict[str, Any]:
    """Peaks of LoRA and of full fine-tuning."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in MEMORY}
    for _ in range(repeats):
        for name, settings in MEMORY.items():
            runs[name].append(in_own_process({"model": model, "rows": 8, "length": length, "steps": 3} | settings))
    median = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    full = median["full"]
    print("| | peak, GB | above the model, GB | of full | of full, above | s a step |\n|---|---|---|---|---|---|")
    for name, own in median.items():
        shares = (own[key] / full[key] for key in ("peak_bytes", "above_the_model_bytes"))
        print(
            f"| {name} | {own['peak_bytes'] / 1e9:.2f} | {own['above_the_model_bytes'] / 1e9:.2f} | "
            f"{' | '.join(f'{share:.2f}' for share in shares)} | {own['seconds']:.2f} |"
        )
    return median


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=["time", "memory"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row where memory is measured")
    parser.add_argument("--large", action="store_true", help="measure the memory of a model of 0.5 billion parameters")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.make:
        make_large(options.make)
        return
    if options.run:
        print(json.dumps(run(options.run)))
        return
    result: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    print(result["machine"], end="\n\n")
    if options.only != "memory":
        result["time"] = times(options.repeats)
    if options.only != "time":
        with tempfile.TemporaryDirectory() as folder:
            if options.large:
                subprocess.run([sys.executable, __file__, "--make", folder], check=True, capture_output=True)
            result["memory"] = memory(options.repeats, options.length, folder if options.large else MODEL)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
