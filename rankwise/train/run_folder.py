"""The folder of a run: run.yaml, metrics.jsonl, adapter/, checkpoints/, result.json and report.html."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from rankwise import atomic
from rankwise.errors import ConfigError
from rankwise.lora.checkpoint import save_adapter
from rankwise.models.adapted import LABELS_FILE
from rankwise.train.config import TrainConfig
from rankwise.train.loop import Step


class RunFolder:
    """Writes what a run leaves behind. Every file is replaced in one step, so a kill leaves the last good state."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if something lies at `path` already."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"--out {path} already holds something; choose another folder, or remove it first")
        self.path = path

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def start(self, config: TrainConfig) -> None:
        """Write run.yaml; `rankwise train --config run.yaml --out OTHER` repeats the run."""
        atomic.write_text(self.path / "run.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))

    def add_step(self, step: Step) -> None:
        """Add a line to metrics.jsonl."""
        try:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(step)) + "\n")
        except OSError as error:
            raise atomic.storage_error(self.path / "metrics.jsonl", error) or error from None

    def save_adapter(self, model: nn.Module, labels: list[str]) -> None:
        """Write adapter/, and for a classifier the labels' names beside it (the format has no place for them)."""
        _save(model, labels, self.adapter)

    def save_checkpoint(self, model: nn.Module, labels: list[str], step: int) -> None:
        """Write checkpoints/step-…/, an adapter folder, and remove the one before."""
        checkpoints = self.path / "checkpoints"
        newest = checkpoints / f"step-{step:06}"
        with atomic.replacing(newest) as temporary:
            _save(model, labels, temporary)
        for older in checkpoints.iterdir():
            if older != newest:
                shutil.rmtree(older)

    def finish(self, result: dict[str, Any], report: str) -> None:
        """Write report.html and, last of all, result.json."""
        atomic.write_text(self.path / "report.html", report)
        atomic.write_text(self.path / "result.json", json.dumps(result, indent=2) + "\n")


def _save(model: nn.Module, labels: list[str], folder: Path) -> None:
    if labels:
        atomic.write_text(folder / LABELS_FILE, json.dumps(labels, ensure_ascii=False, indent=1) + "\n")
    save_adapter(model, folder)
