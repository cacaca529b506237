"""How fast the engine trains beside what people use on a CPU, on four shapes of data, and with how much memory.

Contestants, interleaved, each run a process of its own; useful tokens are those that are not padding, the first step is
left out of the time, and the held-out loss after the steps is measured by one judge, the plain padded forward pass:

    rankwise            random batches            rankwise-alike    rows with the same beginning together (text)
    trl-stock           SFTTrainer with use_cpu   trl-fp32          in fp32 without gradient checkpointing
    trl-grouped         … batches grouped by length                 trl-packed   … packed (SDPA)
    peft-random         a plain loop, padded      peft-grouped      … batches grouped by length

"Best peer" is the fastest of the others whose loss is right: within 2 % of the plain loop's. For MiniLM, where TRL has
no trainer, transformers' Trainer stands in its place.

"Limit" is the share of the machine's limit that rankwise reaches: the FLOPs that its batches need (frozen matrices
forward and backward, adapters, the half of attention that a causal mask leaves, the head at trained tokens), in a
second, divided by the best rate of an fp32 product with one of the model's matrices, measured in the same process.

`--without` takes rankwise alone, and once more without each of its techniques (docs/engine.md).

    pip install trl
    python benchmarks/engine.py --shape sql [--steps 6] [--repeats 3]
    python benchmarks/engine.py --shape rows --data alpaca.jsonl       # any prompt/completion or messages file
    python benchmarks/engine.py --shape text --data book.txt           # 1,024 tokens a row, every token trained
    python benchmarks/engine.py --shape classify
    python benchmarks/engine.py --shape sql --without

The last line is JSON.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

EXAMPLES = Path(__file__).parents[1] / "examples"
BATCH, RATE, RANK, ALPHA, HELD_OUT = 8, 1e-3, 8, 32, 48
TRL = ("trl-stock", "trl-fp32", "trl-grouped", "trl-packed")
CONTESTANTS = ("rankwise", "rankwise-alike", *TRL, "peft-random", "peft-grouped")
OFF = "it was switched off"
WITHOUT: dict[str, tuple[str, Any]] = {
    "packing": ("rankwise.engine.engine.Engine._why_not_packed", lambda _engine, _sample: OFF),
    "shared-beginnings": ("rankwise.engine.batch._LEAST_SAVED", 10**9),
    "chunked-head": ("rankwise.engine.language.head_that_gives", lambda _logits, _hidden, _model: None),
    "cut-last-block": ("rankwise.engine.engine.Engine._why_not_cut", lambda _engine, _sample: OFF),
    "own-backward": ("rankwise.lora.linear.LoraLinear._frozen_matrix", lambda _layer, _x: None),
    "elementwise": ("rankwise.train.loop.elementwise_by_hand", lambda _model: nullcontext()),
    "shared-inputs": ("rankwise.train.loop.shared_inputs", lambda _model, _run: nullcontext()),
    "prepared-weights": ("rankwise.train.loop.most_bytes_of_copies", lambda: 0.0),
    "kept-memory": ("rankwise.train.loop.keep_freed_memory", lambda: None),
}
"""The engine's techniques, each with what decides on it and the decision against it.

