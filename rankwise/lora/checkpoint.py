"""Adapters on disk, in the folder format of PEFT: written here they load there, and the other way round."""

import json
import sys
from collections.abc import Container, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from safetensors.torch import save_file
from torch import Tensor, nn

from rankwise import atomic
from rankwise.errors import CheckpointError, ConfigError, RankwiseError, listing, nearest
from rankwise.lora import format
from rankwise.lora.adapters import adapter_names, check_names, check_unmerged, delete_adapter_
from rankwise.lora.base_weight import is_conv1d, is_offloaded
from rankwise.lora.config import LoraConfig, matches_name
from rankwise.lora.convolution import MIXES, LoraConv, as_matrices, by_group
from rankwise.lora.inject import DEFAULT_ADAPTER, check_free, inject_unset_, injection, set_active
from rankwise.lora.layers import LoraLayer
from rankwise.lora.low_rank import LowRank
from rankwise.lora.places import named_base_modules, named_lora_layers, named_places, named_wrappers
from rankwise.lora.repeated import is_of_base, is_repeated
from rankwise.lora.report import InjectReport
from rankwise.lora.targets import shortest_names
from rankwise.lora.update import whole
from rankwise.lora.wrapper import Wrapper

_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Adapter:
    """An adapter as it lies on disk; no model is needed to read it."""

    config: LoraConfig
    low_rank: dict[str, LowRank]
    """The update of each adapted module, by its name in the base model; a convolution's kernel is flattened into k.

    Where a convolution has groups, B holds each group's share of the rank in columns of its own.
    """
    rest: dict[str, Tensor]
    """Everything else by its name in the file: modules trained in full, magnitudes, biases, rows of embeddings, the
    stacked updates of experts, and base weights that PEFT stored beside them."""


def save_adapter(model: nn.Module, folder: str | Path, adapter: str | None = None) -> Path:
    """Write an adapter of `model` to `folder` as adapter_config.json and adapter_model.safetensors (PEFT's format).

    `adapter` may be left out if there is only one. The same adapter gives the same bytes. A file is replaced in one
    step, so a kill leaves the old one or the new one; nothing waits for the disk. An adapter that started from a part
    of the base (PiSSA, OLoRA, …) is written as plain LoRA of twice the rank, which any reader of the format can use on
    the original base.
    Under FSDP2 every process must call this, each with a folder of its own or all but one with one to throw away.
    Returns the folder. Raises ConfigError if the model carries no such adapter, StorageError if it cannot be written.
    """
    folder = Path(folder)
    injected = injection(model)
    if adapter is None and len(injected.configs) > 1:
        raise ConfigError(f"which adapter? This model carries {', '.join(injected.configs)}")
    adapter = adapter or next(iter(injected.configs))
    check_names(model, [adapter])
    places = named_places(model)
    wrappers = [(name, found) for name, found in places if isinstance(found, Wrapper)]
    layers = {name: layer for name, layer in wrappers if isinstance(layer, LoraLayer) and adapter in layer.shares}
    with torch.no_grad():
        tensors = _slots(model, adapter, wrappers, stored=True)
        stored = {format.PREFIX + key: whole(tensor).cpu().contiguous() for key, tensor in sorted(tensors.items())}
    others = [name for name, _ in places if name not in layers]
    targets = [name for name, layer in layers.items() if not layer.inside_attention]
    settings = format.to_settings(
        injected.configs[adapter],
        shortest_names(targets, others),
        bool(layers) and all(is_conv1d(layer.base) for layer in layers.values()),
        # The second half is the start, subtracted.
        doubled=any(layer.update(adapter).has_start for layer in layers.values()),
    )
    with atomic.replacing(folder / format.WEIGHTS_FILE, to_disk=False) as temporary:
        _write_tensors(temporary, stored)
    # Sorted, but not what is in them: of the keys of a pattern, the first that matches counts.
    text = json.dumps(dict(sorted(settings.items())), indent=2) + "\n"
    atomic.write_text(folder / format.CONFIG_FILE, text, to_disk=False)
    return folder


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write dense, contiguous tensors in main memory, straight from there; the bytes are those of save_file.

    save_file takes 2.5 times as long for the tensors of an adapter: most of it goes into checks that these pass.
    """
    if sys.byteorder == "big":  # The format has the bytes in the other order.
        save_file(tensors, path, metadata=_METADATA)
        return
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tensor.shape,
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in tensors.items()
    }
    serialize_file(specs, path, metadata=_METADATA)


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder without a model.

    Raises CheckpointError, with every problem at once, if files are missing or damaged, if a setting is not supported,
    if A or B of a module is missing, has another rank than its own or a value that is not finite; for pickle files; and
    for an adapter that can only be read beside its base.
    """
    adapter = read_stored(folder)
    if isinstance(adapter.config.init_lora_weights, str):
        reason = (
            f"init_lora_weights = {adapter.config.init_lora_weights!r} took a part of the base away, so what the "
            "adapter adds can only be told beside its base: give that with --model (in Python: load_adapter_)"
        )
        raise CheckpointError(_message([reason], Path(folder)))
    return adapter


