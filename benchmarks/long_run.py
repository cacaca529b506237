"""What a long run holds and takes, with streams of few lengths (engine/batch.py) and with streams of any length.

Each run is a process of its own, in turns, through the real training path, r = 8: the upper 20 blocks of SmolLM2-135M
on text to SQL, as in the demo, or all linear layers of MiniLM on the intents. Prints the peak memory and the seconds of
training after some of its steps.

    python benchmarks/long_run.py [--model minilm-l6] [--steps 150] [--batch-size 2] [--repeats 2]

The last line is JSON.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

UPPER_BLOCKS = r"model\.layers\.(1[0-9]|2[0-9])\..*_proj"
"""As the demo adapts SmolLM2-135M."""
KINDS = ("few", "any")


def run(lengths: str, model_name: str, steps: int, batch_size: int) -> None:
    """One run in this process; prints (steps, peak bytes, seconds) at ten places as JSON."""
    from engine import Task

    from rankwise import LoraConfig, inject_
    from rankwise.engine.tasks import engine_for
    from rankwise.models.load import pad_id
    from rankwise.train.config import TrainConfig
    from rankwise.train.loop import Training
    from rankwise.train.peak_memory import peak_memory_bytes

    task = Task("sql" if model_name == "smollm2-135m" else "classify", None)
    model = task.model()
    lora = LoraConfig(r=8, task_type="SEQ_CLS")
    if task.kind == "causal_lm":
        lora = LoraConfig(r=8, task_type="CAUSAL_LM", target_modules=UPPER_BLOCKS)
    inject_(model, lora)
    config = TrainConfig(
        model="", data=(Path(),), out=Path(), task=task.kind, batch_size=batch_size, lr=1e-3, max_steps=steps
    )
    engine = engine_for(task.kind, model, pad_id(task.tokenizer), task.train)
    found = []
    as_they_come = patch("rankwise.engine.batch.rounded_up", lambda tokens: tokens)
    with as_they_come if lengths == "any" else nullcontext():
        for step in Training(engine, task.train, config).steps():
            if step.number % max(1, steps // 10) == 0:
                found.append((step.number, peak_memory_bytes(), step.seconds))
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=["smollm2-135m", "minilm-l6"], default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--run", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.run:
        run(options.run, options.model, options.steps, options.batch_size)
        return
    found: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for _ in range(options.repeats):
        for kind in KINDS:
            command = [sys.executable, __file__, "--run", kind, "--model", options.model]
            command += ["--steps", str(options.steps), "--batch-size", str(options.batch_size)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[kind].append(json.loads(output.splitlines()[-1]))
            steps, peak, seconds = found[kind][-1][-1]
            print(f"{kind} lengths: {steps} steps, {peak / 1e9:.2f} GB, {seconds:.1f} s", flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps({"machine": machine, "model": options.model, "batch_size": options.batch_size, "runs": found}))


if __name__ == "__main__":
    main()
