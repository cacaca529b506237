"""`rankwise rank nested`"""

from dataclasses import dataclass
from pathlib import Path

from rankwise.cli.arguments import parse
from rankwise.cli.one_result import leave_result
from rankwise.cli.rank_config import RankConfig


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
    return leave_result(config, config.r, lambda runs, reporter: runs.nested_run(reporter))
