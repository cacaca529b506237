"""All that a run needs in order to go on as if nothing had happened, as safetensors and JSON: no pickle.

The batches need no state: they follow from the settings and the number of steps done (train/batches.py).
"""

import json
from math import inf
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise.errors import CheckpointError
from rankwise.train.loop import Training
from rankwise.train.random_state import random_state, set_random_state
from rankwise.train.watch import Watch, set_values_

TENSORS_FILE, NUMBERS_FILE = "state.safetensors", "state.json"


def save_state(training: Training, watch: Watch, folder: Path) -> None:
    """Write the trained numbers as they are, the optimiser, the schedule, the random states and the best adapter."""
    optimizer = training.optimizer.state_dict()
    tensors = {
        **_numbered("trained", training.parameters),
        **_numbered("best", watch.best),
        **{f"random.{name}": state for name, state in random_state().items()},
    }
    other: dict[str, dict[str, Any]] = {}
    for index, values in optimizer["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                other.setdefault(str(index), {})[name] = value
    numbers = {
        "step": training.done,
        "seconds": training.seconds,
        "schedule": training.schedule.state_dict(),
        "optimizer": {"param_groups": optimizer["param_groups"], "state": other},
        "watch": {"best_step": watch.best_step, "waited": watch.waited},
    }
    if watch.best:
        # JSON knows no infinity, which the best loss is before there is one.
        numbers["watch"]["best_loss"] = watch.best_loss
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS_FILE)
    (folder / NUMBERS_FILE).write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load_state(training: Training, watch: Watch, folder: Path) -> None:
    """Bring a new run of the same settings to where the saved one was.

    Raises CheckpointError if the state belongs to another adapter; nothing is changed then.
    """
    tensors = load_file(folder / TENSORS_FILE)
    numbers = json.loads((folder / NUMBERS_FILE).read_text(encoding="utf-8"))
    trained, best = (_list(tensors, name) for name in ("trained", "best"))
    if [value.shape for value in trained] != [parameter.shape for parameter in training.parameters]:
        raise CheckpointError(f"{folder} holds the state of another adapter; was it made by another rankwise version?")
    set_values_(training.parameters, trained)
    state: dict[int, dict[str, Any]] = {int(index): other for index, other in numbers["optimizer"]["state"].items()}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            # A copy, because the file's own memory need not lie where the arithmetic is fastest.
            state.setdefault(int(index), {})[key] = tensor.clone()
    training.optimizer.load_state_dict({"state": state, "param_groups": numbers["optimizer"]["param_groups"]})
    training.schedule.load_state_dict(numbers["schedule"])
    training.done, training.seconds = numbers["step"], numbers["seconds"]
    watch.best = [value.to(p.device) for value, p in zip(best, training.parameters, strict=False)]
    watch.best_loss = numbers["watch"].get("best_loss", inf)
    watch.best_step, watch.waited = numbers["watch"]["best_step"], numbers["watch"]["waited"]
    set_random_state({name.removeprefix("random."): t for name, t in tensors.items() if name.startswith("random.")})


def _numbered(kind: str, tensors: Any) -> dict[str, Tensor]:
    return {f"{kind}.{index}": tensor for index, tensor in enumerate(tensors)}


def _list(tensors: dict[str, Tensor], kind: str) -> list[Tensor]:
    """The tensors of a kind in the order that `_numbered` gave them."""
    return [tensors[f"{kind}.{index}"] for index in range(sum(name.startswith(f"{kind}.") for name in tensors))]