Without its own backward pass a layer computes neither with others nor with prepared weights."""
ABLATION = ("rankwise", *(f"rankwise-without-{name}" for name in WITHOUT))


def contestants_for(shape: str, without: bool) -> list[str]:
    """Those that can take part."""
    if without:
        return list(ABLATION)
    if shape == "classify":
        return [name for name in CONTESTANTS if name not in ("rankwise-alike", "trl-packed")]
    return [name for name in CONTESTANTS if name != "rankwise-alike" or shape != "text"]


class Task:
    """The rows of a shape, and the model that learns them."""

    def __init__(self, shape: str, data: Path | None) -> None:
        from rankwise.data.examples import TextExample
        from rankwise.data.rows import read_rows
        from rankwise.data.tasks import examples_for
        from rankwise.models.load import load_tokenizer

        self.kind: Any = "seq_cls" if shape == "classify" else "causal_lm"
        self.model_name = "minilm-l6" if shape == "classify" else "smollm2-135m"
        self.tokenizer = load_tokenizer(self.model_name)
        self.labels: list[str] = []
        if shape == "text":
            ids = self.tokenizer((data or Path()).read_text(encoding="utf-8")[:2_000_000]).input_ids
            pieces = [tuple(ids[start : start + 1024]) for start in range(0, len(ids) - 1024, 1024)]
            rows = [TextExample(piece, (False, *[True] * 1023), str(index)) for index, piece in enumerate(pieces)]
        else:
            own = EXAMPLES / ("intents" if shape == "classify" else "text_to_sql") / "train.jsonl"
            found = read_rows(data or own, self.kind)
            self.labels = sorted({str(row.fields["label"]) for row in found}) if shape == "classify" else []
            rows = examples_for(self.kind, found, self.tokenizer, self.labels, 1024, "drop")
        random.Random(0).shuffle(rows)
        self.held_out: list[Any] = rows[:HELD_OUT]
        self.train: list[Any] = rows[HELD_OUT:]

    def model(self) -> Any:
        import torch

        from rankwise.models.load import load_model

        torch.manual_seed(0)
        return load_model(self.model_name, self.kind, self.labels)

    def peft_model(self) -> Any:
        import peft

        kind = "SEQ_CLS" if self.kind == "seq_cls" else "CAUSAL_LM"
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type=kind)
        return peft.get_peft_model(self.model(), config)

    def collate(self, examples: list[Any]) -> dict[str, Any]:
        """A padded batch with labels, as the plain loop and the Trainer take it."""
        import torch

        from rankwise.engine.batch import pad
        from rankwise.models.load import pad_id

        ids, mask = pad([example.ids for example in examples], pad_id(self.tokenizer), torch.device("cpu"))
        if self.kind == "seq_cls":
            return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([e.label for e in examples])}
        trained = pad([example.trained for example in examples], False, torch.device("cpu"))[0].bool()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~trained, -100)}

    def loss(self, model: Any) -> float:
        """The judge: mean loss over what is trained, by the plain padded forward pass in fp32."""
        import torch
        from torch.nn import functional as F

        model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for start in range(0, len(self.held_out), BATCH):
                batch = self.collate(self.held_out[start : start + BATCH])
                labels = batch.pop("labels")
                logits = model(**batch).logits.float()
                if self.kind == "causal_lm":
                    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
                total += F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
                count += int((labels != -100).sum())
        return total / count


class Result(NamedTuple):
    """A contestant's run."""

    model: Any
    seconds: list[float]
    """Of each step."""
    tokens: list[int]
    """Useful ones of each step."""
    flops: Sequence[float] = ()
    """That each step needs; rankwise's alone are counted."""


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_rankwise(task: Task, name: str, steps: int) -> Result:
    from rankwise import LoraConfig, inject_
    from rankwise.engine.tasks import engine_for
    from rankwise.models.load import pad_id
    from rankwise.train.config import TrainConfig
    from rankwise.train.loop import Training

    model = task.model()
    inject_(model, LoraConfig(task_type="SEQ_CLS" if task.kind == "seq_cls" else "CAUSAL_LM", r=RANK, lora_alpha=ALPHA))
    engine = engine_for(task.kind, model, pad_id(task.tokenizer), task.train)
    batches: Any = "alike" if name == "rankwise-alike" else "random"
    config = TrainConfig(
        model="",
        data=(Path(),),
        out=Path(),
        task=task.kind,
        batch_size=BATCH,
        lr=RATE,
        max_steps=steps,
        batches=batches,
    )
    done = list(Training(engine, task.train, config).steps())
    ends = [0.0, *(step.seconds for step in done)]
    seconds = [after - before for before, after in pairwise(ends)]
    return Result(model, seconds, [step.tokens for step in done], needed_flops(task, config, engine.packs))


