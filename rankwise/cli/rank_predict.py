"""`rankwise rank predict`"""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from rankwise.cli.arguments import parse
from rankwise.cli.one_result import leave_result
from rankwise.cli.rank_config import RankConfig
from rankwise.errors import ConfigError

if TYPE_CHECKING:
    from rankwise.paired_runs import PairedRuns
    from rankwise.rank.predict import Prediction
    from rankwise.train.progress import Reporter

HEAD_BATCHES = 32
"""A classifier's head trains on a sample of so many batches: all rows would take a third of a training of one epoch."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig(RankConfig):
    """Say before training which range of ranks is worth trying, from the part of the gradient that is the same on two
    halves of the data; it never says which rank suffices. A classifier's head is trained first, by the settings of
    rankwise train."""

    out: Path
    """File for the result, JSON; it must not exist yet."""
    signal_batches: int = 16
    """Batches of --batch-size rows, half of them in each half; each costs two backward passes."""
    directions: int = 64
    """Most directions that are looked for in a layer; a narrower matrix has no more than its width."""
    r: tyro.conf.Suppress[int] = 8

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
    return leave_result(config, config.directions, partial(prediction, signal_batches=config.signal_batches))


def prediction(runs: "PairedRuns", reporter: "Reporter", signal_batches: int = 16) -> "Prediction":
    """Look for as many directions as the largest rank of `runs`; a classifier's head is trained first.

    Raises ConfigError for fewer than two batches of training rows.
    """
    from rankwise.lora.inject import inject_, largest_ranks
    from rankwise.rank.measure import per_example
    from rankwise.rank.predict import Prediction, predict
    from rankwise.train.batches import planned_steps

    config = runs.config
    count = min(signal_batches, len(runs.train) // config.batch_size) // 2 * 2
    if not count:
        raise ConfigError(
            f"the gradient is compared between two halves of at least one batch of {config.batch_size}, and the "
            f"training data hold {len(runs.train)} rows; give more rows"
            + (f", or --batch-size {len(runs.train) // 2}" if len(runs.train) > 1 else "")
        )
    engine = runs.engine(config.seed)
    lora = runs.lora(runs.largest)
    report = inject_(engine.model, lora.lowered_to(largest_ranks(engine.model, lora)))
    if runs.labels:
        with reporter.stage("training the head"):
            runs.fit_head(engine, HEAD_BATCHES)
    steps = planned_steps(runs.train, replace(config, max_steps=count, accumulate=1))
    batches = [batch for step in steps for batch in step]
    with reporter.stage(f"{2 * len(batches)} backward passes"):
        layers = predict(engine, (batches[::2], batches[1::2]), config.seed)
    losses, _ = per_example(engine, [row for batch in batches[::2] for row in batch])
    bits = float(losses.mean() * len(runs.train) / math.log(2))
    per_rank = sum(matrix.count * (matrix.d + matrix.k) for matrix in report.matrices)
    return Prediction(tuple(layers), bits, per_rank)
