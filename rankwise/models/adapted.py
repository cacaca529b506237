"""A base model with an adapter folder on it, for everything that uses an adapter after training."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rankwise import atomic
from rankwise.data.labelled import ONE_LABEL, SEVERAL_LABELS
from rankwise.data.shapes import LABELLED, TASK_TYPES
from rankwise.errors import ConfigError
from rankwise.lora.checkpoint import load_adapter_, read_stored
from rankwise.lora.config import TaskType
from rankwise.models.load import base_config, load_model, load_tokenizer
from rankwise.models.locate import config_file

LABELS_FILE = "labels.json"


@dataclass(frozen=True)
class Adapted:
    """A loaded model, with or without an adapter in it."""

    model: Any
    tokenizer: Any
    task: str
    labels: list[str]


def load_adapted(base: str | None, adapter: Path | None, task: str | None = None, base_dtype: str = "fp32") -> Adapted:
    """Load `base` (`base_dtype` as in load_model) and put `adapter` (its folder, or its run's folder) on it, if given.

    Without `base` or `task`, the adapter's own notes of its base model and its task are used; a base model alone
    answers prompts.
    Raises ConfigError, ModelError, CheckpointError.
    """
    if adapter is None:
        if base is None:
            raise ConfigError("give a base model with --model, an adapter with --adapter, or both")
        task = task or "causal_lm"
        labels, problem_type = own_labels(base) if task in LABELLED else ([], None)
        model = load_model(base, task, labels, problem_type, base_dtype)
        return Adapted(model, load_tokenizer(base), task, labels)
    folder = adapter_folder(adapter)
    config = read_stored(folder).config
    base = base or config.base_model_name_or_path
    if base is None:
        raise ConfigError(f"the adapter in {folder} does not say what its base model is; give it with --model")
    noted = config.task_type or TaskType.CAUSAL_LM
    task = task or next((task for task, kind in TASK_TYPES.items() if kind == noted), None)
    if task is None:
        raise ConfigError(f"the adapter in {folder} is for {config.task_type}, which this command does not serve")
    labels, problem_type = read_labels(folder) if task in LABELLED else ([], None)
    model = load_model(base, task, labels, problem_type if task == "seq_cls" else None, base_dtype)
    load_adapter_(model, folder)
    return Adapted(model, load_tokenizer(base), task, labels)


def adapter_folder(path: Path) -> Path:
    """The adapter's folder, where `path` is that or the folder of the run that made it."""
    return path / "adapter" if (path / "adapter").is_dir() else path


def label_names(config: Any) -> list[str]:
    """A classifier's labels, in the order of its outputs."""
    names = config.id2label
    return [str(names[number]) for number in range(len(names))]


def renew_head_(model: Any, base: str) -> bool:
    """Draw the layer anew that gives the classes, if `base` trained it for other labels, or for the same in another
    order; whether that was so.

    transformers keeps it where its size fits. It is drawn from torch's global generator.
    """
    config, labels = base_config(base), label_names(model.config)
    if type(model).__name__ not in (config.architectures or ()):
        return False
    # LABEL_0 is transformers' name for a label that was given none.
    if label_names(config) in (labels, [f"LABEL_{label}" for label in labels]):
        return False
    for name, layer in model.named_modules():
        within = name.startswith(f"{model.base_model_prefix}.")
        if isinstance(layer, nn.Linear) and layer.out_features == len(labels) and not within:
            for parameter in layer.parameters():
                vars(parameter)["_is_hf_initialized"] = False
            model._init_weights(layer)
    return True


def own_labels(base: str) -> tuple[list[str], str | None]:
    """(the labels' names in a classifier's config.json, how many a text may have); as a merged adapter leaves it.

    Raises ConfigError if no names stand there, as in a model that is no classifier, or one without its training.
    """
    settings = json.loads(config_file(base).read_text(encoding="utf-8"))
    names = settings.get("id2label") or {}
    labels = [str(names.get(str(number))) for number in range(len(names))]
    if not labels or labels == [f"LABEL_{number}" for number in range(len(labels))]:
        raise ConfigError(
            f"{base} names no labels in its config.json (id2label); give an --adapter, which has them, or a classifier"
        )
    return labels, settings.get("problem_type")


def write_labels(model: Any, task: str, adapter: Path) -> None:
    """Write the label names of a model for such a task, if it has any, into its adapter folder, whose format has no
    place for them.

    A JSON list in the order of the outputs; where a text may have several labels, an object with that list and
    transformers' word for it.
    """
    if task not in LABELLED:
        return
    labels, several = label_names(model.config), model.config.problem_type == SEVERAL_LABELS
    content = {"problem_type": SEVERAL_LABELS, "labels": labels} if several else labels
    atomic.write_text(adapter / LABELS_FILE, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def read_labels(adapter: Path) -> tuple[list[str], str]:
    """(the labels' names of a classifier's adapter folder, how many a text may have in transformers' words).

    Raises ConfigError if they are not there."""
    path = adapter / LABELS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        several = isinstance(content, dict)
        labels = [str(label) for label in (content["labels"] if several else content)]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path} is missing or damaged; it holds the names of the labels, as a JSON list in the order of the "
            "classifier's outputs. Write it, or give the adapter folder of a rankwise run"
        ) from None
    return labels, SEVERAL_LABELS if several else ONE_LABEL
