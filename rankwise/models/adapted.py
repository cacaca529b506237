"""A base model with an adapter folder on it, for everything that uses an adapter after training."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import ConfigError
from rankwise.lora.checkpoint import load_adapter_, read_adapter
from rankwise.lora.config import TaskType
from rankwise.models.load import load_model, load_tokenizer

LABELS_FILE = "labels.json"
TASK_TYPES = {
    "causal_lm": TaskType.CAUSAL_LM,
    "seq_cls": TaskType.SEQ_CLS,
    "embedding": TaskType.FEATURE_EXTRACTION,
    "seq2seq_lm": TaskType.SEQ_2_SEQ_LM,
}


@dataclass(frozen=True)
class Adapted:
    """A loaded model, with or without an adapter in it."""

    model: Any
    tokenizer: Any
    task: str
    labels: list[str]


def load_adapted(base: str | None, adapter: Path | None, task: str | None = None) -> Adapted:
    """Load `base` and put `adapter` (its folder, or its run's folder) on it, if given.

    Without `base` or `task`, the adapter's own notes of its base model and its task are used; a base model alone
    answers prompts.
    Raises ConfigError, ModelError, CheckpointError.
    """
    if adapter is None:
        if base is None:
            raise ConfigError("give a base model with --model, an adapter with --adapter, or both")
        if task == "seq_cls":
            raise ConfigError("--task seq_cls needs an --adapter, which holds the names of the labels")
        task = task or "causal_lm"
        return Adapted(load_model(base, task), load_tokenizer(base), task, [])
    folder = adapter_folder(adapter)
    config = read_adapter(folder).config
    base = base or config.base_model_name_or_path
    if base is None:
        raise ConfigError(f"the adapter in {folder} does not say what its base model is; give it with --model")
    noted = config.task_type or TaskType.CAUSAL_LM
    task = task or next((task for task, kind in TASK_TYPES.items() if kind == noted), None)
    if task is None:
        raise ConfigError(f"the adapter in {folder} is for {config.task_type}, which this command does not serve")
    labels = read_labels(folder) if task == "seq_cls" else []
    model = load_model(base, task, labels)
    load_adapter_(model, folder)
    return Adapted(model, load_tokenizer(base), task, labels)


def adapter_folder(path: Path) -> Path:
    """The adapter's folder, where `path` is that or the folder of the run that made it."""
    return path / "adapter" if (path / "adapter").is_dir() else path


def read_labels(adapter: Path) -> list[str]:
    """The labels' names of a classifier's adapter folder; raises ConfigError if they are not there."""
    path = adapter / LABELS_FILE
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(
            f"{path} is missing or damaged; it holds the names of the labels, as a JSON list in the order of the "
            "classifier's outputs. Write it, or give the adapter folder of a rankwise run"
        ) from None
    return [str(label) for label in labels]
