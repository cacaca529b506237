"""Which modules an adapter goes to: the selection rules of PEFT, but a pattern that matches nothing is an error."""

import re
from collections.abc import Iterable

from torch import nn

from rankwise.errors import TargetError, listing, nearest
from rankwise.lora.base_weight import is_conv1d
from rankwise.lora.config import ALL_LINEAR, LoraConfig


def matches_name(name: str, pattern: str) -> bool:
    """Whether a module's dotted name is `pattern` or ends with ".pattern"."""
    return name == pattern or name.endswith("." + pattern)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def unsupported_reason(module: nn.Module, parent: nn.Module | None) -> str | None:
    """Why a module cannot carry an adapter, or None if it can."""
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight without calling it, so an adapter there would do nothing"
    if isinstance(module, nn.Embedding):
        return "an embedding with max_norm rewrites its own weight" if module.max_norm is not None else None
    return None if is_linear(module) else f"a {type(module).__name__} cannot carry an adapter"


def select_heads(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the modules to train in full, in the model's order.

    Raises TargetError if an entry of modules_to_save, or every head name of the task, matches nothing.
    """
    names = [name for name, _ in model.named_modules() if name]
    chosen = [name for name in names if any(matches_name(name, head) for head in config.heads)]
    unmatched = [entry for entry in config.modules_to_save or () if not any(matches_name(n, entry) for n in names)]
    problems = [f"modules_to_save {entry!r} matches no module{nearest(entry, _endings(names))}" for entry in unmatched]
    if config.task_heads and not chosen:
        wanted = " or ".join(config.task_heads)
        problems.append(f"task_type {config.task_type} trains a head named {wanted}; this model has none")
    if problems:
        raise TargetError(f"{type(model).__name__} lacks modules that the configuration names:\n" + listing(problems))
    return [name for name in chosen if not _inside(name, set(chosen) - {name})]


def select_targets(model: nn.Module, config: LoraConfig, heads: Iterable[str]) -> list[str]:
    """Names of the modules that get an adapter, in the model's order; modules inside `heads` are left out.

    Raises TargetError, with every problem and the nearest names, if a pattern matches nothing or a module that cannot
    carry an adapter.
    """
    modules = {name: module for name, module in model.named_modules() if name and not _inside(name, set(heads))}
    output_head = _output_head(model)

    def parent(name: str) -> nn.Module:
        return model.get_submodule(name.rpartition(".")[0])

    if config.target_modules == ALL_LINEAR:
        chosen = [
            name
            for name, module in modules.items()
            if is_linear(module) and module is not output_head and not unsupported_reason(module, parent(name))
        ]
        if not chosen:
            raise TargetError(f"{type(model).__name__} has no linear layer to adapt; name modules in target_modules")
        return chosen

    patterns = [config.target_modules] if isinstance(config.target_modules, str) else list(config.target_modules)
    as_regex = isinstance(config.target_modules, str)
    chosen, problems = set(), []
    for pattern in patterns:
        matched = [name for name in modules if _matches(name, pattern, as_regex)]
        problems += [
            f"{name}: {reason}" for name in matched if (reason := unsupported_reason(modules[name], parent(name)))
        ]
        if not matched:
            problems.append(_nothing_matched(pattern, as_regex, modules))
        chosen.update(matched)
    if problems:
        raise TargetError(f"target_modules do not fit {type(model).__name__}:\n" + listing(problems))
    return [name for name in modules if name in chosen]


def shortest_names(adapted: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest dotted suffixes that match the adapted modules and none of the other ones, sorted."""
    adapted = set(adapted)
    taken = {ending for name in others for ending in _suffixes(name)}
    return sorted({next((s for s in _suffixes(name) if s not in taken), name) for name in adapted})


def _matches(name: str, pattern: str, as_regex: bool) -> bool:
    if not as_regex:
        return matches_name(name, pattern)
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise TargetError(f"target_modules {pattern!r} is not a regular expression: {error}") from None


def _nothing_matched(pattern: str, as_regex: bool, modules: dict[str, nn.Module]) -> str:
    if as_regex and any(matches_name(name, pattern) for name in modules):
        return (
            f"the regular expression {pattern!r} must match a module's whole name; "
            f'to match by the last part write target_modules=["{pattern}"]'
        )
    able = [name for name, module in modules.items() if not unsupported_reason(module, None)]
    kind = "the regular expression " if as_regex else ""
    choices = nearest(pattern, [*_endings(able), *able])
    return f"{kind}{pattern!r} matches no module" + (choices or f" (there are: {', '.join(_endings(able)[:12])})")


def _output_head(model: nn.Module) -> nn.Module | None:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    return get_output_embeddings() if get_output_embeddings else None


def _endings(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _inside(name: str, heads: set[str]) -> bool:
    return any(name == head or name.startswith(head + ".") for head in heads)
