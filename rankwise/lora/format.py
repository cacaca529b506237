"""PEFT's adapter folder (0.21): names of files, tensors and settings, translated to and from ours."""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from rankwise.errors import CheckpointError
from rankwise.lora.config import LoraConfig
from rankwise.lora.embedding import LoraEmbedding
from rankwise.lora.layers import LoraLayer
from rankwise.lora.parameters import ParametersWrapper
from rankwise.lora.trained import TokenRows, TrainedCopy
from rankwise.lora.update import Update
from rankwise.lora.wrapper import Wrapper

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
END_OF_B = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
"""What the file calls the two factors of a module: A → B."""
_NO_TARGETS = "dummy-target-modules"
"""What PEFT takes for target_modules where rows of embeddings or whole modules alone train."""

# What adapter_config.json holds beyond our own settings, at the values that switch it off.
_OFF: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
# These say where an adapter came from or how it was started; they do not change what it computes.
_NOTES = (
    "auto_mapping",
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "peft_type",
    "peft_version",
    "revision",
)
_OURS = tuple(f.name for f in fields(LoraConfig))
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
_STARTS_FROM_WEIGHT = ("pissa", "olora")
"""The start takes a part of the base away, which can be found again from the base."""


def named_tensors(name: str, layer: Wrapper, adapter: str, stored: bool = False) -> dict[str, Tensor]:
    """What is on disk for one layer: names in the file (without PREFIX) → the adapter's tensors, or views of them.

    `name` is the layer's in the file (`paths`). `stored`: A and B as they go to the file, and not as they train.
    """
    if isinstance(layer, LoraLayer):
        return _of_update(name, layer, layer.update(adapter), stored)
    if isinstance(layer, ParametersWrapper):
        # PEFT wraps one parameter after the other, so the first of them lies innermost.
        parts = [part for _, part in layer.named_parts() if adapter in part.shares]
        tensors = {}
        for depth, part in enumerate(reversed(parts)):
            tensors |= _of_update(name + ".base_layer" * depth, part, part.update(adapter), stored)
        return tensors
    if isinstance(layer, TokenRows) and adapter in layer.shares:
        return {f"{name}.token_adapter.trainable_tokens_delta": layer.rows(adapter).values}
    if isinstance(layer, TrainedCopy):
        return {f"{name}.{key}": tensor for key, tensor in layer.shares[adapter].state_dict(keep_vars=True).items()}
    return {}


def _of_update(name: str, layer: LoraLayer, update: Update, stored: bool) -> dict[str, Tensor]:
    embedding = isinstance(layer, LoraEmbedding)
    end_A = "lora_embedding_A" if embedding else "lora_A.weight"
    A, B = layer.stored_factors(update) if stored else (update.lora_A, update.lora_B)
    tensors: dict[str, Tensor] = {f"{name}.{end_A}": A, f"{name}.{END_OF_B[end_A]}": B}
    if update.lora_bias is not None:
        tensors[f"{name}.lora_B.bias"] = update.lora_bias
    if update.magnitude is not None:
        # A convolution's lines up with its output: [1, d, 1, …].
        ones = [1] * (update.lora_A.ndim - 2)
        tensors[f"{name}.lora_magnitude_vector"] = update.magnitude.view(*([1, -1, *ones] if ones else [-1]))
    return tensors


def paths(wrappers: Iterable[tuple[str, Wrapper]], adapter: str) -> Callable[[str], str]:
    """Gives the name in the file of a module, which PEFT reaches through the wrappers around those above it.

    There is one wrapper for an adapted module, and one for each of its adapted parameters.
    """
    around = {name: sum(adapter in part.shares for _, part in layer.lora_layers()) for name, layer in wrappers}

    def path(name: str) -> str:
        found, end = name, name.rfind(".")
        while end > 0:
            if count := around.get(name[:end]):
                found = found[:end] + ".base_layer" * count + found[end:]
            end = name.rfind(".", 0, end)
        return found

    return path


def adapted_places(names: Iterable[str]) -> dict[str, str]:
    """The places that have an A of their own among the names in a file, each with what the file calls that A."""
    ends = [(name, end) for name in names for end in END_OF_B if name.endswith(f".{end}")]
    return {name.removesuffix(f".{end}"): end for name, end in ends}


def module_of(place: str, adapted: Container[str]) -> str:
    """The module in the base model that a file calls `place`; what stands at the end there is left as it is.

    A base_layer is PEFT's if it lies in one of the `adapted_places`, and otherwise a module of the user's own.
    """
    parts = place.split(".")
    end = max((index for index, part in enumerate(parts) if part != "base_layer"), default=0)
    wrappers = {
        index for index, part in enumerate(parts[:end]) if part == "base_layer" and ".".join(parts[:index]) in adapted
    }
    return ".".join(part for index, part in enumerate(parts) if index not in wrappers)


