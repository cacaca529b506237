"""Do several adapters train faster in one pass over their base than one after the other?

For each case (a base model : rows a batch) adapters of the ranks 2, 4, 8, … train on the same rows, each by itself and
all together, in turns, `--repeats` times. The speed is the useful tokens of all adapters by the time of all steps but
the first of a run, in which weights are prepared. The last line is JSON.

    python benchmarks/several_adapters.py [--adapters 4] [--steps 6] [--repeats 5] [--cases smollm2-135m:4 minilm-l6:32]

On a machine that is busy otherwise, --processor-time with OMP_NUM_THREADS=1 is steadier.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rankwise import LoraConfig, TrainConfig, activate_, inject_
from rankwise.data.rows import read_rows
from rankwise.data.shapes import TASK_TYPES
from rankwise.data.tasks import examples_for
from rankwise.engine.engine import Engine
from rankwise.engine.tasks import engine_for
from rankwise.finetune import labels_of
from rankwise.models.load import load_model, load_tokenizer, pad_id
from rankwise.train.loop import Training
from rankwise.train.together import train_together

EXAMPLES = Path(__file__).parents[1] / "examples"
TASKS = {"smollm2-135m": ("causal_lm", "text_to_sql"), "minilm-l6": ("seq_cls", "intents")}
"""Of each base model: its task and the folder of its rows."""
Clock = Callable[[], float]
"""Seconds"""


def prepare(base: str, adapters: int) -> tuple[Engine[Any], list[Any]]:
    """The engine of a model that carries the adapters, and the rows to train on."""
    task, folder = TASKS[base]
    rows = read_rows(EXAMPLES / folder / "train.jsonl", task)
    labels = labels_of(rows, base) if task == "seq_cls" else []
    tokenizer, model = load_tokenizer(base), load_model(base, task, labels)
    examples = examples_for(task, rows, tokenizer, labels, 512, "error")
    for index in range(adapters):
        inject_(model, LoraConfig(task_type=TASK_TYPES[task], r=2 ** (index + 1)), adapter=f"adapter{index}")
    return engine_for(task, model, pad_id(tokenizer), examples), examples


def begin(engine: Engine[Any], examples: Sequence[Any], adapter: int, batch: int, steps: int) -> Training:
    """A training of one of the adapters."""
    activate_(engine.model, f"adapter{adapter}")
    config = TrainConfig(model="", data=(EXAMPLES,), out=EXAMPLES, batch_size=batch, max_steps=steps, lr=1e-4)
    return Training(engine, examples, config)


def seconds_alone(clock: Clock, trainings: Iterator[Training]) -> float:
    """Of all trainings, one after the other."""
    total = 0.0
    for training in trainings:
        first, *_, last = [clock() for _ in training.steps()]
        total += last - first
    return total


def seconds_together(clock: Clock, trainings: Iterator[Training]) -> float:
    """Of all trainings in one pass."""
    own = list(trainings)
    times = [clock() for _ in train_together(own)]
    return times[-1] - times[len(own) - 1]


def measure(clock: Clock, base: str, batch: int, adapters: int, steps: int, repeats: int) -> dict[str, Any]:
    """Median and extreme useful tokens per second of both ways, and of their ratio in each pair of runs."""
    torch.manual_seed(0)
    engine, examples = prepare(base, adapters)
    plan = begin(engine, examples, 0, batch, steps).plan
    tokens = [sum(len(row.ids) for batch in step for row in batch) for step in plan]
    speeds: dict[str, list[float]] = {"alone": [], "together": []}
    for _ in range(repeats):
        for name, run in (("alone", seconds_alone), ("together", seconds_together)):
            seconds = run(clock, (begin(engine, examples, adapter, batch, steps) for adapter in range(adapters)))
            speeds[name].append(adapters * sum(tokens[1:]) / seconds)
    speeds["ratio"] = [after / before for before, after in zip(speeds["alone"], speeds["together"], strict=True)]
    case = {"base": base, "batch": batch, "adapters": adapters, "tokens_a_step": round(statistics.mean(tokens))}
    return case | {name: [statistics.median(own), min(own), max(own)] for name, own in speeds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=["smollm2-135m:4", "minilm-l6:32"])
    parser.add_argument("--processor-time", action="store_true", help="of this process, for a machine that is not idle")
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    found = []
    for case in options.cases:
        base, _, batch = case.partition(":")
        figures = measure(clock, base, int(batch), options.adapters, options.steps, options.repeats)
        found.append(figures)
        shown = {name: "{:.3g} ({:.3g} to {:.3g})".format(*figures[name]) for name in ("alone", "together", "ratio")}
        print(
            f"{base}, {batch} rows, {figures['tokens_a_step']} tokens a step, {options.adapters} adapters: useful "
            f"tokens/s alone {shown['alone']}, together {shown['together']}; {shown['ratio']} times as fast"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
