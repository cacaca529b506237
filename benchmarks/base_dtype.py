"""What keeping the frozen weights in bf16 saves and costs, and whether a model of a billion parameters trains in 8 GB.

Short runs of `rankwise train`, each in a fresh process: SmolLM2-135M with its weights in fp32 and in bf16, taking
turns, then two steps of a model with the shape of Llama 3.2 1B and random bf16 weights, made for this and deleted
afterwards (2.5 GB of disk). Peak memory is the most that the process held, loading included.

    python benchmarks/base_dtype.py [--repeats 2] [--steps 4] [--only smollm2 | 1b]

The last line is JSON.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "examples" / "text_to_sql" / "train.jsonl"
LIMIT = 8e9
LLAMA_1B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}


def make_model(folder: str) -> None:
    """Random bf16 weights in Llama 3.2 1B's shape, with SmolLM2's tokenizer, whose ids all fit."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from rankwise.models import local_path

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA_1B))
    model.save_pretrained(folder, max_shard_size="500MB")
    AutoTokenizer.from_pretrained(local_path("smollm2-135m")).save_pretrained(folder)


def train(model: str, base_dtype: str, steps: int, batch_size: int) -> dict[str, Any]:
    """The figures of one run in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        options = {
            "--model": model,
            "--data": DATA,
            "--out": Path(scratch) / "run",
            "--base-dtype": base_dtype,
            "--batch-size": batch_size,
            "--max-steps": steps,
            "--eval-fraction": 0,
        }
        command = [sys.executable, "-m", "rankwise", "train", *(str(part) for pair in options.items() for part in pair)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
        result = json.loads((Path(scratch) / "run" / "result.json").read_text(encoding="utf-8"))
    names = ("seconds", "useful_tokens_per_second", "peak_memory_bytes", "predicted_peak_memory_bytes")
    return {name: result[name] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", choices=["smollm2", "1b"])
    parser.add_argument("--make", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_model(arguments.make)
        return
    print(f"{platform.processor() or platform.machine()}")
    figures: dict[str, Any] = {}
    if arguments.only != "1b":
        runs: dict[str, list[dict[str, Any]]] = {"fp32": [], "bf16": []}
        for _ in range(arguments.repeats):
            for base_dtype, found in runs.items():
                found.append(train("smollm2-135m", base_dtype, arguments.steps, batch_size=4))
        for base_dtype, found in runs.items():
            figures[base_dtype] = {name: statistics.median(run[name] for run in found) for name in found[0]}
            speed, peak = figures[base_dtype]["useful_tokens_per_second"], figures[base_dtype]["peak_memory_bytes"]
            print(f"SmolLM2-135M, base in {base_dtype}: {speed:.0f} useful tokens/s, peak memory {peak / 1e9:.2f} GB")
    if arguments.only != "smollm2":
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, "--make", folder], check=True, capture_output=True)
            figures["1b"] = train(folder, "bf16", 2, batch_size=2)
        peak = figures["1b"]["peak_memory_bytes"]
        figures["1b"]["fits"] = peak < LIMIT
        predicted = figures["1b"]["predicted_peak_memory_bytes"]
        print(f"Llama 3.2 1B's shape, base in bf16: peak memory {peak / 1e9:.2f} GB (planned {predicted / 1e9:.2f} GB)")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
