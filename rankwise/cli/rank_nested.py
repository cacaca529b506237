"""`rankwise rank nested`"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.cli.arguments import parse
from rankwise.cli.one_result import leave_result
from rankwise.cli.rank_config import RankConfig

if TYPE_CHECKING:
    from rankwise.paired_runs import PairedRuns
    from rankwise.rank.nested import Nested
    from rankwise.train.progress import Reporter


@dataclass(frozen=True, kw_only=True)
class NestedConfig(RankConfig):
    """Estimate the held-out loss at every rank up to --r with one training. The estimate errs high: it is a place to
    start from, not a result. All other settings are those of rankwise train."""

    out: Path
    """File for the result, JSON; it must not exist yet."""
    r: int = 16
    """The largest rank."""


def main(options: list[str]) -> int:
    config = parse(NestedConfig, options, "rank nested")
    return leave_result(config, config.r, estimate)


def estimate(runs: "PairedRuns", reporter: "Reporter") -> "Nested":
    """Train all ranks up to that of `runs` at once, and measure each."""
    from rankwise.lora.inject import inject_
    from rankwise.rank.nested import nested

    seed = runs.config.seed
    engine = runs.engine(seed)
    inject_(engine.model, runs.lora(runs.largest))
    return nested(engine, lambda e: runs.fit(e, seed, 1.0), runs.held_out, runs.largest, seed, reporter.stage)
