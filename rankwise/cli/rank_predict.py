"""`rankwise rank predict`"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from rankwise.cli.arguments import parse
from rankwise.cli.one_result import leave_result
from rankwise.cli.rank_config import RankConfig


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
    # It looks at training rows alone.
    return leave_result(
        config, config.directions, lambda runs, reporter: runs.prediction(reporter, config.signal_batches), least_rows=0
    )
