"""Every variant of LoRA here on one task: what it costs, and the held-out loss it reaches in the same number of steps.

MiniLM learns 20 of the intents in examples/intents; all runs of a seed see the same rows in the same order. Prints the
table of docs/variants.md (mean over the seeds, and the spread between them); the last line is JSON.

    python benchmarks/variants.py [--seeds 3] [--rows 1000] [--lr 1e-3]
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankwise
from rankwise.data.rows import read_rows
from rankwise.data.tasks import examples_for
from rankwise.engine.engine import Engine
from rankwise.engine.tasks import engine_for
from rankwise.lora.inject import set_adapter_training
from rankwise.models.load import load_model, load_tokenizer, pad_id
from rankwise.train.batches import planned_steps
from rankwise.train.config import TrainConfig
from rankwise.train.evaluate import evaluate

EXAMPLES = Path(__file__).parent.parent / "examples" / "intents"
BATCH = 16
INTENTS = 20
# name: (settings of LoraConfig, settings of lora_optimizer)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA (default)": ({}, {}),
    "gaussian": ({"init_lora_weights": "gaussian"}, {}),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, {}),
    "PiSSA": ({"init_lora_weights": "pissa"}, {}),
    "OLoRA": ({"init_lora_weights": "olora"}, {}),
    "EVA": ({"init_lora_weights": "eva"}, {}),
    "CorDA": ({"init_lora_weights": "corda"}, {}),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, {}),
    "rsLoRA": ({"use_rslora": True}, {}),
    "DoRA": ({"use_dora": True}, {}),
    "rsLoRA + PiSSA + DoRA": ({"use_rslora": True, "init_lora_weights": "pissa", "use_dora": True}, {}),
    "LoRA+ (ratio 8)": ({}, {"lora_plus_ratio": 8}),
    "weight decay 0.1": ({}, {"weight_decay": 0.1}),
    "preconditioned": ({}, {"preconditioned": True}),
    "3-bit base": ({}, {}),
    "LoftQ, 3-bit base": ({}, {}),
}
BITS, GROUP = 3, 64
"""Of a weight of the base whose name says so, and how many of them share a scale; products stay in fp32."""


def data(count: int, tokenizer: Any) -> tuple[list[str], list[Any], list[Any]]:
    """The labels, and the rows to train and to measure on."""
    rows, held_out = (read_rows(EXAMPLES / f"{name}.jsonl", "seq_cls") for name in ("train", "valid"))
    labels = sorted({str(row.fields["label"]) for row in rows})[:INTENTS]
    sides = [[row for row in side if row.fields["label"] in labels] for side in (rows, held_out)]
    random.Random(0).shuffle(sides[0])
    train, test = (examples_for("seq_cls", side, tokenizer, labels, 128, "error") for side in sides)
    return labels, train[:count], test


@torch.no_grad()
def quantise_(model: nn.Module) -> dict[str, Tensor]:
    """Round the adapted matrices to BITS bits in place; returns them as they were."""
    original = {}
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embeddings" not in name and "classifier" not in name:
            original[name] = weight.clone()
            groups = weight.view(-1, GROUP)
            scale = groups.abs().amax(1, keepdim=True) / (2 ** (BITS - 1) - 1)
            groups.copy_((groups / scale).round() * scale)
    return original


def run(
    name: str, seed: int, lr: float, examples: Sequence[Any], test: Sequence[Any], labels: list[str]
) -> list[float]:
    """(loss, accuracy, seconds for a step, seconds to start, trained numbers) of one training."""
    settings, optimiser = VARIANTS[name]
    torch.manual_seed(seed)
    tokenizer, model = load_tokenizer("minilm-l6"), load_model("minilm-l6", "seq_cls", labels)
    original = quantise_(model) if name.endswith("base") else {}
    config = rankwise.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, **settings)
    begin = time.perf_counter()
    report = rankwise.inject_(model, config)
    engine: Engine[Any] = engine_for("seq_cls", model, pad_id(tokenizer), examples)
    plan = TrainConfig(model="", data=(Path(),), out=Path(), task="seq_cls", batch_size=BATCH, seed=seed)
    batches = [batch for step in planned_steps(examples, plan) for batch in step]
    if config.init_lora_weights in ("eva", "corda", "lora_ga"):
        rankwise.start_from_data_(model, batches[:8], engine.loss)
    if name.startswith("LoftQ"):
        rankwise.start_from_original_(model, original)
    started = time.perf_counter() - begin
    optimizer = rankwise.lora_optimizer(model, lr, **optimiser)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(batches))
    set_adapter_training(model, True)
    begin = time.perf_counter()
    for batch in batches:
        engine.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    seconds = (time.perf_counter() - begin) / len(batches)
    found = evaluate(engine, tokenizer, test)
    return [found.loss, found.metric or 0.0, seconds, started, float(report.trainable_parameters)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    options = parser.parse_args()
    labels, examples, test = data(options.rows, load_tokenizer("minilm-l6"))
    results: dict[str, list[list[float]]] = {name: [] for name in options.only}
    # Seed by seed, so that a change of the machine's speed meets all variants alike.
    for seed in range(options.seeds):
        for name in options.only:
            results[name].append(run(name, seed, options.lr, examples, test, labels))
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}; {len(examples)} rows train, {len(test)} are held out, {options.seeds} seeds\n")
    print("| variant | held-out loss | accuracy | s / step | s to start | trained numbers |\n|---|---|---|---|---|---|")
    for name, runs in results.items():
        loss, accuracy, seconds, started, numbers = zip(*runs, strict=True)
        spread = f" ± {statistics.stdev(loss):.3f}" if len(loss) > 1 else ""
        print(
            f"| {name} | {statistics.mean(loss):.3f}{spread} | {statistics.mean(accuracy):.1%} | "
            f"{statistics.median(seconds):.3f} | {statistics.median(started):.2f} | {numbers[0]:,.0f} |"
        )
    print(json.dumps({"machine": machine, "rows": len(examples), "lr": options.lr, "runs": results}))


if __name__ == "__main__":
    main()
