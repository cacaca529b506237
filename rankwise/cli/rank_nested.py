"""`rankwise rank nested`"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from rankwise.cli.arguments import parse
from rankwise.errors import ConfigError
from rankwise.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class NestedConfig(TrainConfig):
    """Estimate the held-out loss at every rank up to --r with one training. The estimate errs high: it is a place to
    start from, not a result. All other settings are those of rankwise train."""

    out: Path
    """File for the result, JSON; it must not exist yet."""
    r: int = 16
    """The largest rank."""
    eval_answers: tyro.conf.Suppress[int] = 0


def main(options: list[str]) -> int:
    config = parse(NestedConfig, options, "rank nested")
    if config.out.exists():
        raise ConfigError(f"--out {config.out} exists already; choose another file, or remove it first")
    from dataclasses import replace

    from rankwise import atomic
    from rankwise.cli.paired_runs import PairedRuns
    from rankwise.lora.inject import inject_
    from rankwise.rank.nested import NestedEngine, losses_by_rank, nested_estimate, nested_ranks
    from rankwise.train.progress import Reporter

    reporter = Reporter()
    with reporter.stage(f"loading {config.model}"):
        runs = PairedRuns(config, config.r)
    ranks = nested_ranks(config.r)
    engine = runs.engine(config.seed)
    # lora_alpha / √r, see rankwise/rank/nested.py.
    inject_(engine.model, replace(runs.lora(config.r), use_rslora=True))
    with reporter.stage(f"training the ranks {', '.join(map(str, ranks))} at once"):
        runs.fit(NestedEngine(engine, ranks, config.seed), config.seed, 1.0)
    with reporter.stage("measuring every rank"):
        losses, counts = losses_by_rank(engine, runs.held_out, ranks)
    found = nested_estimate(losses, counts, config.seed)
    atomic.write_text(config.out, json.dumps(asdict(found) | {"settings": config.as_dict()}, indent=2) + "\n")
    print(found)
    return 0