def read_stored(folder: str | Path) -> Adapter:
    """As `read_adapter`, but also of an adapter that needs its base: A and B are then those of the file, from which the
    start is yet to be subtracted."""
    folder = Path(folder)
    config, tensors, problems = _read_files(folder, trainable=False)
    low_rank, rest = _sort_tensors(config, tensors, problems)
    _raise_if(problems, folder)
    return Adapter(config, low_rank, rest)


def load_adapter_(
    model: nn.Module, folder: str | Path, trainable: bool = False, adapter: str = DEFAULT_ADAPTER
) -> InjectReport:
    """Put the adapter in `folder` into `model`, in place, and let it work; it is frozen unless `trainable`.

    Strict both ways: every tensor of the file must land in the model and every parameter of the adapter must arrive.
    Returns the report of what is adapted. Raises CheckpointError, with every problem in one message, and ConfigError
    for a name that is taken; the model is then as it was.
    """
    folder = Path(folder)
    check_free(model, adapter)
    if any(p.is_meta for m in model.modules() if not is_offloaded(m) for p in m.parameters(recurse=False)):
        raise ConfigError("this model has no values yet (meta device), so an adapter's cannot be put in; load it first")
    config, tensors, problems = _read_files(folder, trainable)
    _sort_tensors(config, tensors, problems)
    before = dict(injection(model).active) if adapter_names(model) else {}
    try:
        report = inject_unset_(model, config, adapter, _largest_rank(tensors))
    except RankwiseError as error:
        reason = f"it was made for another model: {error}"
        raise CheckpointError(_message([*problems, reason], folder)) from error
    wrappers = named_wrappers(model)
    problems += _separate_groups(wrappers, adapter, tensors)
    slots = _slots(model, adapter, wrappers)
    problems += _mismatches(slots, tensors, model, adapter)
    if problems:
        delete_adapter_(model, adapter)
        if before:
            set_active(model, before)
        _raise_if(problems, folder)
    with torch.no_grad():
        for name, slot in slots.items():
            slot.copy_(tensors[name])
    return report


