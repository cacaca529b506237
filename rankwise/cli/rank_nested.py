"""`rankwise rank nested`"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rankwise.cli.arguments import parse
from rankwise.cli.one_result import leave_result
from rankwise.cli.rank_config import RankConfig

USUAL_RANK = 16


@dataclass(frozen=True, kw_only=True)
class NestedConfig(RankConfig):
    """Estimate the held-out loss at every rank up to --r with one training. The estimate errs high: it is a place to
    start from, not a result. All other settings are those of rankwise train."""

    out: Path
    """File for the result, JSON; it must not exist yet."""
    r: int | Literal["auto"] = USUAL_RANK
    """The largest rank. auto, which stands in the run.yaml of a training, is 16."""


def main(options: list[str]) -> int:
    config = parse(NestedConfig, options, "rank nested")
    largest = USUAL_RANK if config.r == "auto" else config.r
    config = replace(config, r=largest)
    return leave_result(config, largest, lambda runs, reporter: runs.nested_run(reporter))
