"""Where adapters stand in a model: its places by their names in the base model, and what stands there."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from rankwise.errors import ConfigError
from rankwise.lora.layers import LoraLayer
from rankwise.lora.wrapper import Wrapper

ATTRIBUTE = "_rankwise_injection"
"""Under this a model keeps what is in it (`Injection`)."""


def uncompiled(model: nn.Module) -> nn.Module:
    """The model itself, where torch.compile gave a module around it."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """All parameters by their names where nothing is compiled, as that may come and go while an adapter is there."""
    return [(name.replace("_orig_mod.", ""), parameter) for name, parameter in model.named_parameters()]


def named_places(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What stands in each place of the base model, with the place's name there: a module or a wrapper around it.

    What stands in several places is named by the first.
    """
    found, stack, seen = [], [("", model)], set()
    while stack:
        name, module = stack.pop()
        # Names leave out what torch.compile puts around a module, so that they are the same with and without.
        module = uncompiled(module)
        if module in seen:
            continue
        seen.add(module)
        found.append((name, module))
        # Past nn.Module's search for attributes and for names that stand for the same child, which take longest here.
        base: Any = module._modules["base"] if isinstance(module, Wrapper) else module
        front = f"{name}." if name else ""
        stack += [(front + key, child) for key, child in reversed(base._modules.items()) if child is not None]
    return found


def named_base_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules of the base model with their names in it, as if no adapter were there."""
    return [(name, found.base if isinstance(found, Wrapper) else found) for name, found in named_places(model)]


def named_wrappers(model: nn.Module) -> list[tuple[str, Wrapper]]:
    """All layers that adapters have put in place of others, with their names in the base model, in its order."""
    return [(name, found) for name, found in named_places(model) if isinstance(found, Wrapper)]


def named_lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """The layers (and bare parameters) that carry low-rank updates, with their names in the base model."""
    return [(name + end, part) for name, layer in named_wrappers(model) for end, part in layer.lora_layers()]


def check_own_wrappers(model: nn.Module) -> None:
    """Raise ConfigError if some layers stand here that adapters of another model put in place."""
    own = getattr(model, ATTRIBUTE, None)
    if foreign := [name for name, layer in named_wrappers(model) if layer.injection is not own]:
        inner = [name for name, module in named_base_modules(model) if name and hasattr(module, ATTRIBUTE)]
        where = f"{inner[0]}, a part of this model" if inner else "another model, which shares or holds modules of this"
        raise ConfigError(
            f"an adapter was put into {where} ({foreign[0] or 'all of it'}); put this one there too, or take that one "
            f"out: rankwise.eject_({f'model.{inner[0]}' if inner else 'the other'})"
        )


def own_weights(model: nn.Module) -> dict[str, Any]:
    """The base's own weight (or None) in each place of the base model, whatever is merged."""
    return {name: _own_weight(found) for name, found in named_places(model)}


def _own_weight(found: nn.Module) -> Any:
    if not isinstance(found, Wrapper):
        return getattr(found, "weight", None)
    parts = [part for _, part in found.lora_layers() if part.weight_name == "weight"]
    return parts[0].own("weight") if parts else getattr(found.base, "weight", None)


def replace_(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Let other modules stand in all places of the base model where these do."""
    parents = [module.base if isinstance(module, Wrapper) else module for _, module in named_places(model)]
    for parent in parents:
        for key, child in list(parent._modules.items()):
            if child is None or (module := uncompiled(child)) not in replacements:
                continue
            if module is child:
                setattr(parent, key, replacements[child])
            else:
                compiled: Any = child
                compiled._orig_mod = replacements[module]
                compiled._initialize()  # It calls what it was made for, and not what it holds.


def merged_adapters(model: nn.Module) -> dict[str, float]:
    """The adapters that are merged into the weights of a model, with the weight of each in the sum."""
    return {name: weight for _, layer in named_lora_layers(model) for name, weight in layer.merged.items()}