def owner_of(place: str, adapted: Container[str]) -> str:
    """As `module_of`, without the wrappers at the end too, of which one stands for each adapted parameter."""
    return module_of(f"{place}.", adapted).removesuffix(".")


def forms(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For each module what the file calls A, and A's shape, whatever the rank."""
    adapted = adapted_places(tensors)
    return {
        module_of(place, adapted): f"{end} of {['r', *tensors[f'{place}.{end}'].shape[1:]]}".replace("'", "")
        for place, end in adapted.items()
    }


def to_settings(config: LoraConfig, target_modules: list[str] | str, transposed: bool, doubled: bool) -> dict[str, Any]:
    """The content of adapter_config.json for a saved adapter.

    `transposed`: its layers store weights as [in, out]. `doubled`: it started from a part of the base, which is stored
    as the second half of a rank that is twice as large; the factor before B·A stays.
    """
    grown = (2**0.5 if config.use_rslora else 2) if doubled else 1
    more = 2 if doubled else 1
    own = {name: getattr(config, name) for name in _OURS}
    return {
        **_OFF,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in own.items()},
        "alpha_pattern": {key: _whole(alpha * grown) for key, alpha in config.alpha_pattern.items()},
        "auto_mapping": None,
        # The names below say it all.
        "exclude_modules": None,
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _whole(config.lora_alpha * grown),
        "modules_to_save": sorted(config.heads) or None,
        "peft_type": "LORA",
        "r": config.r * more,
        "rank_pattern": {key: r * more for key, r in config.rank_pattern.items()},
        "revision": None,
        "target_modules": target_modules or ([] if config.target_parameters else _NO_TARGETS),
        "trainable_token_indices": _plain_tokens(config.trainable_token_indices),
    }


def _whole(alpha: float) -> float:
    """Some readers take whole numbers only."""
    return int(alpha) if alpha == int(alpha) else alpha


def _plain_tokens(tokens: Any) -> Any:
    """As JSON has them, each once, as there is one row for each."""
    if isinstance(tokens, Mapping):
        return {name: _plain_tokens(indices) for name, indices in tokens.items()}
    return None if tokens is None else list(dict.fromkeys(tokens))


def from_settings(settings: Mapping[str, Any], trainable: bool) -> LoraConfig:
    """The configuration that adapter_config.json describes.

    Raises CheckpointError that names every field which is set and not supported, or missing, or cannot be.
    """
    problems = []
    if settings.get("peft_type") != "LORA":
        # What else such a file holds is no fault of it.
        raise CheckpointError(f'peft_type must be "LORA", found {settings.get("peft_type")!r}')
    for name in ("r", "lora_alpha", "target_modules"):
        if name not in settings:
            problems.append(f"{name} is missing")
        elif name != "target_modules" and settings[name] is None:
            problems.append(f"{name} must be a number, found null")
    for name, value in settings.items():
        if name == "init_lora_weights":
            if value == "loftq":
                problems.append(
                    f"{name} = {value!r} goes with the quantised base that it was made for; to load it there, set "
                    f"{name} to true in the file"
                )
            elif value not in (*_PLAIN_STARTS, *_STARTS_FROM_WEIGHT):
                problems.append(
                    f"{name} = {value!r} starts from a changed base, which the file does not hold; save it again as "
                    "plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
                )
        elif name not in (*_OURS, *_NOTES) and value != _OFF.get(name) and value not in (None, False, "", [], {}):
            problems.append(f"{name} = {value!r} is set and not supported")
    if problems:
        raise CheckpointError("\n".join(problems))
    ours = {name: settings[name] for name in _OURS if settings.get(name) is not None}
    targets = settings["target_modules"] or ()
    ours["target_modules"] = () if targets == _NO_TARGETS else targets
    ours["inference_mode"] = not trainable
    if ours.get("init_lora_weights") not in _STARTS_FROM_WEIGHT:
        ours["init_lora_weights"] = True
    try:
        # PEFT writes the task's head names among the user's own, also those that the model does not have.
        task_heads = LoraConfig(task_type=ours.get("task_type")).task_heads
        own_heads = [name for name in ours.get("modules_to_save") or () if name not in task_heads]
        return LoraConfig(**{**ours, "modules_to_save": own_heads or None})
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(error)) from None
