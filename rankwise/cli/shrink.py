"""`rankwise shrink`"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

from rankwise.cli.arguments import parse
from rankwise.data.shapes import Format, Layout, Task
from rankwise.data.transcripts import TrainOn
from rankwise.errors import ConfigError, listing


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig:
    """Cut a trained adapter to the smallest ranks whose loss on held-out rows is shown to be nearly as good."""

    adapter: tyro.conf.Positional[Path]
    """Adapter folder of any PEFT LoRA adapter, or the folder of a run."""
    data: tuple[Path, ...]
    """Held-out rows of the shape that the adapter was trained on: files, folders or hub data sets, not trained on."""
    out: Path
    """Folder of the smaller adapter; it must not exist yet."""
    format: Format | None = None
    """Shape of the rows; without it, the one that most rows have."""
    columns: tuple[str, ...] = ()
    """Names of the data's own columns, such as prompt=question completion=answer."""
    train_on: TrainOn = "completion"
    """What the loss counts, as in training."""
    model: str | None = None
    """Base model; without it, the one that the adapter names."""
    task: Task | None = None
    """What the adapter does; without it, what its configuration says."""
    delta: float | None = None
    """The most that may be lost, in nats for each trained token (text, word); without it, 5 % of the adapter's gain."""
    reader: Literal["vllm", "llama.cpp"] = "vllm"
    """What will read it beside PEFT: where ranks differ between modules, these two scale them in different ways."""
    seed: int = 0
    """Decides which rows observe, choose and confirm."""
    max_length: int = 1024
    """Longest row, in tokens."""
    long_rows: Literal["error", "cut", "drop"] = "error"
    """What to do with rows longer than --max-length."""


def main(options: list[str]) -> int:
    config = parse(ShrinkConfig, options, "shrink")
    _check(config)
    layout = Layout.parse(config.format, config.columns)
    from rankwise import atomic

    atomic.check_place(config.out)
    from rankwise.data.rows import read_rows
    from rankwise.data.sources import check_unweighted
    from rankwise.data.tasks import examples_for
    from rankwise.engine.tasks import engine_for
    from rankwise.lora.checkpoint import save_adapter
    from rankwise.models.adapted import load_adapted, write_labels
    from rankwise.models.load import longest_input, pad_id
    from rankwise.rank.shrink import shrink_, split_examples
    from rankwise.train.progress import Reporter

    check_unweighted(config.data)
    reporter = Reporter()
    with reporter.stage("loading"):
        adapted = load_adapted(config.model, config.adapter, config.task)
    rows = read_rows(config.data, adapted.task, layout)
    length = min(config.max_length, longest_input(adapted.model))
    how = adapted.tokenizer, adapted.labels, length, config.long_rows, config.train_on
    held_out = split_examples(rows, examples_for(adapted.task, rows, *how), config.seed)
    engine = engine_for(adapted.task, adapted.model, pad_id(adapted.tokenizer), held_out.choice)
    with reporter.stage("shrinking") as stage:
        report = shrink_(engine, held_out, config.delta, config.reader, on_progress=stage.update)
    print(report)
    with atomic.replacing(config.out) as temporary:
        save_adapter(adapted.model, temporary)
        write_labels(adapted.model, adapted.task, temporary)
        atomic.write_text(temporary / "shrink.json", json.dumps(asdict(report), indent=2) + "\n")
    print(f"adapter: {config.out}")
    return 0


def _check(config: ShrinkConfig) -> None:
    problems = []
    if not config.adapter.is_dir():
        problems.append(f"no adapter folder at {config.adapter}")
    if config.out.exists():
        problems.append(f"--out {config.out} exists already; choose another folder, or remove it first")
    if config.delta is not None and not 0 < config.delta < math.inf:
        problems.append(f"--delta must be a finite number of nats above 0, found {config.delta}")
    if problems:
        raise ConfigError("invalid settings:\n" + listing(problems))
