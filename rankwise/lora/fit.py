"""Whether an adapter can go into a model: what its configuration asks for, and what other adapters do there."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from rankwise.errors import ConfigError, MergeError, listing, nearest
from rankwise.lora.config import LoraConfig, pattern_matches
from rankwise.lora.places import named_base_modules, named_lora_layers, named_wrappers
from rankwise.lora.report import AdaptedMatrix
from rankwise.lora.targets import is_inside
from rankwise.lora.trained import TrainedBias, TrainedCopy
from rankwise.lora.variants import from_weight


def configured_as(name: str, modules: dict[str, nn.Module]) -> str:
    """The name that decides a matrix's rank and scale: in PEFT an attention's output projection has the attention's."""
    parent = name.rpartition(".")[0]
    return parent if isinstance(modules.get(parent), nn.MultiheadAttention) else name


def check_ours(config: LoraConfig, modules: Mapping[str, nn.Module]) -> None:
    """Raise ConfigError for another library's configuration, and for a model that carries its adapters."""
    if not isinstance(config, LoraConfig):
        found = f"{type(config).__module__}.{type(config).__name__}"
        raise ConfigError(
            f"the configuration must be a rankwise.LoraConfig, found {found}; the fields have PEFT's names"
        )
    if wrapped := [name for name, module in modules.items() if type(module).__module__.startswith("peft.")]:
        raise ConfigError(
            f"PEFT has put adapters into this model ({wrapped[0] or 'around it'}); take them out (PeftModel.unload), "
            "or save them and load their folder with rankwise.load_adapter_"
        )


def check_merged(
    model: nn.Module,
    config: LoraConfig,
    trained: Iterable[str],
    merged: Mapping[str, float],
    biases: Iterable[TrainedBias],
) -> None:
    """Merged adapters stay at work beside a new one, which is impossible if they train modules of its `trained` too."""
    theirs = {bias.module for bias in biases if bias.adapter in merged}
    problems = ["a DoRA adapter cannot work beside a merged one"] if config.use_dora else []
    if config.bias != "none":
        problems.append(f'bias="{config.bias}": the biases are merged')
    problems += [
        f"{name} is trained by a merged adapter"
        for name, layer in named_wrappers(model)
        if name in trained and not layer.lora_layers() and layer.adapters() & merged.keys()
    ]
    problems += [
        f"{name} has a bias that a merged adapter trains"
        for name, module in named_base_modules(model)
        if module in theirs and is_inside(name, trained)
    ]
    if problems:
        raise ConfigError(
            "this model has merged adapters; go back first: rankwise.unmerge_(model)\n" + listing(problems)
        )


def refuse_change_of_merged_biases(
    model: nn.Module, biases: Iterable[TrainedBias], active: Mapping[str, float]
) -> None:
    """Raise MergeError if a bias that is merged would be another one with these adapters at work."""
    merged = {layer.base for _, layer in named_lora_layers(model) if layer.bias_name in layer.unmerged}
    if any(bias.module in merged and bias.shown != (bias.adapter in active) for bias in biases):
        raise MergeError("a bias that another adapter trains is merged; go back first: rankwise.unmerge_(model)")


def check_nesting(model: nn.Module, parts: Iterable[str], heads: list[str]) -> None:
    """A copy of a module knows nothing of what another adapter does inside the module."""
    present = named_wrappers(model)
    copied = [name for name, layer in present if isinstance(layer, TrainedCopy)]
    problems = [
        f"{name} is part of a module that another adapter trains in full" for name in parts if is_inside(name, copied)
    ]
    problems += [
        f"{head} cannot be trained in full: another adapter adapts {name} in it"
        for head in heads
        for name, _ in present
        if name != head and is_inside(name, [head])
    ]
    if problems:
        raise ConfigError("two adapters cannot work on one module so:\n" + listing(problems))


def check_biases_of_B(names: list[str], modules: dict[str, nn.Module], config: LoraConfig) -> None:
    if config.lora_bias and (without := [name for name in names if isinstance(modules[name], nn.Embedding)]):
        raise ConfigError(f"lora_bias: an embedding has no bias to merge it into, found {listing(without)}")


def check_weights_are_finite(weights: Mapping[str, object], config: LoraConfig) -> None:
    """Raise ConfigError if the adapter starts from weights (PiSSA, OLoRA) that are not finite."""
    if from_weight(config.init_lora_weights) is None:
        return
    broken = [
        name
        for name, weight in weights.items()
        if isinstance(weight, Tensor) and not weight.is_meta and not torch.isfinite(weight).all()
    ]
    if broken:
        raise ConfigError(
            f"init_lora_weights {config.init_lora_weights!r} starts from the weights, and these are not finite (NaN or "
            "infinite):\n" + listing(broken)
        )


def check_ranks(matrices: tuple[AdaptedMatrix, ...], modules: dict[str, nn.Module], in_file: int | None) -> None:
    """Raise ConfigError for ranks that are too large; those of an adapter on disk only must not be above `in_file`, as
    PEFT also writes ranks that no update can have."""
    problems = [
        f"{m.name} is {m.d} × {m.k}, and r = {m.r} is larger; an update cannot have a higher rank than min(d, k)"
        for m in matrices
        if m.r > max(largest_rank(m, modules), in_file or 0)
    ]
    for m in matrices:
        groups = getattr(modules.get(m.name), "groups", 1)
        if m.r % groups:
            problems.append(f"{m.name} has {groups} groups, which r = {m.r} must be a multiple of")
    if problems:
        raise ConfigError(
            "the ranks do not fit; choose others, or leave modules out of target_modules:\n" + listing(problems)
        )


def largest_rank(matrix: AdaptedMatrix, modules: dict[str, nn.Module]) -> int:
    """min(d, k), of a convolution with groups that of all groups together."""
    groups = getattr(modules.get(matrix.name), "groups", 1)
    return groups * min(matrix.d // groups, matrix.k)


def check_patterns(names: list[str], config: LoraConfig) -> None:
    problems = []
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, option):
            if not any(pattern_matches(key, name) for name in names):
                endings = {name.rpartition(".")[2] for name in names}
                problems.append(f"{option} key {key!r} matches no adapted module{nearest(key, endings)}")
    if problems:
        raise ConfigError("the patterns do not fit this model:\n" + listing(problems))
