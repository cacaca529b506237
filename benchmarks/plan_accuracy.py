"""Do `rankwise plan`'s peak memory and time come true?

Twelve runs of 5 to 30 seconds through the real training path, each in a fresh process and without evaluation:
SmolLM2-135M and MiniLM, three shapes of data each, ranks 4 and 32. Before each the machine is measured anew, as a
shared one's speed may change by a quarter within minutes; --repeats takes all of them several times, in turns. For each
run it prints what was predicted, what was measured, and predicted / measured, then each ratio's median and spread.

    python benchmarks/plan_accuracy.py [--only NAME ...] [--ranks 4 32] [--repeats 1] [--processor-time]

--processor-time counts, for the prediction and for the runs, the time that the process itself computes, on one thread:
for a machine that does other work meanwhile. The last line is JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass(frozen=True)
class Case:
    """A model on one shape of data."""

    name: str
    model: str
    task: str
    batch_size: int
    steps: int


CASES = (
    Case("short questions", "smollm2-135m", "causal_lm", 8, 12),
    Case("text to SQL", "smollm2-135m", "causal_lm", 4, 12),
    Case("conversations", "smollm2-135m", "causal_lm", 1, 12),
    Case("sentences", "minilm-l6", "seq_cls", 32, 32),
    Case("few sentences", "minilm-l6", "seq_cls", 8, 80),
    Case("paragraphs", "minilm-l6", "seq_cls", 8, 24),
)


def rows_of(name: str) -> list[dict[str, Any]]:
    """The training rows of a case, made from the shipped examples."""
    sql, intents = (
        [json.loads(line) for line in (EXAMPLES / folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
        for folder in ("text_to_sql", "intents")
    )
    if name == "short questions":
        return [{"prompt": row["text"], "completion": row["label"]} for row in intents[::40]]
    if name == "text to SQL":
        return sql[:200]
    if name == "conversations":
        turns = [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            for row in sql[:200]
        ]
        return [{"messages": [turn for pair in turns[i : i + 4] for turn in pair]} for i in range(0, 200, 4)]
    if name == "paragraphs":
        texts = [" ".join(row["text"] for row in intents[i : i + 10]) for i in range(0, 2000, 10)]
        return [{"text": text, "label": text[0]} for text in texts]
    return intents[::10]


def child(what: list[str], processor_time: bool) -> None:
    """In a process of its own: measure the machine, or train."""
    if processor_time:
        time.perf_counter = time.process_time
    if what == ["calibrate"]:
        from rankwise.plan.calibrate import calibrate

        calibrate()
        return
    from rankwise.cli.main import main as rankwise

    sys.exit(rankwise(what))


def in_a_process(what: list[str], processor_time: bool) -> None:
    command = [sys.executable, __file__, *(["--processor-time"] if processor_time else []), "--child", *what]
    threads = {"OMP_NUM_THREADS": "1"} if processor_time else {}
    done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(what)} failed:\n{done.stderr}")


def run(case: Case, r: int, processor_time: bool, scratch: Path) -> dict[str, Any]:
    """Measure the machine, train, and compare what was predicted with what was measured."""
    data, out = scratch / f"{case.name}.jsonl".replace(" ", "-"), scratch / f"{case.name}-{r}".replace(" ", "-")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(case.name)), encoding="utf-8")
    options = {
        "--model": case.model,
        "--task": case.task,
        "--data": data,
        "--out": out,
        "--r": r,
        "--batch-size": case.batch_size,
        "--max-steps": case.steps,
        "--eval-fraction": 0,
    }
    in_a_process(["calibrate"], processor_time)
    in_a_process(["train", *(str(part) for pair in options.items() for part in pair)], processor_time)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    figures: dict[str, Any] = {"case": case.name, "model": case.model, "r": r}
    for name in ("seconds", "peak_memory_bytes"):
        predicted, measured = result[f"predicted_{name}"], result[name]
        figures[name] = {"predicted": predicted, "measured": measured, "ratio": predicted / measured}
    return figures


def main() -> None:
    # Without abbreviations: the --r of a child's command would stand for --ranks and --repeats.
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=", ".join(case.name for case in CASES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 32])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.child:
        child(options.child, options.processor_time)
        return
    chosen = [case for case in CASES if not options.only or case.name in options.only]
    kinds = [(case, r) for case in chosen for r in options.ranks]
    runs: list[dict[str, Any]] = []
    print(f"{'case':<16} {'model':<13} {'r':>3} {'memory, GB':>20} {'ratio':>6} {'time, s':>17} {'ratio':>6}")
    for case, r in kinds * options.repeats:
        with tempfile.TemporaryDirectory() as scratch:
            figures = run(case, r, options.processor_time, Path(scratch))
        runs.append(figures)
        memory, seconds = figures["peak_memory_bytes"], figures["seconds"]
        print(
            f"{case.name:<16} {case.model:<13} {r:>3} {memory['predicted'] / 1e9:>9.2f} "
            f"{memory['measured'] / 1e9:>10.2f} {memory['ratio']:>6.2f} {seconds['predicted']:>8.1f} "
            f"{seconds['measured']:>8.1f} {seconds['ratio']:>6.2f}",
            flush=True,
        )
    print(json.dumps(summary(runs, options.processor_time)))


def summary(runs: list[dict[str, Any]], processor_time: bool) -> dict[str, Any]:
    """All runs, and for each kind of them the median of predicted / measured; printed too, with the spread."""
    ratios: dict[str, dict[str, float]] = {}
    for name in ("peak_memory_bytes", "seconds"):
        by_kind: dict[str, list[float]] = {}
        for figures in runs:
            by_kind.setdefault(f"{figures['case']}, r = {figures['r']}", []).append(figures[name]["ratio"])
        ratios[name] = {kind: statistics.median(found) for kind, found in by_kind.items()}
        for kind, found in by_kind.items():
            print(f"{name:<18} {kind:<24} {ratios[name][kind]:.2f} ({min(found):.2f} to {max(found):.2f})")
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    clock = "processor time, 1 thread" if processor_time else "wall time"
    return {"machine": machine, "clock": clock, "median_ratios": ratios, "runs": runs}


if __name__ == "__main__":
    main()