def needed_flops(task: Task, config: Any, packs: bool) -> list[float]:
    """What each step needs, without what attention computes twice or for nothing."""
    from rankwise import LoraConfig
    from rankwise.models import local_path
    from rankwise.plan.architectures import read_shape
    from rankwise.plan.flops import ATTENTION, lora_flops
    from rankwise.train.batches import planned_steps
    from rankwise.train.forecast import counted_batches

    shape = read_shape(local_path(task.model_name), task.kind, len(task.labels))
    kind: Any = "SEQ_CLS" if task.kind == "seq_cls" else "CAUSAL_LM"
    report = shape.adapted(LoraConfig(task_type=kind, r=RANK, lora_alpha=ALPHA))
    found = [lora_flops(shape, report, batch) for batch in counted_batches(planned_steps(task.train, config), packs)]
    # Two products forward and four backward, of which a causal mask leaves about half.
    useful = 3 / ATTENTION * (0.5 if shape.causal else 1)
    return [flops.matrices + flops.adapter + flops.head + flops.attention * useful for flops in found]


def best_product_rate(model: Any) -> float:
    """FLOPs a second of the fastest fp32 product of 1,024 rows with a matrix of the model's shapes."""
    import torch

    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() == 2 and min(p.shape) >= 128}
    best = 0.0
    for d, k in sorted(shapes):
        x, weight = torch.randn(1024, k), torch.randn(d, k)
        for _ in range(5):
            begin = time.perf_counter()
            torch.mm(x, weight.T)
            best = max(best, 2 * 1024 * d * k / (time.perf_counter() - begin))
    return best


def run_peft(task: Task, name: str, steps: int) -> Result:
    import torch

    model = task.peft_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    warm_up = max(1, round(0.05 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm_up, (steps - n) / max(1, steps - warm_up + 1))
    )
    seconds, tokens = [], []
    model.train()
    for batch in padded_batches(task.train, steps, grouped=name == "peft-grouped"):
        begin = time.perf_counter()
        model(**task.collate(batch)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - begin)
        tokens.append(sum(len(example.ids) for example in batch))
    return Result(model, seconds, tokens)


def padded_batches(rows: list[Any], steps: int, grouped: bool) -> Iterator[list[Any]]:
    """Batches in a random order; grouped: of rows of about one length."""
    rows = list(rows)
    random.Random(1).shuffle(rows)
    if grouped:
        rows.sort(key=lambda row: len(row.ids))
    batches = [rows[start : start + BATCH] for start in range(0, len(rows) - BATCH + 1, BATCH)]
    random.Random(2).shuffle(batches)
    yield from batches[:steps]


