"""Which rank does a real task need: all four instruments side by side, what each costs, and how right it is.

On one task, with the same settings and the same held-out rows:

- sweep: every rank with every seed, and full fine-tuning. Its means are the truth that the others are held against;
- predict: before training, a range of ranks;
- nested: one training for all ranks;
- shrink: an adapter of the largest rank, cut after its training.

Printed are the rank that each names, its regret (held-out loss at that rank minus that at the sweep's rank, by the
sweep's runs, with a 90 % interval) and its cost in trainings at the largest rank; for each rank trained numbers, bytes,
peak memory and time; and the adapter at the sweep's rank against full fine-tuning.

    python benchmarks/rank_real.py --task text_to_sql --out runs/rank-sql --ranks 1 2 4 8 16 32 --seeds 3 --steps 100
    python benchmarks/rank_real.py --task trec --data FOLDER --out runs/rank-trec --epochs 2
    python benchmarks/rank_real.py --task e2e --data FOLDER --out runs/rank-e2e --ranks 1 4 16 64 --steps 100 \
        --rows 400 --held-out 200

FOLDER holds, for trec, TREC.train and TREC.test (Li and Roth 2002; lines of "COARSE:fine text", latin-1); for e2e,
train.txt and valid.txt (E2E NLG, Novikova et al. 2017, in the form of LoRA's repository: lines of "facts||sentence"),
of which one sentence for each of valid's facts is held out. What was finished in --out is not done again. The last line
is JSON.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankwise import atomic
from rankwise.train.config import TrainConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
SETTINGS: dict[str, dict[str, Any]] = {
    "text_to_sql": {"model": "smollm2-135m", "task": "causal_lm", "batch_size": 4, "lr": 2e-3},
    "trec": {"model": "minilm-l6", "task": "seq_cls", "batch_size": 32, "lr": 2e-3},
    "e2e": {"model": "smollm2-135m", "task": "causal_lm", "batch_size": 4, "lr": 2e-3},
}


def write_rows(task: str, source: Path | None, folder: Path, most: tuple[int | None, int | None]) -> tuple[Path, Path]:
    """(training rows, held-out rows) as JSONL in `folder`; at most so many, the first ones, of each."""
    if task == "text_to_sql":
        texts = [[EXAMPLES / task / f"{name}.jsonl" for name in names] for names in (["train"], ["valid", "test"])]
        parts = [
            [line for path in paths if path.is_file() for line in path.read_text().splitlines()] for paths in texts
        ]
    elif source is None:
        raise SystemExit(f"--task {task} needs --data FOLDER (--help says what it holds)")
    elif task == "trec":
        parts = [_trec(source / f"TREC.{name}") for name in ("train", "test")]
    else:
        held_out = {json.loads(line)["prompt"]: line for line in reversed(_e2e(source / "valid.txt"))}
        parts = [_e2e(source / "train.txt"), [*reversed(held_out.values())]]
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, lines, count in zip(files, parts, most, strict=True):
        atomic.write_text(path, "".join(f"{line}\n" for line in lines[:count]))
    return files


def _trec(path: Path) -> list[str]:
    pairs = [line.split(" ", 1) for line in path.read_text(encoding="latin-1").splitlines()]
    return [json.dumps({"text": text, "label": label.partition(":")[0]}) for label, text in pairs]


def _e2e(path: Path) -> list[str]:
    pairs = [line.split("||") for line in path.read_text(encoding="utf-8").splitlines()]
    return [json.dumps({"prompt": facts.strip(), "completion": sentence.strip()}) for facts, sentence in pairs]


def once(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` gave when it was first called, kept in a file."""
    if not path.is_file():
        atomic.write_text(path, json.dumps(measure()) + "\n")
    return json.loads(path.read_text())


