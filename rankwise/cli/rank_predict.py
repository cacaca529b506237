"""`rankwise rank predict`"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tyro

from rankwise.cli.arguments import parse
from rankwise.errors import ConfigError
from rankwise.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class PredictConfig(TrainConfig):
    """Say before training which range of ranks is worth trying, from the part of the gradient that is the same on two
    halves of the data; it never says which rank suffices. A classifier's head is trained first, by the settings of
    rankwise train."""

    out: Path
    """File for the result, JSON; it must not exist yet."""
    signal_batches: int = 16
    """Batches of --batch-size rows, half of them in each half; each costs two backward passes."""
    directions: int = 64
    """Most directions that are looked for in a layer."""
    r: tyro.conf.Suppress[int] = 8
    eval_answers: tyro.conf.Suppress[int] = 0

    def _problems(self):
        yield from super()._problems()
        if self.signal_batches < 2:
            yield f"--signal-batches must be at least 2, found {self.signal_batches}"
        if self.task == "embedding":
            yield "--task embedding: what a rank could store is a matter of tokens or labels; try rank nested"
        if self.directions < 1:
            yield f"--directions must be at least 1, found {self.directions}"


def main(options: list[str]) -> int:
    config = parse(PredictConfig, options, "rank predict")
    if config.out.exists():
        raise ConfigError(f"--out {config.out} exists already; choose another file, or remove it first")
    from rankwise import atomic
    from rankwise.cli.paired_runs import PairedRuns
    from rankwise.lora.inject import inject_
    from rankwise.rank.measure import per_example
    from rankwise.rank.predict import Prediction, predict
    from rankwise.rank.start import freeze_updates_
    from rankwise.train.batches import planned_steps
    from rankwise.train.progress import Reporter

    reporter = Reporter()
    with reporter.stage(f"loading {config.model}"):
        runs = PairedRuns(config, config.directions)
    engine = runs.engine(config.seed)
    report = inject_(engine.model, runs.lora(config.directions))
    if runs.labels:
        freeze_updates_(engine.model)
        with reporter.stage("training the head"):
            runs.fit(engine, config.seed, 1.0)
    count = min(config.signal_batches, len(runs.train) // config.batch_size) // 2 * 2
    steps = planned_steps(runs.train, replace(config, max_steps=count, accumulate=1))
    batches = [batch for step in steps for batch in step]
    with reporter.stage(f"{2 * len(batches)} backward passes"):
        layers = predict(engine, (batches[::2], batches[1::2]), config.seed)
    losses, _ = per_example(engine, [row for batch in batches for row in batch])
    bits = float(losses.mean() * len(runs.train) / math.log(2))
    per_rank = sum(matrix.count * (matrix.d + matrix.k) for matrix in report.matrices)
    found = Prediction(tuple(layers), bits, per_rank)
    content = asdict(found) | {"range": found.range, "capacity": found.capacity, "settings": config.as_dict()}
    atomic.write_text(config.out, json.dumps(content, indent=2) + "\n")
    print(found)
    return 0
