"""How small does an adapter get at a held-out loss within δ: rankwise shrink against two simple rules?

For each task an adapter is trained at r = 32 on all linear layers. Then, on the same held-out rows, cut into the same
three parts, with the same δ (5 % of what the low-rank updates gain) and the same paired test:

- shrink: one budget over all layers, directions ordered by what they do to the layers' outputs;
- uniform: every layer cut to the same rank by the plain singular values, down until the test fails;
- energy: every layer by itself keeps 90 % of its squared singular values (PEFT's convert_to_lora with rank=0.9). This
  rule looks at no loss; its numbers of parameters count only if its loss is within δ.

    python benchmarks/shrink.py --trec FOLDER

Tasks: text to SQL on SmolLM2-135M, 150 intents on MiniLM, and, with --trec, question types on MiniLM; FOLDER holds
TREC.train and TREC.test (Li and Roth 2002; lines of "COARSE:fine text", latin-1). What was trained in --out is not
trained again. The last line is JSON.
"""

import argparse
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
SETTINGS: dict[str, dict[str, Any]] = {
    "text_to_sql": {"model": "smollm2-135m", "task": "causal_lm", "batch_size": 4, "lr": 2e-3, "max_steps": 150},
    "intents": {"model": "minilm-l6", "task": "seq_cls", "batch_size": 32, "lr": 2e-3, "epochs": 3},
    "trec": {"model": "minilm-l6", "task": "seq_cls", "batch_size": 32, "lr": 2e-3, "epochs": 2},
}
ENERGY = 0.9


def files(task: str, trec: Path, folder: Path) -> tuple[Path, list[Path]]:
    """(training rows, held-out rows) of a task as JSONL."""
    if task != "trec":
        parts = ("train", "valid", "test")
        train, *held_out = [EXAMPLES / task / f"{part}.jsonl" for part in parts]
        return train, held_out
    for part in ("train", "test"):
        lines = (trec / f"TREC.{part}").read_text(encoding="latin-1").splitlines()
        pairs = [line.split(" ", 1) for line in lines]
        rows = [json.dumps({"text": text, "label": label.partition(":")[0]}) for label, text in pairs]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{part}.jsonl").write_text("".join(f"{row}\n" for row in rows))
    return folder / "train.jsonl", [folder / "test.jsonl"]


def train(task: str, data: Path, r: int, steps: int | None, folder: Path) -> Path:
    """Train an adapter without evaluating it, unless it is there; returns its folder."""
    from rankwise import TrainConfig
    from rankwise.finetune import finetune

    if not (folder / "result.json").is_file():
        settings: dict[str, Any] = SETTINGS[task] | ({"max_steps": steps} if steps else {})
        finetune(TrainConfig(data=(data,), out=folder, r=r, eval_fraction=0, **settings))
    return folder / "adapter"


def held_out_rows(task: str, data: Path, paths: list[Path], count: int) -> list[Any]:
    """Rows that ask nothing that was trained, from the first file on as far as they are needed."""
    from rankwise.data.rows import read_rows, without_overlap

    kind = SETTINGS[task]["task"]
    rows = [row for path in paths for row in read_rows(path, kind)]
    kept, _ = without_overlap(rows, read_rows(data, kind))
    return list(kept[:count])


