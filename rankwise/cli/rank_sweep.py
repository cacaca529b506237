"""`rankwise rank sweep`"""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from rankwise.cli.arguments import parse
from rankwise.cli.rank_config import RankConfig
from rankwise.errors import CheckpointError, nearest
from rankwise.train.config import MOST_SEED

if TYPE_CHECKING:
    from rankwise.paired_runs import PairedRuns
    from rankwise.rank.illustrate import Illustrations
    from rankwise.rank.sweep import Sweep

SETTINGS: dict[str, Callable[[str], Any]] = {
    "lora_alpha": float,
    "lr": float,
    "target_modules": lambda names: tuple(sorted(names.split("+"))),
}
"""What --over may name, and how a value of it is read."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig(RankConfig):
    """Train at several ranks with several seeds and say, with 95 % confidence, which rank suffices, or what it would
    take to tell. All other settings are those of rankwise train."""

    out: Path
    """Folder of the sweep; a sweep that was interrupted there goes on, with the same settings or with more seeds."""
    ranks: str = "1,2,4,8,16,32"
    """Ranks to compare; the largest is the reference. With --over the one rank that trains."""
    over: str | None = None
    """Instead of ranks, compare values of lora_alpha, lr or target_modules, such as lora_alpha=32,8,16 or
    target_modules=all-linear,q_proj+v_proj; the first is the reference. Needs a single rank in --ranks."""
    seeds: int = 5
    """Runs at each rank; --seed is the first of the seeds and decides the held-out split for all of them."""
    delta: float | None = None
    """How much worse a rank may be than the largest, in nats; without it, 5 % of the largest rank's gain."""
    check_rates: bool = True
    """Try other learning rates at three ranks (about six runs more), at all ranks if no rate suits the three."""
    with_full: bool = False
    """Also train all of the model with every seed (its rate is a tenth, checked too), to compare with."""
    keep_adapters: bool = True
    """Keep the adapters of the first two seeds in adapters/, for use and for what the page shows of them."""
    at_once: int | None = None
    """So many runs train in one pass over the base; without it, as many as make it faster. 1: one after the other."""
    r: tyro.conf.Suppress[int] = 8

    def _problems(self):
        yield from super()._problems()
        try:
            ranks = set(self.rank_list)
            if self.over is None and (len(ranks) < 2 or min(ranks) < 1):
                yield f"--ranks needs at least two different ranks from 1 on, found {self.ranks}"
            if self.over is not None and (len(ranks) != 1 or min(ranks) < 1):
                yield f"--over compares at one rank; give it as --ranks, found {self.ranks}"
        except ValueError:
            yield f"--ranks must be whole numbers with commas between them, found {self.ranks}"
        if self.over is not None:
            yield from self._problems_of_over(*self.over.partition("=")[::2])
        if self.seeds < 2:
            yield f"--seeds must be at least 2 (one says nothing on how much seeds differ), found {self.seeds}"
        if self.seed <= MOST_SEED < self.seed + self.seeds - 1:
            yield f"the last seed, --seed + --seeds - 1, can be at most {MOST_SEED:,}"
        if self.at_once is not None and self.at_once < 1:
            yield f"--at-once must be at least 1, found {self.at_once}"
        if self.delta is not None and not 0 < self.delta < math.inf:
            yield f"--delta must be a finite number above 0, found {self.delta}"
        if self.with_full and self.base_dtype != "fp32":
            yield f"--with-full trains the weights themselves, which --base-dtype {self.base_dtype} keeps too coarse"

    def _problems_of_over(self, name: str, values: str):
        if name not in SETTINGS:
            yield f"--over must begin with {', '.join(SETTINGS)} and =, found {self.over!r}{nearest(name, SETTINGS)}"
        elif name != "target_modules" and not all(_is_positive(value) for value in values.split(",")):
            yield f"--over {name} needs finite numbers above 0, found {values}"
        elif len(set(map(SETTINGS[name], values.split(",")))) < max(2, len(values.split(","))):
            yield f"--over needs at least two values, all different, found {self.over}"
        if self.at_once not in (None, 1):
            yield "--at-once is for ranks; beside --over runs train one after the other"
        if self.with_full:
            yield "--with-full is compared with ranks; leave it out beside --over"

    @property
    def rank_list(self) -> list[int]:
        return [int(rank) for rank in self.ranks.split(",")]


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def main(options: list[str]) -> int:
    config = parse(SweepConfig, options, "rank sweep")
    from rankwise.paired_runs import PairedRuns
    from rankwise.rank.crossed import LEAST_EXAMPLES
    from rankwise.rank.illustrate import Illustrations
    from rankwise.rank.report import table
    from rankwise.rank.runs import DAY, check_folder
    from rankwise.rank.verdict import notes, verdict
    from rankwise.train.progress import Reporter

    reporter = Reporter()
    settings = _settings(config)
    check_folder(config.out, settings, partly=True)  # Before a model is loaded, whose weights are one more setting.
    adapters = config.out / "adapters" if config.keep_adapters and config.over is None else None
    with reporter.stage(f"loading {config.model}"):
        runs = PairedRuns(config, max(config.rank_list), adapters, LEAST_EXAMPLES, settings[DAY])
        settings["base_sha256"] = runs.base_sha256()
    found = _swept(config, runs, settings, reporter.say)
    print(table(found), verdict(found), *(f"- {note}" for note in notes(found)), sep="\n\n", end="\n\n")
    # Before anything is looked into that decides nothing, so that whatever happens there costs no result.
    _write(config, found, Illustrations())
    with reporter.stage("looking into the adapters"):
        illustrations = _illustrations(found, runs, reporter.say)
    _write(config, found, illustrations)
    print(f"page: {config.out / 'sweep.html'}")
    return 0