def swap_adapter_(model: nn.Module, folder: str | Path, adapter: str = DEFAULT_ADAPTER) -> None:
    """Let an adapter of the model take the values of the one in `folder`, in place: torch.compile need not run again.

    The model computes what it would with the adapter in `folder` loaded. That may have other ranks up to those here
    (the rest is filled with zeros), another lora_alpha (B takes up the difference), and may leave modules out.
    Raises CheckpointError, with every problem in one message, if it does not fit; the model is then as it was.
    """
    folder = Path(folder)
    check_names(model, [adapter])
    check_unmerged(model, adapter)
    own = injection(model).configs[adapter]
    config, tensors, problems = _read_files(folder, trainable=not own.inference_mode)
    low_rank, rest = _sort_tensors(config, tensors, problems)
    layers = {name: layer for name, layer in named_lora_layers(model) if adapter in layer.shares}
    updates = {name: layer.update(adapter) for name, layer in layers.items()}
    if isinstance(config.init_lora_weights, str) or any(update.has_start for update in updates.values()):
        problems.append("a start that takes a part of the base away (PiSSA, OLoRA) cannot be swapped in or out")
    problems += [f"{name}: there is no place for it in the model" for name in sorted(rest)]
    factors = {id(p) for name, u in updates.items() if layers[name].is_module for p in (u.lora_A, u.lora_B)}
    slots = _slots(model, adapter, named_wrappers(model))
    if others := sorted(key for key, slot in slots.items() if id(slot) not in factors):
        problems.append(f"the model's adapter trains more than low-rank updates: {', '.join(others[:5])}")
    forms, own_forms = format.forms(tensors), format.forms(slots)
    for name, found in low_rank.items():
        update = updates.get(name)
        if update is None:
            problems.append(f"{name}: the model's adapter does not adapt it{nearest(name, updates)}")
        elif layers[name].is_module and layers[name].groups == 1 and forms[name] != own_forms[name]:
            problems.append(f"{name}: the model needs {own_forms[name]}, the file holds {forms[name]}")
        elif 1 < layers[name].groups == found.shape[1] / update.lora_A[0].numel():
            problems.append(f"{name}: {MIXES}; load it under a name of its own (load_adapter_)")
        elif found.shape != update.low_rank().shape:
            problems.append(
                f"{name}: the model needs {list(update.low_rank().shape)}, the file holds {list(found.shape)}"
            )
        elif found.rank > update.r:
            problems.append(f"{name}: rank {found.rank} does not fit into rank {update.r}")
    _raise_if(problems, folder)
    with torch.no_grad():
        for name, update in updates.items():
            groups = layers[name].groups
            A = update.lora_A.view(groups, update.r // groups, -1)
            B = update.lora_B.view(groups, -1, update.r // groups)
            A.zero_()
            B.zero_()
            if name in low_rank:
                found = low_rank[name]
                rank = found.rank // groups
                A[:, :rank] = found.A.view(groups, rank, -1)
                B[:, :, :rank] = by_group(found.B, groups) * (found.scale / update.scale)


def _slots(
    model: nn.Module, adapter: str, wrappers: Sequence[tuple[str, Wrapper]], stored: bool = False
) -> dict[str, Tensor]:
    """Every tensor of an adapter by its name in the file; `stored` as in `format.named_tensors`."""
    slots: dict[str, Tensor] = {}
    path = format.paths(wrappers, adapter)
    for name, layer in wrappers:
        if adapter in layer.adapters():
            slots |= format.named_tensors(path(name), layer, adapter, stored)
    biases = [bias for bias in injection(model).biases if bias.adapter == adapter]
    if biases:
        modules = {module: name for name, module in named_base_modules(model)}
        for bias in biases:
            # As the path of a module below, so that wrappers around the bias's own module count too.
            name = f"{modules[bias.module]}.bias".removeprefix(".")
            slots[path(name)] = bias.trained
    return slots


def _separate_groups(wrappers: Sequence[tuple[str, Wrapper]], adapter: str, tensors: dict[str, Tensor]) -> list[str]:
    """Bring the A of convolutions with groups into the form in which they train; returns what is wrong with them."""
    problems, path = [], format.paths(wrappers, adapter)
    for name, layer in wrappers:
        if not isinstance(layer, LoraConv) or layer.groups == 1 or adapter not in layer.shares:
            continue
        key = f"{path(name)}.lora_A.weight"
        if key in tensors:
            try:
                tensors[key] = layer.take_stored(layer.update(adapter), tensors[key])
            except CheckpointError as error:
                problems.append(f"{key}: {error}")
    return problems


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
                tensors = {name.removeprefix(format.PREFIX): tensor for name, tensor in file.get_tensors().items()}
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
    except RecursionError:
        raise CheckpointError("its objects are nested too deeply to be settings") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"must hold an object, found {type(value).__name__}")
    return value


def _sort_tensors(
    config: LoraConfig, tensors: dict[str, Tensor], problems: list[str]
) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """Pair the factors of each module; notes what is wrong with the file by itself in `problems`."""
    low_rank, rest = {}, dict(tensors)
    for name, tensor in tensors.items():
        # A sum is quicker than a look at each value, and finite only if they all are.
        tensor = tensor.float() if tensor.itemsize == 1 else tensor  # torch does not sum fp8.
        if tensor.is_floating_point() and not isfinite(tensor.sum().item()) and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            problems.append(f"{name}: {count:,} of {tensor.numel():,} values are not finite (NaN or infinite)")
    adapted = format.adapted_places(tensors)
    for place, end_A in adapted.items():
        name, other = f"{place}.{end_A}", f"{place}.{format.END_OF_B[end_A]}"
        A, B = rest.pop(name), rest.pop(other, None)
        if B is None or A.ndim != B.ndim or A.ndim < 2:
            problems.append(f"{other}: missing or not a matrix")
            continue
        module, owner = format.module_of(place, adapted), format.owner_of(place, adapted)
        bare = _parameters_in(owner, config, stacked=A.shape[0] != config.rank_of(module))
        full_name = bare[0] if bare else _configured_as(place, adapted, config)
        r = config.rank_of(full_name)
        if bare and A.shape[0] == B.shape[1] and (len(bare) > 1 or A.shape[0] != r):
            rest |= {name: A, other: B}
            continue
        low_rank[module] = LowRank(*as_matrices(A, B), config.scale_of(full_name))
        # The second factor of a convolution with groups holds a group's share of r.
        if A.shape[0] != r or (B.shape[1] != r and not (B.ndim > 2 and r % B.shape[1] == 0)):
            problems.append(f"{module}: r is {r}, found A {list(A.shape)} and B {list(B.shape)}")
    return low_rank, rest


def _configured_as(place: str, adapted: Container[str], config: LoraConfig) -> str:
    """The name that decides the rank and scale of the module at a place in the file.

    An attention's output projection, which PEFT reaches through the wrapper around it, has the attention's.
    """
    attention = place.removesuffix(".base_layer.out_proj")
    inside = attention != place and attention in adapted
    module = format.owner_of(attention if inside else place, adapted)
    return f"{module}.out_proj" if inside and _parameters_in(module, config, stacked=False) else module


def _largest_rank(tensors: dict[str, Tensor]) -> int:
    """The most rows of an A in the file, whatever they belong to."""
    As = [tensors[f"{place}.{end}"] for place, end in format.adapted_places(tensors).items()]
    return max((len(A) for A in As if A.ndim), default=0)


def _parameters_in(module: str, config: LoraConfig, stacked: bool) -> list[str]:
    """The full names that target_parameters may mean in a module.

    An entry of one word means the parameter in any module, which shows where A has other rows than the module's rank
    (`stacked`).
    """
    entries = [entry.rpartition(".") for entry in config.target_parameters or ()]
    return [f"{module}.{end}" for owner, _, end in entries if (matches_name(module, owner) if owner else stacked)]


def _mismatches(expected: dict[str, Tensor], tensors: dict[str, Tensor], model: nn.Module, adapter: str) -> list[str]:
    problems, places = [], dict(named_places(model))
    for name, slot in expected.items():
        if name not in tensors:
            problems.append(f"{name}: missing from the file")
        elif tensors[name].shape != slot.shape:
            problems.append(f"{name}: the model needs {list(slot.shape)}, the file holds {list(tensors[name].shape)}")
    for name in tensors.keys() - expected.keys():
        if not (is_repeated(name, tensors, expected, places, adapter) or is_of_base(name, tensors, places, adapter)):
            problems.append(f"{name}: the model has no place for it{nearest(name, expected)}")
    return sorted(problems)


def _raise_if(problems: list[str], folder: Path) -> None:
    if problems:
        raise CheckpointError(_message(problems, folder))


def _message(problems: list[str], folder: Path) -> str:
    return f"the adapter in {folder} cannot be used:\n{listing(problems, most=len(problems))}"
