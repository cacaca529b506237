"""`rankwise rank sweep`"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from rankwise.cli.arguments import parse
from rankwise.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class SweepConfig(TrainConfig):
    """Train at several ranks with several seeds and say, with 95 % confidence, which rank suffices, or what it would
    take to tell. All other settings are those of rankwise train."""

    out: Path
    """Folder of the sweep; a sweep that was interrupted there goes on, with the same settings or with more seeds."""
    ranks: str = "1,2,4,8,16,32"
    """Ranks to compare; the largest is the reference."""
    seeds: int = 5
    """Runs at each rank; --seed is the first of the seeds and decides the held-out split for all of them."""
    delta: float | None = None
    """How much worse a rank may be than the largest, in nats; without it, 5 % of the largest rank's gain."""
    check_rates: bool = True
    """Try other learning rates at three ranks (about seven runs more), at all ranks if the three do not agree."""
    with_full: bool = False
    """Also train all of the model with every seed (its rate is a tenth, checked too), to compare with."""
    at_once: int | None = None
    """So many runs train in one pass over the base; without it, as many as make it faster. 1: one after the other."""
    r: tyro.conf.Suppress[int] = 8
    eval_answers: tyro.conf.Suppress[int] = 0

    def _problems(self):
        yield from super()._problems()
        try:
            if len(set(self.rank_list)) < 2 or min(self.rank_list) < 1:
                yield f"--ranks needs at least two different ranks from 1 on, found {self.ranks}"
        except ValueError:
            yield f"--ranks must be whole numbers with commas between them, found {self.ranks}"
        if self.seeds < 2:
            yield f"--seeds must be at least 2 (one says nothing on how much seeds differ), found {self.seeds}"
        if self.at_once is not None and self.at_once < 1:
            yield f"--at-once must be at least 1, found {self.at_once}"
        if self.delta is not None and not self.delta > 0:
            yield f"--delta must be above 0, found {self.delta}"

    @property
    def rank_list(self) -> list[int]:
        return [int(rank) for rank in self.ranks.split(",")]


def main(options: list[str]) -> int:
    config = parse(SweepConfig, options, "rank sweep")
    from functools import partial

    from rankwise import atomic
    from rankwise.cli.paired_runs import PairedRuns
    from rankwise.rank.report import as_dict, page, table
    from rankwise.rank.runs import Runs
    from rankwise.rank.sweep import sweep
    from rankwise.rank.verdict import notes, verdict
    from rankwise.train.progress import Reporter

    reporter = Reporter()
    settings = _settings(config)
    Runs(config.out, settings)  # A folder that cannot be used is found before a model is loaded.
    with reporter.stage(f"loading {config.model}"):
        run = PairedRuns(config, max(config.rank_list))
    at_once, reason = run.at_once(config.at_once)
    reporter.say(reason)
    found = sweep(
        run,
        config.rank_list,
        range(config.seed, config.seed + config.seeds),
        together=partial(run.together, at_once=at_once),
        margin=config.delta,
        with_full=config.with_full,
        check_rates=config.check_rates,
        folder=config.out,
        settings=settings,
        say=reporter.say,
    )
    atomic.write_text(config.out / "sweep.html", page(found, config.as_dict()))
    atomic.write_text(config.out / "sweep.json", json.dumps(as_dict(found)) + "\n")
    print(table(found), verdict(found), *(f"- {note}" for note in notes(found)), sep="\n\n", end="\n\n")
    print(f"page: {config.out / 'sweep.html'}")
    return 0


def _settings(config: SweepConfig) -> dict[str, Any]:
    """What decides the result of a single run: all settings but the number of seeds and the margin, and the data."""
    from rankwise.cli.paired_runs import rows_sha256

    settings = config.as_dict()
    for name in ("out", "seeds", "delta", "check_rates", "with_full", "at_once", "r", "eval_answers"):
        del settings[name]
    return settings | {"rows_sha256": rows_sha256(config)}