def timed(measure: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    return measure(), time.perf_counter() - begin


class WatchedRuns:
    """run(rank, seed, factor), with a line in `log` on what each call took."""

    def __init__(self, runs: Any, log: Path) -> None:
        self.runs, self.log = runs, log
        self.evaluating = 0.0
        self._measure, runs.measure = runs.measure, self.measure

    def measure(self, engine: Any) -> Any:
        result, self.evaluating = timed(lambda: self._measure(engine))
        return result

    def __call__(self, rank: int, seed: int, factor: float) -> Any:
        result, seconds = timed(lambda: self.runs(rank, seed, factor))
        line = {"rank": rank, "seconds": seconds, "training": result.seconds, "evaluating": self.evaluating}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return result

    def totals(self) -> dict[str, float]:
        """Seconds of all calls, of their training steps and of their evaluations."""
        calls = [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]
        return {part: sum(call[part] for call in calls) for part in ("seconds", "training", "evaluating")}


class EvaluationClock:
    """An engine that knows how long it computed losses without gradients."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.seconds = engine, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def example_losses(self, examples: Any) -> Any:
        import torch

        result, seconds = timed(lambda: self.engine.example_losses(examples))
        self.seconds += 0.0 if torch.is_grad_enabled() else seconds
        return result


def predicted(runs: Any, reporter: Any) -> dict[str, Any]:
    found, seconds = timed(lambda: runs.prediction(reporter))
    return {"range": found.as_dict()["range"], "capacity": found.capacity, "seconds": seconds}


def nested(runs: Any, reporter: Any) -> dict[str, Any]:
    from rankwise.errors import ConfigError

    begin = time.perf_counter()
    try:
        found = runs.nested_run(reporter)
    except ConfigError as error:
        return {"refused": str(error), "seconds": time.perf_counter() - begin}
    return found.as_dict() | {"seconds": time.perf_counter() - begin}


def shrunk(runs: Any, reporter: Any, factor: float) -> dict[str, Any]:
    """Train at the largest rank with the first seed, and cut."""
    from dataclasses import asdict

    from rankwise.errors import DataError
    from rankwise.lora.inject import inject_
    from rankwise.rank.shrink import shrink_, split_held_out

    config = runs.config
    engine: Any = EvaluationClock(runs.engine(config.seed))
    inject_(engine.model, runs.lora(runs.largest))
    with reporter.stage(f"training at rank {runs.largest}"):
        runs.fit(engine.engine, config.seed, factor)
    held_out = split_held_out(runs.held_out_rows, config.seed).map(runs.examples)
    begin = time.perf_counter()
    with reporter.stage("shrinking"):
        try:
            report = asdict(shrink_(engine, held_out))
        except DataError as error:
            report = {"refused": str(error)}
    seconds = time.perf_counter() - begin
    return report | {"evaluations": engine.seconds, "seconds": seconds - engine.seconds}


def main() -> None:
    options = _options()
    from rankwise.finetune import rows_sha256
    from rankwise.paired_runs import PairedRuns
    from rankwise.rank.page import page, picture
    from rankwise.rank.report import as_dict, table
    from rankwise.rank.sweep import sweep
    from rankwise.rank.verdict import notes, verdict
    from rankwise.train.progress import Reporter

    out: Path = options.out
    train, held_out = write_rows(options.task, options.data, out / "data", (options.rows, options.held_out))
    settings: dict[str, Any] = SETTINGS[options.task] | ({"lr": options.lr} if options.lr else {})
    config = TrainConfig(
        data=(train,),
        eval_data=(held_out,),
        out=out,
        r=max(options.ranks),
        max_steps=options.steps,
        epochs=options.epochs,
        **settings,
    )
    reporter = Reporter()
    largest = max(options.ranks)

    def fresh(rank: int) -> PairedRuns:
        return PairedRuns(config, rank)

    found_by = {
        "predict": once(out / "predict.json", lambda: predicted(fresh(2 * largest), reporter)),
        "nested": once(out / "nested.json", lambda: nested(fresh(largest), reporter)),
    }
    runs = WatchedRuns(fresh(largest), out / "calls.jsonl")
    decisive = config.as_dict() | {"rows_sha256": rows_sha256(config), "ranks": options.ranks}
    found = sweep(
        runs,
        options.ranks,
        range(options.seeds),
        with_full=options.full,
        check_rates=options.check_rates,
        folder=out / "sweep",
        settings={name: value for name, value in decisive.items() if name not in ("out", "data", "eval_data")},
        say=reporter.say,
    )
    atomic.write_text(out / "sweep" / "sweep.html", page(found, config.as_dict()))
    atomic.write_text(out / "sweep" / "sweep.svg", picture(found))
    atomic.write_text(out / "sweep" / "sweep.json", json.dumps(as_dict(found)) + "\n")
    found_by["shrink"] = once(out / "shrink.json", lambda: shrunk(fresh(largest), reporter, found.factors[largest]))
    print(table(found), verdict(found), *(f"- {note}" for note in notes(found)), sep="\n\n", end="\n\n")
    result = side_by_side(found, found_by, runs.totals())
    for row in result["instruments"]:
        print("  ".join(f"{name} {_shown(value)}" for name, value in row.items()))
    machine = f"{platform.machine()}, {_threads()} threads"
    ranks = {line["name"]: line for line in as_dict(found)["ranks"]}
    print(json.dumps({"machine": machine, "task": options.task, "verdict": verdict(found), **result, "ranks": ranks}))


def side_by_side(found: Any, found_by: dict[str, Any], spent: dict[str, float]) -> dict[str, Any]:
    """What each instrument named, its regret by the sweep's runs, and its cost in trainings at the largest rank."""
    from rankwise.rank.crossed import estimate
    from rankwise.rank.nested import up_to_power_of_two

    comparisons = found.comparisons
    one = found.costs[comparisons.reference].seconds
    tried = sorted(rank for rank in found.losses if rank > 0)

    def row(instrument: str, rank: float | None, seconds: float) -> dict[str, Any]:
        """`rank` None: more than was looked for."""
        named = next((r for r in tried if rank is not None and r >= rank), tried[-1])
        regret = estimate(found.losses[named] - found.losses[comparisons.sufficient], found.counts)
        bounds = {"regret": regret.mean, "from": regret.lower, "to": regret.upper}
        return {"instrument": instrument, "rank": rank, "tried rank": named, **bounds, "trainings": seconds / one}

    rows = [row("sweep", comparisons.sufficient, spent["seconds"])]
    predict, nested, shrink = (found_by[name] for name in ("predict", "nested", "shrink"))
    if predict["range"]:
        rows += [
            row(f"predict, {end} end", predict["range"][i], predict["seconds"]) for i, end in ((0, "low"), (1, "high"))
        ]
    if "refused" not in nested:
        rows.append(row("nested", up_to_power_of_two(nested["rank"]), nested["seconds"]))
    if "refused" not in shrink:
        mean_rank = comparisons.reference * shrink["parameters_after"] / shrink["parameters_before"]
        rows.append(row("shrink, mean rank", mean_rank, shrink["seconds"] + shrink["evaluations"]))
        shrink = {name: shrink[name] for name in _SHRINK} | {"lost": shrink["loss_shrunk"] - shrink["loss_full"]}
    full = found.against_full
    return {
        "instruments": rows,
        "margin": comparisons.margin,
        "sweep_seconds": spent,
        "sweep_overhead": (spent["seconds"] - spent["evaluating"]) / spent["training"] - 1,
        "sweep_overhead_with_evaluations": spent["seconds"] / spent["training"] - 1,
        "seconds_of_one_training": one,
        "against_full": full and {"mean": full.mean, "lower": full.lower, "upper": full.upper},
        "predict": predict,
        "nested": {name: nested.get(name) for name in ("rank", "rank_interval", "losses", "refused", "seconds")},
        "shrink": shrink,
    }


_SHRINK = ("parameters_before", "parameters_after", "delta", "lost_at_most", "rows", "evaluations", "seconds")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", choices=SETTINGS, required=True)
    parser.add_argument("--data", type=Path, help="folder of the texts of trec or e2e")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; a run that was stopped goes on")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="optimiser steps of a training; without it, --epochs")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--rows", type=int, help="only the first training rows")
    parser.add_argument("--held-out", type=int, help="only the first held-out rows")
    parser.add_argument("--full", action=argparse.BooleanOptionalAction, default=True, help="full fine-tuning too")
    parser.add_argument("--check-rates", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