def run_trainer(task: Task, name: str, steps: int) -> Result:
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    seconds: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.begin)

    def counting(collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def on_batch(rows: Any) -> Any:
            batch = collate(rows)
            mask = batch.get("attention_mask")
            tokens.append(int(batch["input_ids"].numel() if mask is None else mask.sum()))
            return batch

        return on_batch

    settings: dict[str, Any] = {
        "output_dir": "unused",
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    if name != "trl-stock":
        settings |= {"bf16": False, "gradient_checkpointing": False}
    if name == "trl-packed":
        # A packed row of 1,024 tokens holds about as many examples as the others' batches.
        settings["per_device_train_batch_size"] = 1
    if name == "trl-grouped":
        settings["train_sampling_strategy"] = "group_by_length"
    model = task.peft_model()
    if task.kind == "seq_cls":
        rows: Any = [
            {"input_ids": list(e.ids), "attention_mask": [1] * len(e.ids), "labels": e.label} for e in task.train
        ]
        from transformers import DataCollatorWithPadding

        collate = DataCollatorWithPadding(task.tokenizer)
        trainer = Trainer(
            model, TrainingArguments(**settings), train_dataset=Dataset.from_list(rows), data_collator=collate
        )
    else:
        from trl.trainer.sft_config import SFTConfig  # pyright: ignore[reportMissingImports]
        from trl.trainer.sft_trainer import SFTTrainer  # pyright: ignore[reportMissingImports]

        rows = [{"input_ids": list(e.ids), "completion_mask": [int(t) for t in e.trained]} for e in task.train]
        arguments = SFTConfig(**settings, completion_only_loss=True, packing=name == "trl-packed", max_length=1024)
        trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=task.tokenizer)
    trainer.data_collator = counting(trainer.data_collator)
    trainer.add_callback(Clock())
    trainer.train()
    return Result(model, seconds, tokens[: len(seconds)])


def run(name: str, shape: str, data: Path | None, steps: int) -> None:
    """One contestant in this process; prints its figures as JSON."""
    task = Task(shape, data)
    runner = run_rankwise if name.startswith("rankwise") else run_peft if name.startswith("peft") else run_trainer
    technique = name.removeprefix("rankwise-without-")
    with patch(*WITHOUT[technique]) if technique in WITHOUT else nullcontext():
        done = runner(task, name, steps)
    # Before the judge, who needs memory of his own.
    figures: dict[str, float] = {"peak_memory_bytes": peak_memory()}
    seconds = sum(done.seconds[1:])
    figures["tokens_per_second"] = sum(done.tokens[1:]) / seconds
    figures["loss"] = task.loss(done.model)
    if done.flops:
        figures["share_of_limit"] = sum(done.flops[1:]) / seconds / best_product_rate(done.model)
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=["sql", "rows", "text", "classify"], default="sql")
    parser.add_argument("--data", type=Path, help="the file of rows or the text")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS)
    parser.add_argument("--without", action="store_true", help="rankwise without each of its techniques")
    parser.add_argument("--run", choices=(*CONTESTANTS, *ABLATION), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shape in ("rows", "text") and options.data is None:
        parser.error(f"--shape {options.shape} needs --data FILE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.run:
        run(options.run, options.shape, options.data, options.steps)
        return
    names = contestants_for(options.shape, options.without)
    names = [name for name in names if not options.only or name in options.only]
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for repeat in range(options.repeats):
        for name in names:
            command = [sys.executable, __file__, "--run", name, "--shape", options.shape, "--steps", str(options.steps)]
            command += ["--data", str(options.data)] if options.data else []
            output = subprocess.run(command, capture_output=True, text=True)
            if output.returncode:
                print(f"{name}: failed: {output.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            figures[name].append(json.loads(output.stdout.splitlines()[-1]))
            print(f"{name:<34} {repeat + 1}: {figures[name][-1]['tokens_per_second']:8.1f} useful tokens/s", flush=True)
    print(json.dumps(summary({name: runs for name, runs in figures.items() if runs}, options)))


def summary(figures: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> dict[str, Any]:
    """Prints the table; medians, spread and ratios."""
    import torch

    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    median = {name: statistics.median(run["tokens_per_second"] for run in runs) for name, runs in figures.items()}
    loss = {name: runs[0]["loss"] for name, runs in figures.items()}
    right = loss.get("peft-random")
    peers = [n for n in figures if n.startswith(("trl", "peft")) and (right is None or loss[n] < right * 1.02)]
    # Without peers, the ratios are to the first contestant.
    best = max(peers or list(figures)[:1], key=lambda name: median[name], default=None)
    print(f"\n{machine}; {options.shape}, {options.steps} steps of {BATCH} rows, {options.repeats} repeats")
    print(f"{'':<34} {'tokens/s':>9} {'spread':>15} {'peak GB':>8} {'loss':>8}  × best peer ({best}), limit")
    rows = {}
    for name, runs in figures.items():
        speeds = sorted(run["tokens_per_second"] for run in runs)
        peak = statistics.median(run["peak_memory_bytes"] for run in runs)
        ratio = median[name] / median[best] if best else float("nan")
        shares = [run["share_of_limit"] for run in runs if "share_of_limit" in run]
        share = statistics.median(shares) if shares else None
        spread = f"{speeds[0]:.0f}-{speeds[-1]:.0f}"
        line = f"{name:<34} {median[name]:>9.1f} {spread:>15} {peak / 1e9:>8.2f} {loss[name]:>8.4f}  {ratio:.2f}"
        print(line if share is None else f"{line}  {share:.2f}")
        rows[name] = {"tokens_per_second": speeds, "peak_memory_bytes": peak, "loss": loss[name], "ratio": ratio}
        rows[name]["share_of_limit"] = share
    return {"machine": machine, "shape": options.shape, "steps": options.steps, "best_peer": best, "runs": rows}


if __name__ == "__main__":
    main()
