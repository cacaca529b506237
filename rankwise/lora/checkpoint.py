"""Adapters on disk, in the folder format of PEFT: written here they load there, and the other way round."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankwise import atomic
from rankwise.errors import CheckpointError, RankwiseError, listing, nearest
from rankwise.lora import format
from rankwise.lora.base_weight import is_conv1d
from rankwise.lora.config import LoraConfig
from rankwise.lora.inject import (
    InjectReport,
    inject_,
    injection,
    named_lora_layers,
    named_wrappers,
    plan_injection,
)
from rankwise.lora.layers import LoraEmbedding, LoraLayer
from rankwise.lora.low_rank import LowRank
from rankwise.lora.targets import shortest_names


@dataclass(frozen=True)
class Adapter:
    """An adapter as it lies on disk; no model is needed to read it."""

    config: LoraConfig
    low_rank: dict[str, LowRank]
    """The update of each adapted module, by its name in the base model."""
    heads: dict[str, Tensor]
    """Parameters of the modules that are trained in full, by name, and base weights that PEFT stored beside them."""


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapter in `model` to `folder` as adapter_config.json and adapter_model.safetensors (PEFT's format).

    The same adapter gives the same bytes. A file is replaced in one step, so a kill leaves the old one or the new one.
    Returns the folder. Raises ConfigError if the model carries no adapter, StorageError if it cannot be written.
    """
    folder = Path(folder)
    injected = injection(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in named_wrappers(model):
        if isinstance(layer, LoraLayer):
            end_A, end_B = format.FACTORS[isinstance(layer, LoraEmbedding)]
            tensors[f"{name}.{end_A}"], tensors[f"{name}.{end_B}"] = layer.lora_A, layer.lora_B
        else:
            tensors |= {f"{name}.{key}": tensor for key, tensor in layer.trained.state_dict().items()}
    stored = {
        format.PREFIX + key: tensor.detach().cpu().contiguous().clone() for key, tensor in sorted(tensors.items())
    }
    layers = named_lora_layers(model)
    adapted = {name for name, _ in layers}
    others = [name for name, _ in model.named_modules() if name not in adapted]
    settings = format.to_settings(
        injected.config,
        shortest_names(adapted, others),
        all(is_conv1d(layer.base) for _, layer in layers),
    )
    with atomic.replacing(folder / format.WEIGHTS_FILE) as temporary:
        save_file(stored, temporary, metadata={"format": "pt"})
    atomic.write_text(folder / format.CONFIG_FILE, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return folder


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder without a model.

    Raises CheckpointError, with every problem at once, if files are missing or damaged, if a setting is not supported,
    if A or B of a module is missing, has another rank than r or a value that is not finite; and for pickle files.
    """
    folder = Path(folder)
    config, tensors, problems = _read_files(folder, trainable=False)
    low_rank, heads = _sort_tensors(config, tensors, problems)
    _raise_if(problems, folder)
    return Adapter(config, low_rank, heads)


def load_adapter_(model: nn.Module, folder: str | Path, trainable: bool = False) -> InjectReport:
    """Put the adapter in `folder` into `model`, in place; it is frozen unless `trainable`.

    Strict both ways: every tensor of the file must land in the model and every parameter of the adapter must arrive.
    Returns the report of what is adapted. Raises CheckpointError, with every problem in one message, and leaves the
    model as it was.
    """
    folder = Path(folder)
    config, tensors, problems = _read_files(folder, trainable)
    _sort_tensors(config, tensors, problems)
    try:
        plan = plan_injection(model, config)
    except RankwiseError as error:
        _raise_if([*problems, f"it was made for another model: {error}"], folder)
        raise
    expected = _expected_shapes(model, plan)
    problems += _mismatches(expected, tensors, model)
    _raise_if(problems, folder)
    inject_(model, config)
    _copy_into(model, tensors)
    return plan


def _read_files(folder: Path, trainable: bool) -> tuple[LoraConfig, dict[str, Tensor], list[str]]:
    """The configuration, the tensors by name in the base model, and what is wrong with them."""
    if not folder.is_dir():
        raise CheckpointError(f"no adapter folder at {folder}")
    weights, settings_file = folder / format.WEIGHTS_FILE, folder / format.CONFIG_FILE
    problems = [f"{path.name} is missing" for path in (settings_file, weights) if not path.is_file()]
    if not weights.is_file() and (folder / format.PICKLE_FILE).is_file():
        problems = [
            f"{format.PICKLE_FILE} is a pickle file, which can run any code when it is read, and is refused; "
            "save the adapter again as safetensors (PEFT: save_pretrained with safe_serialization=True)"
        ]
    config, tensors = None, {}
    if settings_file.is_file():
        try:
            config = format.from_settings(_json_object(settings_file), trainable)
        except CheckpointError as error:
            problems += [f"{settings_file.name}: {line}" for line in str(error).splitlines()]
    if weights.is_file():
        try:
            with safe_open(weights, framework="pt") as file:
                names = file.keys()
                tensors = {name.removeprefix(format.PREFIX): file.get_tensor(name) for name in names}
        except SafetensorError as error:
            problems.append(f"{weights.name} is damaged or not a safetensors file: {error}")
    if config is None or not weights.is_file() or (not tensors and problems):
        _raise_if(problems, folder)
    assert config is not None
    return config, tensors, problems


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"must hold an object, found {type(value).__name__}")
    return value


def _sort_tensors(
    config: LoraConfig, tensors: dict[str, Tensor], problems: list[str]
) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """Pair the factors of each module; notes what is wrong with the file by itself in `problems`."""
    low_rank, rest = {}, dict(tensors)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            problems.append(f"{name}: {count:,} of {tensor.numel():,} values are not finite (NaN or infinite)")
    for end_A, end_B in format.FACTORS.values():
        for name in [name for name in tensors if name.endswith("." + end_A)]:
            module = name.removesuffix("." + end_A)
            A, B = rest.pop(name), rest.pop(f"{module}.{end_B}", None)
            if B is not None and A.ndim == B.ndim == 2:
                low_rank[module] = LowRank(A, B, config.scale)
                if A.shape[0] != config.r or B.shape[1] != config.r:
                    problems.append(f"{module}: r is {config.r}, found A {list(A.shape)} and B {list(B.shape)}")
            else:
                problems.append(f"{module}.{end_B}: missing or not a matrix")
    return low_rank, rest


def _expected_shapes(model: nn.Module, plan: InjectReport) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for m in plan.matrices:
        end_A, end_B = format.FACTORS[isinstance(model.get_submodule(m.name), nn.Embedding)]
        shapes[f"{m.name}.{end_A}"], shapes[f"{m.name}.{end_B}"] = (m.r, m.k), (m.d, m.r)
    for head in plan.heads:
        shapes |= {f"{head}.{key}": tuple(t.shape) for key, t in model.get_submodule(head).state_dict().items()}
    return shapes


def _mismatches(expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor], model: nn.Module) -> list[str]:
    problems = []
    for name, shape in expected.items():
        if name not in tensors:
            problems.append(f"{name}: missing from the file")
        elif tuple(tensors[name].shape) != shape:
            problems.append(f"{name}: the model needs {list(shape)}, the file holds {list(tensors[name].shape)}")
    for name in tensors.keys() - expected.keys():
        if not _is_unchanged_base_weight(name, tensors[name], model):
            problems.append(f"{name}: the model has no place for it{nearest(name, expected)}")
    return sorted(problems)


def _is_unchanged_base_weight(name: str, tensor: Tensor, model: nn.Module) -> bool:
    """PEFT stores an adapted embedding's base weight beside the adapter; it must be the one of this model."""
    module, _, parameter = name.rpartition(".base_layer.")
    if not module:
        return False
    own = model.state_dict().get(f"{module}.{parameter}")
    return own is not None and torch.equal(own.cpu().to(tensor.dtype), tensor)


@torch.no_grad()
def _copy_into(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, layer in named_wrappers(model):
        if isinstance(layer, LoraLayer):
            end_A, end_B = format.FACTORS[isinstance(layer, LoraEmbedding)]
            layer.lora_A.copy_(tensors[f"{name}.{end_A}"])
            layer.lora_B.copy_(tensors[f"{name}.{end_B}"])
        else:
            layer.trained.load_state_dict({key: tensors[f"{name}.{key}"] for key in layer.trained.state_dict()})


def _raise_if(problems: list[str], folder: Path) -> None:
    if problems:
        raise CheckpointError(f"the adapter in {folder} cannot be used:\n{listing(problems, most=20)}")
