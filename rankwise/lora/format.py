"""PEFT's adapter folder (0.21): names of files, tensors and settings, translated to and from ours."""

from collections.abc import Mapping
from typing import Any

from rankwise.errors import CheckpointError
from rankwise.lora.config import LoraConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."

FACTORS = {False: ("lora_A.weight", "lora_B.weight"), True: ("lora_embedding_A", "lora_embedding_B")}
"""The ends of the names of A and B, for a linear layer and for an embedding (True)."""

# What adapter_config.json holds beyond our own settings, at the values that switch it off.
_OFF: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "rank_pattern": {},
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
# These say where an adapter came from or how it was started; they do not change what it computes.
_NOTES = ("auto_mapping", "fan_in_fan_out", "peft_type", "peft_version", "revision")
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
_OURS = (
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "modules_to_save",
    "inference_mode",
    "base_model_name_or_path",
)


def to_settings(config: LoraConfig, target_modules: list[str], transposed: bool) -> dict[str, Any]:
    """The content of adapter_config.json for a saved adapter; `transposed`: its layers store weights as [in, out]."""
    return {
        **_OFF,
        "auto_mapping": None,
        "base_model_name_or_path": config.base_model_name_or_path,
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        # Some readers take whole numbers only.
        "lora_alpha": int(config.lora_alpha) if config.lora_alpha == int(config.lora_alpha) else config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": list(config.heads) or None,
        "peft_type": "LORA",
        "r": config.r,
        "revision": None,
        "target_modules": target_modules,
        "task_type": config.task_type,
    }


def from_settings(settings: Mapping[str, Any], trainable: bool) -> LoraConfig:
    """The configuration that adapter_config.json describes.

    Raises CheckpointError that names every field which is set and not supported, or missing, or cannot be.
    """
    problems = []
    if settings.get("peft_type") != "LORA":
        problems.append(f'peft_type must be "LORA", found {settings.get("peft_type")!r}')
    for name in ("r", "lora_alpha", "target_modules"):
        if name not in settings:
            problems.append(f"{name} is missing")
    for name, value in settings.items():
        if name in _OURS or name in _NOTES:
            continue
        if name == "init_lora_weights":
            if value not in _PLAIN_STARTS:
                problems.append(f"{name} = {value!r} starts from a changed base and is not supported")
        elif value != _OFF.get(name) and value not in (None, False, "", [], {}):
            problems.append(f"{name} = {value!r} is set and not supported")
    if problems:
        raise CheckpointError("\n".join(problems))
    ours = {name: settings[name] for name in _OURS if name in settings}
    ours["inference_mode"] = not trainable
    try:
        # PEFT writes the task's head names among the user's own, also those that the model does not have.
        task_heads = LoraConfig(task_type=ours.get("task_type")).task_heads
        own_heads = [name for name in ours.get("modules_to_save") or () if name not in task_heads]
        return LoraConfig(**{**ours, "modules_to_save": own_heads or None})
    except ValueError as error:
        raise CheckpointError(str(error)) from None
