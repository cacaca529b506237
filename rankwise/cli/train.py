"""`rankwise train`"""

import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankwise.cli.arguments import parse, without
from rankwise.errors import ConfigError
from rankwise.train.config import TrainConfig

PRINT_CONFIG = "--print-config"


def main(options: list[str]) -> int:
    """Returns the exit code: 0, or 128 + the number of the signal that ended the run (Ctrl-C: 130, SIGTERM: 143)."""
    runs, flags = without("--resume", "the folder of a run", options)
    if len(runs) > 1:
        raise ConfigError(f"--resume goes on with one run, found {', '.join(map(str, runs))}")
    if runs and any(flag.partition("=")[0] == "--out" for flag in flags):
        raise ConfigError("--resume goes on in the run's own folder; leave --out out")
    for run in runs:
        if not (run / "run.yaml").is_file():
            raise ConfigError(f"{run} holds no run to resume: there is no run.yaml in it")
        flags = ["--config", str(run / "run.yaml"), *flags]
    print_config = PRINT_CONFIG in flags
    config = parse(TrainConfig, [flag for flag in flags if flag != PRINT_CONFIG], "train")
    if print_config:
        print(config.as_yaml(), end="")
        return 0
    from rankwise.finetune import finetune
    from rankwise.train.progress import let_go_unread

    result = finetune(replace(config, out=runs[0]) if runs else config, resume=bool(runs))
    try:
        _print(runs[0] if runs else config.out, result)
        sys.stdout.flush()
    except BrokenPipeError:
        let_go_unread(sys.stdout)  # Nobody reads it; how the run ended is still to be told.
    return 128 + signal.Signals[result["signal"] or "SIGINT"] if result["interrupted"] else 0


def _print(out: Path, result: dict[str, Any]) -> None:
    from rankwise.train.report import changes

    print(f"adapter: {out / 'adapter'} (after step {result['adapter_step']})")
    if result["shrunk"] is not None:
        print(_cut(out, result["shrunk"]))
    if result["eval_loss_after"] is not None:
        for name, change in changes(result).items():
            print(f"{name}: {change}")
    speed = result["useful_tokens_per_second"] or 0
    print(
        f"{result['steps']} steps in {result['seconds']:.0f} s, {speed:.0f} useful tokens/s, "
        f"peak memory {result['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    print(_prediction(result))
    unchanged = result["base_sha256_before"] == result["base_sha256_after"]
    print("base weights: unchanged" if unchanged else "base weights: CHANGED, please report this")
    if result["interrupted"]:
        print(f"interrupted; to go on: rankwise train --resume {out}")


def _cut(out: Path, shrunk: dict[str, Any]) -> str:
    """What --r auto made of the adapter, on the rows by which no rank was chosen."""
    before, after = (sum(shrunk[f"ranks_{when}"].values()) for when in ("before", "after"))
    return (
        f"cut: total rank {before:,} → {after:,}, {shrunk['parameters_before']:,} → {shrunk['parameters_after']:,} "
        f"numbers; held-out loss {shrunk['loss_full']:.4f} → {shrunk['loss_shrunk']:.4f} on "
        f"{shrunk['rows']['confirmation']} rows that chose no rank; uncut: {out / 'adapter-full'}"
    )


def _prediction(result: dict[str, Any]) -> str:
    """What `rankwise plan` said of the run before it began."""
    memory, seconds = result["predicted_peak_memory_bytes"], result["predicted_seconds"]
    if memory is None:
        return "predicted before: nothing, since `rankwise plan` does not know this model or these targets"
    time = f"{seconds:.0f} s" if seconds else "no time (`rankwise plan` measures this machine once)"
    return f"predicted before: {time}, peak memory {memory / 1e9:.2f} GB"
