"""How much memory does full fine-tuning take beside LoRA, in the same engine on the same batches?

Two steps of four text-to-SQL rows, each run in a process of its own: SmolLM2-135M, and a model of Qwen2.5 0.5B's shape
with random weights (2 GB of disk, deleted afterwards). LoRA trains at r = 8 in all linear layers, by default, with
frozen weights in bf16 (which full fine-tuning cannot have), and with activations recomputed; full fine-tuning with and
without that. Peak memory is the most that the process held, Python, torch and loading included.

    python benchmarks/full_memory.py [--only smollm2 | qwen]

The last line is JSON.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "examples" / "text_to_sql"
QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
R = 8


def make_model(folder: str) -> None:
    """Random weights in Qwen2.5 0.5B's shape, with SmolLM2's tokenizer, whose ids all fit."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from rankwise.models import local_path

    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**QWEN)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(local_path("smollm2-135m")).save_pretrained(folder)


def peak(model: str, settings: dict[str, Any]) -> None:
    """Train in this process, and print the peak memory in bytes."""
    from rankwise.paired_runs import FULL, PairedRuns
    from rankwise.train.config import TrainConfig
    from rankwise.train.peak_memory import peak_memory_bytes

    full = settings.pop("full")
    files = {"data": (DATA / "train.jsonl",), "eval_data": (DATA / "valid.jsonl",), "out": Path("unused")}
    config = TrainConfig(model=model, **files, r=R, batch_size=4, max_steps=2, **settings)
    runs = PairedRuns(config, R)
    runs.held_out = runs.held_out[:4]
    runs(FULL if full else R, config.seed, 1.0)
    print(peak_memory_bytes())


def measured(model: str, settings: dict[str, Any]) -> int:
    """`peak` in a process of its own."""
    command = [sys.executable, __file__, "--run", model, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=["smollm2", "qwen"])
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if arguments.make:
        make_model(arguments.make)
        return
    if arguments.run:
        model, settings = arguments.run
        peak(model, json.loads(settings))
        return
    print(f"{platform.processor() or platform.machine()}")
    print(f"{'model':<20} {'recompute':<9} {'base':<5} {'LoRA, GB':>9} {'full, GB':>9} {'LoRA / full':>11}")
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        models = {"SmolLM2-135M": "smollm2-135m"} if arguments.only != "qwen" else {}
        if arguments.only != "smollm2":
            subprocess.run([sys.executable, __file__, "--make", folder], check=True, capture_output=True)
            models["Qwen2.5 0.5B's shape"] = folder
        for name, model in models.items():
            for recompute in ("never", "always"):
                full = measured(model, {"full": True, "recompute": recompute})
                for base in ("fp32", "bf16"):
                    lora = measured(model, {"full": False, "recompute": recompute, "base_dtype": base})
                    run = {"model": name, "recompute": recompute, "base_dtype": base}
                    figures.append({**run, "lora_bytes": lora, "full_bytes": full})
                    peaks = f"{lora / 1e9:>9.2f} {full / 1e9:>9.2f} {lora / full:>11.2f}"
                    print(f"{name:<20} {recompute:<9} {base:<5} {peaks}", flush=True)
    print(json.dumps({"machine": platform.machine(), "runs": figures}))


if __name__ == "__main__":
    main()