class Contest:
    """One adapter, one split, one δ, and what each rule makes of them."""

    def __init__(self, task: str, adapter: Path, rows: list[Any], seed: int, delta: float | None) -> None:
        from rankwise.data.tasks import examples_for
        from rankwise.models.adapted import adapter_folder, load_adapted
        from rankwise.models.load import longest_input
        from rankwise.rank.shrink import split_held_out

        self.folder = adapter_folder(adapter)
        self.base = SETTINGS[task]["model"]
        self.delta = delta
        adapted = load_adapted(self.base, self.folder)
        limit = min(1024, longest_input(adapted.model))
        self.held_out = split_held_out(rows, seed).map(
            lambda part: examples_for(adapted.task, part, adapted.tokenizer, adapted.labels, limit, "cut")
        )

    def engine(self) -> Any:
        """The model with the full adapter, fresh."""
        from rankwise.engine.tasks import engine_for
        from rankwise.models.adapted import load_adapted
        from rankwise.models.load import pad_id

        adapted = load_adapted(self.base, self.folder)
        return engine_for(adapted.task, adapted.model, pad_id(adapted.tokenizer), self.held_out.choice)

    def shrink(self) -> dict[str, Any]:
        from rankwise.rank.shrink import shrink_

        begin = time.perf_counter()
        report = shrink_(self.engine(), self.held_out, self.delta)
        self.delta = report.delta
        return {
            "parameters": report.parameters_after,
            "full_parameters": report.parameters_before,
            "total_rank": sum(report.ranks_after.values()),
            "difference": report.loss_shrunk - report.loss_full,
            "bound": report.lost_at_most,
            "full_loss": report.loss_full,
            "gain": report.gain,
            "seconds": time.perf_counter() - begin,
        }

    def simple_rules(self) -> dict[str, dict[str, Any]]:
        """What uniform truncation and the energy threshold reach with the δ of `shrink`."""
        from rankwise.lora.places import named_lora_layers
        from rankwise.rank.paired import measure
        from rankwise.rank.spectrum import directions

        engine = self.engine()
        layers = dict(named_lora_layers(engine.model))
        updates = {name: layer.update("default").low_rank() for name, layer in layers.items()}
        # With A·Aᵀ in the place of the inputs' moments, the directions are those of the plain singular values.
        parts = {name: directions(update, update.A.double() @ update.A.double().T) for name, update in updates.items()}
        full = {part: measure(engine, getattr(self.held_out, part)) for part in ("choice", "confirmation")}

        def test(part: str, ranks: Mapping[str, int]) -> dict[str, Any]:
            from rankwise.rank.cut import set_updates_
            from rankwise.rank.paired import paired_test

            cut = {name: parts[name].truncated(rank) for name, rank in ranks.items()}
            set_updates_(engine.model, layers, cut, "default", "vllm")
            result = paired_test(measure(engine, getattr(self.held_out, part)), full[part])
            numbers = sum(update.A.numel() + update.B.numel() for update in cut.values())
            figures = {"parameters": numbers, "total_rank": sum(ranks.values()), "difference": result.difference}
            return {**figures, "bound": result.bound, "within_delta": result.within(self.delta or 0.0)}

        chosen = largest = max(len(own.sizes) for own in parts.values())
        for rank in range(largest - 1, 0, -1):
            if not test("choice", self._uniform(parts, rank))["within_delta"]:
                break
            chosen = rank
        energy = {
            name: 1 + int((own.sizes.square().cumsum(0) < ENERGY * own.sizes.square().sum()).sum())
            for name, own in parts.items()
        }
        confirmed = test("confirmation", self._uniform(parts, chosen))
        while not confirmed["within_delta"] and chosen < largest:
            chosen += 1
            confirmed = test("confirmation", self._uniform(parts, chosen))
        return {"uniform": {"rank": chosen, **confirmed}, "energy": test("confirmation", energy)}

    @staticmethod
    def _uniform(parts: Mapping[str, Any], rank: int) -> dict[str, int]:
        return {name: min(rank, len(own.sizes)) for name, own in parts.items()}


def contest(task: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train, cut by all rules, print, and return the figures."""
    folder = options.out / task
    data, held_out = files(task, options.trec, folder / "data")
    adapter = train(task, data, options.r, options.steps, folder / f"r{options.r}-seed{options.seed}")
    rows = held_out_rows(task, data, held_out, options.rows)
    one = Contest(task, adapter, rows, options.seed, options.delta)
    ours = one.shrink()
    result: dict[str, Any] = {"rows": len(rows), "delta": one.delta, "shrink": ours, **one.simple_rules()}
    saved = 1 - ours["parameters"] / ours["full_parameters"]
    print(f"{task}: shrink saves {saved:.1%} of {ours['full_parameters']:,} numbers")
    for name in ("uniform", "energy"):
        theirs = result[name]
        theirs["ratio"] = theirs["parameters"] / ours["parameters"]
        print(
            f"  {name}: {theirs['parameters']:,} numbers, {theirs['ratio']:.2f} times those of shrink; "
            f"loss {theirs['difference']:+.4f} (bound {theirs['bound']:+.4f}, allowed {one.delta:.4f})",
            flush=True,
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", choices=SETTINGS, nargs="+", help="without it, all whose data are there")
    parser.add_argument("--trec", type=Path, help="folder of TREC.train and TREC.test")
    parser.add_argument("--out", type=Path, default=Path("runs/shrink"), help="folder of the adapters")
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--steps", type=int, help="stop each training after so many steps")
    parser.add_argument("--rows", type=int, default=3000, help="most held-out rows")
    parser.add_argument("--delta", type=float, help="nats; without it, 5 %% of the gain")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tasks = options.tasks or [task for task in SETTINGS if task != "trec" or options.trec]
    if "trec" in tasks and options.trec is None:
        raise SystemExit("the task trec needs --trec FOLDER with TREC.train and TREC.test")
    result = {task: contest(task, options) for task in tasks}
    import torch

    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(json.dumps({"machine": machine, "r": options.r, "tasks": result}))


if __name__ == "__main__":
    main()