def _write(config: SweepConfig, found: "Sweep", illustrations: "Illustrations") -> None:
    from rankwise import atomic
    from rankwise.rank.page import page, picture
    from rankwise.rank.report import as_dict

    content = as_dict(found) | {"illustrations": asdict(illustrations)}
    atomic.write_text(config.out / "sweep.html", page(found, config.as_dict(), illustrations))
    atomic.write_text(config.out / "sweep.svg", picture(found))
    atomic.write_text(config.out / "sweep.json", json.dumps(content, allow_nan=False) + "\n")


def _swept(config: SweepConfig, runs: "PairedRuns", settings: dict[str, Any], say: Callable[[str], None]) -> "Sweep":
    from functools import partial

    from rankwise.paired_runs import SettingRuns
    from rankwise.rank.sweep import sweep, sweep_setting

    seeds = range(config.seed, config.seed + config.seeds)
    same: dict[str, Any] = {"margin": config.delta, "folder": config.out, "settings": settings, "say": say}
    if config.over is None:
        at_once, reason = runs.how_many_at_once(config.at_once)
        say(reason)
        same |= {"with_full": config.with_full, "check_rates": config.check_rates}
        return sweep(runs, config.rank_list, seeds, together=partial(runs.together, at_once=at_once), **same)
    name, _, values = config.over.partition("=")
    read = [SETTINGS[name](value) for value in values.split(",")]
    same |= {"check_rates": config.check_rates}
    return sweep_setting(SettingRuns(runs, name, read), name, values.split(","), seeds, **same)


def _illustrations(found: "Sweep", runs: "PairedRuns", say: Callable[[str], None]) -> "Illustrations":
    """Of the adapters that are kept."""
    from rankwise.rank.illustrate import Illustrations, adapter_name, illustrate

    folder = runs.adapters
    if folder is None:
        return Illustrations()
    _keep_chosen(found, runs, folder, say)
    largest = folder / adapter_name(found, found.comparisons.reference, found.seeds[0])
    cut_to = None
    if found.answers and largest.is_dir():
        with suppress(CheckpointError):  # `illustrate` reads it too, and says what is wrong with it.
            cut_to = runs.cut_ranks(largest, found.comparisons.margin)
    return illustrate(found, folder, cut_to, say)


def _keep_chosen(found: "Sweep", runs: "PairedRuns", folder: Path, say: Callable[[str], None]) -> None:
    """Leave the adapters of the chosen learning rates in `folder`.

    Those of other rates are removed. A missing one is trained again: its run may have been done without adapters being
    kept, or at a rate that another δ did not choose.
    """
    from rankwise.paired_runs import KEPT_SEEDS
    from rankwise.rank.illustrate import kept_runs

    kept = {key.name: key for key in kept_runs(found, KEPT_SEEDS)}
    for run in (folder.parent / "runs").glob("*.npz"):
        adapter = folder / run.stem
        if run.stem not in kept and adapter.is_dir() and not adapter.is_symlink():
            shutil.rmtree(adapter)
    for name, key in kept.items():
        if not (folder / name).is_dir():
            say(f"{folder / name} is not there; its run is done again for it")
            runs(key.rank, key.seed, key.factor)


def _settings(config: SweepConfig) -> dict[str, Any]:
    """What decides the result of a single run, but for the base's weights: all settings but the number of seeds and
    the margin, the data, and the day that a chat template may write."""
    from rankwise.finetune import rows_sha256
    from rankwise.rank.runs import DAY, day_of

    settings = config.as_dict()
    unimportant = ("out", "seeds", "delta", "check_rates", "with_full", "keep_adapters", "at_once", "r")
    for name in unimportant:
        del settings[name]
    return settings | {"rows_sha256": rows_sha256(config), DAY: day_of(config.out) or date.today().isoformat()}
