"""Does rankwise train faster than PEFT + transformers' Trainer, at the same loss?

Both train the same adapter (same start values, bit for bit) on the same rows in the same order with the same optimiser
and learning rates, SmolLM2-135M, r = 8, all linear layers, dropout 0, fp32. They take turns, `--repeats` times. The
Trainer gets what helps it: no gradient checkpointing, no logging, no evaluation, padding to the longest row of a batch.
Useful tokens are those that are not padding; the time is that of the training alone.

    python benchmarks/train_vs_peft.py --steps 12 --repeats 3

Each run is a process of its own, so that peak memory is its own. The last line is JSON.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "examples" / "text_to_sql"
BATCH, RATE, RANK, ALPHA = 8, 1e-3, 8, 32


def prepare(steps: int):
    """The model with a fresh adapter, the batches, and held-out rows: the same for both."""
    import torch

    from rankwise import LoraConfig, TrainConfig, inject_
    from rankwise.data.rows import read_rows
    from rankwise.data.tasks import examples_for
    from rankwise.models.load import load_model, load_tokenizer
    from rankwise.train.batches import planned_steps

    tokenizer = load_tokenizer("smollm2-135m")
    train, held_out = (
        examples_for("causal_lm", read_rows(DATA / f"{part}.jsonl", "causal_lm"), tokenizer, [], 1024, "error")
        for part in ("train", "valid")
    )
    torch.manual_seed(0)
    model = load_model("smollm2-135m", "causal_lm")
    inject_(model, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA))
    config = TrainConfig(model="", data=(DATA,), out=DATA, batch_size=BATCH, lr=RATE, max_steps=steps)
    return model, tokenizer, train, held_out, [batch for [batch] in planned_steps(train, config)]


def run_rankwise(steps: int, folder: Path) -> float:
    """Train through rankwise's own loop; returns seconds."""
    from rankwise import TrainConfig, save_adapter
    from rankwise.engine.language import LanguageEngine
    from rankwise.train.loop import Training

    model, _, train, _, _ = prepare(steps)
    engine = LanguageEngine(model, 2, train)
    config = TrainConfig(model="", data=(DATA,), out=folder, batch_size=BATCH, lr=RATE, max_steps=steps)
    [*_, last] = Training(engine, train, config).steps()
    save_adapter(model, folder)
    return last.seconds


def run_peft(steps: int, folder: Path) -> float:
    """Train through PEFT and transformers' Trainer; returns seconds."""
    import peft
    import torch
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import Trainer, TrainingArguments

    from rankwise import eject_, save_adapter
    from rankwise.engine.batch import pad

    model, tokenizer, _, _, batches = prepare(steps)
    save_adapter(model, folder / "start")
    eject_(model)
    model = peft.PeftModel.from_pretrained(model, str(folder / "start"), is_trainable=True)

    def collate(examples):
        ids, mask = pad([example.ids for example in examples], tokenizer.pad_token_id, torch.device("cpu"))
        labels = torch.full_like(ids, -100)
        for row, example in enumerate(examples):
            for place, trained in enumerate(example.trained):
                if trained:
                    labels[row, place] = example.ids[place]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    class InOrder(Trainer):
        """The Trainer with the batches of the other contestant."""

        def get_train_dataloader(self) -> Any:
            return [collate(batch) for batch in batches]

    warm_up = max(1, round(0.05 * steps))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda n: min((n + 1) / warm_up, (steps - n) / max(1, steps - warm_up + 1)))
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_grad_norm=1.0,
    )
    given: Any = batches
    trainer = InOrder(model, arguments, train_dataset=given, optimizers=(optimizer, schedule))
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    model.save_pretrained(str(folder))
    return seconds


def held_out_loss(folder: Path) -> float:
    """One common judge for both adapters: the plain padded forward pass on the held-out rows."""
    import torch

    from rankwise import eject_, load_adapter_
    from rankwise.engine.language import LanguageEngine

    model, _, _, held_out, _ = prepare(1)
    eject_(model)
    load_adapter_(model, folder)
    engine = LanguageEngine(model, 2, held_out)
    engine.packs = False
    with torch.no_grad():
        parts = [engine.logits(held_out[start : start + 10]) for start in range(0, len(held_out), 10)]
        losses = [torch.nn.functional.cross_entropy(*part, reduction="none") for part in parts]
    return torch.cat(losses).mean().item()


def contestant(name: str, steps: int, folder: Path) -> None:
    """Run one contestant in this process and print its figures as JSON."""
    seconds = {"rankwise": run_rankwise, "peft": run_peft}[name](steps, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "peak_memory_bytes": peak}))


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contestant", choices=["rankwise", "peft"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.contestant:
        contestant(options.contestant, options.steps, options.folder)
        return
    tokens = sum(len(example.ids) for batch in prepare(options.steps)[4] for example in batch)
    figures: dict[str, list[dict[str, float]]] = {"rankwise": [], "peft": []}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(options.repeats):
            for name, runs in figures.items():
                folder = Path(scratch) / f"{name}-{repeat}"
                command = [sys.executable, __file__, "--contestant", name, "--steps", str(options.steps)]
                output = subprocess.run(
                    [*command, "--folder", str(folder)], check=True, capture_output=True, text=True
                ).stdout
                runs.append(json.loads(output.splitlines()[-1]))
                print(f"{name:>9} {repeat + 1}: {tokens / runs[-1]['seconds']:.1f} useful tokens/s", flush=True)
                if repeat == 0:
                    losses[name] = held_out_loss(folder)
    print(json.dumps(summary(figures, losses, tokens, options.steps), indent=None))


def summary(figures: dict[str, list[dict[str, float]]], losses: dict[str, float], tokens: int, steps: int) -> dict:
    """Medians and spread of both contestants, and their ratios."""
    import torch

    result: dict = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "steps": steps,
        "useful_tokens": tokens,
    }
    for name, runs in figures.items():
        speeds = sorted(tokens / run["seconds"] for run in runs)
        result[name] = {
            "useful_tokens_per_second": statistics.median(speeds),
            "spread": [speeds[0], speeds[-1]],
            "peak_memory_bytes": statistics.median(run["peak_memory_bytes"] for run in runs),
            "final_eval_loss": losses[name],
        }
    ours, theirs = result["rankwise"], result["peft"]
    result["speed_ratio"] = ours["useful_tokens_per_second"] / theirs["useful_tokens_per_second"]
    result["memory_ratio"] = ours["peak_memory_bytes"] / theirs["peak_memory_bytes"]
    result["loss_difference"] = ours["final_eval_loss"] - theirs["final_eval_loss"]
    return result


if __name__ == "__main__":
    main()
