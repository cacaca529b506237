"""What a run found out before its first step: a resumed run must find the same, and need not measure it again."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rankwise.data.files import Row
from rankwise.errors import ConfigError, listing
from rankwise.train.config import TrainConfig

_PATH_SETTINGS = ("out", "data", "eval_data", "model")
"""Settings that say where something lies."""


@dataclass(frozen=True)
class Start:
    """The content of start.json."""

    data_sha256: str
    """Of all rows, the held-out ones too, and of the tokenizer that makes tokens of them."""
    base_sha256: str
    learning_rate: float
    """The highest, as it was given, ruled or found."""
    directory: str
    """The working directory, from which the settings' relative paths are seen."""
    settings: dict[str, Any]
    """`settings_of` the run."""
    day: str
    """On which it began, as 2026-01-31: today for chat templates that write the date, when it is resumed too."""

    def check_settings(self, config: TrainConfig, file: Path) -> None:
        """Raise ConfigError if a run to be resumed has other settings than it began with.

        `file`: its run.yaml, which the message names for what was changed there.
        """
        now, written = settings_of(config), yaml.safe_load(file.read_text(encoding="utf-8"))
        edited, given = [], []
        for name, began in self.settings.items():
            if now.get(name) != began:
                was, value = f"{name}: the run began with {json.dumps(began)}", json.dumps(now.get(name))
                if name in written and written[name] == began:
                    given.append(f"{was}, given {value}")
                else:
                    edited.append(f"{was}, {file.name} now says {value}")
        if edited or given:
            advice = [f"mend {file}"] * bool(edited) + ["leave out what is given beside --resume"] * bool(given)
            raise ConfigError(
                "a run is resumed with the settings that it began with, and these are others:\n"
                f"{listing(edited + given)}\nTo go on, {' and '.join(advice)}; or begin a new run in another --out"
            )

    def check(self, data_sha256: str, base_sha256: str) -> None:
        """Raise ConfigError if a run to be resumed has other data or another base model than it began with."""
        problems = []
        if data_sha256 != self.data_sha256:
            problems.append("the data are not those that the run began with (their rows, or the tokenizer, changed)")
        if base_sha256 != self.base_sha256:
            problems.append(
                f"the base model's weights are not those that the run began with (SHA-256 {base_sha256[:12]}…, "
                f"found {self.base_sha256[:12]}… in start.json)"
            )
        if problems:
            raise ConfigError(
                f"this run cannot be resumed:\n{listing(problems)}\nBring back what it began with, or begin a new run"
            )


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """The settings that a run keeps to its end: all but where its folder, data and base lie, which may be moved."""
    return {name: value for name, value in config.as_dict().items() if name not in _PATH_SETTINGS}


def data_sha256(tokenizer: Any, *sides: Sequence[Row]) -> str:
    """SHA-256 of rows, in their order, and of the tokenizer with its chat template. What JSON lacks counts as text."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    digest = hashlib.sha256(f"{backend}\n{tokenizer.chat_template}\n".encode())
    for rows in sides:
        digest.update(f"{len(rows)} rows\n".encode())
        for row in rows:
            digest.update(json.dumps(row.fields, default=str).encode())
    return digest.hexdigest()
