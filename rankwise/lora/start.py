"""Starting an adapter from data (EVA, CorDA and LoRA-GA look at a few batches before training) or from the weights
that a quantised base had before (LoftQ)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import ConfigError, listing
from rankwise.lora.adapters import check_names, check_unmerged
from rankwise.lora.base_weight import as_matrix, dimensions, working_dtype
from rankwise.lora.config import exact_patterns
from rankwise.lora.inject import DEFAULT_ADAPTER, adapters_off, check_outside_blocks, injection, set_active
from rankwise.lora.layers import LoraLayer
from rankwise.lora.linear import LoraLinear
from rankwise.lora.places import named_lora_layers
from rankwise.lora.variants.corda import corda
from rankwise.lora.variants.eva import eva, spread_ranks
from rankwise.lora.variants.loftq import loftq
from rankwise.lora.variants.lora_ga import lora_ga

FROM_DATA = ("eva", "corda", "lora_ga")


def start_from_data_(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor], adapter: str = DEFAULT_ADAPTER
) -> dict[str, int]:
    """Give an adapter with init_lora_weights "eva", "corda" or "lora_ga" its start, in place, before it is trained.

    `loss(batch)` runs the model on a batch; its value matters for "lora_ga" alone, which needs the gradient of the base
    weights and so as much memory as they take, in fp32. "eva" and "corda" keep Σ x·xᵀ [k, k] of each layer. Only linear
    layers can start from data. Returns each module's rank: "eva" spreads the sum of the ranks over the layers anew.
    Raises ConfigError, before the model is run, for another start or other layers, if the adapter is merged, in a block
    of `adapters_off` or `adapters_by_row`, or if "corda" or "lora_ga" finds a weight that is not dense (quantised) or
    not finite; after it for inputs or gradients that are not finite. The model is then as it was.
    """
    check_names(model, [adapter])
    check_outside_blocks(model)
    check_unmerged(model, adapter)
    config = injection(model).configs[adapter]
    how = config.init_lora_weights
    if how not in FROM_DATA:
        raise ConfigError(f"init_lora_weights is {how!r}; a start from data is one of {', '.join(FROM_DATA)}")
    layers = {name: layer for name, layer in named_lora_layers(model) if adapter in layer.shares}
    others = [name for name, layer in layers.items() if not isinstance(layer, LoraLinear)]
    if others:
        raise ConfigError(f"init_lora_weights {how!r} goes with linear layers alone, found {', '.join(others[:5])}")
    if how != "eva":
        weights = {name: layer.needed_matrix(f"init_lora_weights {how!r}") for name, layer in layers.items()}
        if broken := sorted(name for name, weight in weights.items() if not torch.isfinite(weight).all()):
            raise ConfigError(f"the weights of {', '.join(broken[:5])} are not finite (NaN or infinite)")
    sums = (_gradients if how == "lora_ga" else _inputs)(model, layers, batches, loss)
    if unreached := sorted(layers.keys() - sums.keys()):
        raise ConfigError(f"the batches did not reach {', '.join(unreached[:5])}; nothing was changed")
    if broken := sorted(name for name, found in sums.items() if not torch.isfinite(found).all()):
        what = "gradients" if how == "lora_ga" else "inputs"
        raise ConfigError(f"the {what} of {', '.join(broken[:5])} are not finite in these batches; nothing was changed")
    if how == "eva":
        return _start_eva(model, layers, sums, adapter)
    updates = {name: layer.update(adapter) for name, layer in layers.items()}
    # All of them before the first is taken, so that one that fails changes nothing.
    if how == "corda":
        starts = {n: corda(layers[n].base_matrix(), sums[n], update.r, update.scale) for n, update in updates.items()}
    else:
        starts = {name: lora_ga(sums[name], update.r) for name, update in updates.items()}
    for name, update in updates.items():
        update.begin_at(*starts[name])
        layers[name].reset_magnitude(update)
    return {name: update.r for name, update in updates.items()}


@torch.no_grad()
def start_from_original_(model: nn.Module, original: Mapping[str, Tensor], adapter: str = DEFAULT_ADAPTER) -> None:
    """Give an adapter over a quantised base its start by LoftQ, in place: base and adapter are near the original.

    `original`: the base's weights [d, k] before they were quantised, by parameter name ("…q_proj.weight"). A quantised
    weight is read by what the layer makes of the unit vectors, so any kind of layer will do.
    Raises ConfigError, before anything is changed, for a weight that is missing, has another shape or is not finite,
    for layers that are not linear, and for an adapter that is merged.
    """
    check_names(model, [adapter])
    check_unmerged(model, adapter)
    layers = {name: layer for name, layer in named_lora_layers(model) if adapter in layer.shares}
    problems = []
    for name, layer in layers.items():
        shape, weight = dimensions(layer.base), original.get(f"{name}.weight")
        if not isinstance(layer, LoraLinear):
            problems.append(f"{name}: not a linear layer")
        elif weight is None or tuple(weight.shape) != shape:
            found = "it is missing" if weight is None else f"found {list(weight.shape)}"
            problems.append(f"{name}.weight: {list(shape)} is wanted, {found}")
        elif not torch.isfinite(weight).all():
            problems.append(f"{name}.weight: there are values that are not finite (NaN or infinite)")
    if problems:
        raise ConfigError("the original weights do not fit the adapted layers:\n" + listing(problems))
    starts = {}
    for name, layer in layers.items():
        update, quantised = layer.update(adapter), _dense_weight(layer)
        missing = original[f"{name}.weight"].to(quantised) - quantised
        if not torch.isfinite(missing).all():
            raise ConfigError(f"the quantised weight of {name} is not finite (NaN or infinite); nothing was changed")
        starts[name] = loftq(missing, update.r, update.scale)
    for name, layer in layers.items():
        layer.update(adapter).set(*starts[name])
        layer.reset_magnitude(layer.update(adapter))


def _dense_weight(layer: LoraLayer) -> Tensor:
    """The weight [d, k] that a linear layer computes with, in the form of its adapters'; it may be quantised."""
    weight, bias = layer.own(layer.weight_name), layer.own(layer.bias_name)
    _, k = dimensions(layer.base)
    units = torch.eye(k, device=weight.device)
    with layer.off():  # Another adapter may be merged.
        outputs = layer.base(units.to(weight.dtype) if weight.is_floating_point() else units).to(working_dtype(weight))
    return (outputs if bias is None else outputs - bias.to(outputs)).T


def _start_eva(model: nn.Module, layers: dict[str, Any], sums: dict[str, Tensor], adapter: str) -> dict[str, int]:
    injected = injection(model)
    budget = sum(layer.update(adapter).r for layer in layers.values())
    # A layer may get up to twice its rank, as in the paper, and no more than its matrix has.
    found = {
        name: eva(sums[name], min(2 * layer.update(adapter).r, *dimensions(layer.base)))
        for name, layer in layers.items()
    }
    ranks = spread_ranks({name: share for name, (_, share) in found.items()}, budget)
    config = injected.configs[adapter]
    alphas = {
        name: layer.update(adapter).scale * (ranks[name] ** 0.5 if config.use_rslora else ranks[name])
        for name, layer in layers.items()
    }
    config = replace(config, rank_pattern=exact_patterns(ranks, ranks), alpha_pattern=exact_patterns(alphas, ranks))
    active = dict(injected.active)
    for name, layer in layers.items():
        trains = {key: parameter.requires_grad for key, parameter in layer.update(adapter).named_parameters()}
        layer.remove(adapter)
        layer.add(adapter, config, name)
        update = layer.update(adapter)
        for key, parameter in update.named_parameters():
            parameter.requires_grad_(trains[key])
        update.set(found[name][0][: ranks[name]], torch.zeros_like(update.lora_B))
    injected.configs[adapter] = config
    set_active(model, active)
    return ranks


def _inputs(
    model: nn.Module, layers: dict[str, Any], batches: Iterable[Any], loss: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    """Σ x·xᵀ [k, k] of each layer's inputs over the batches."""
    sums: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def on_forward(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = inputs[0] if inputs else next(iter(named.values()))
            x = x.reshape(-1, x.shape[-1]).to(working_dtype(x))
            sums[name] = x.T @ x + sums[name] if name in sums else x.T @ x

        return on_forward

    handles = [layer.base.register_forward_pre_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with adapters_off(model), torch.no_grad():
            for batch in batches:
                loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _gradients(
    model: nn.Module, layers: dict[str, Any], batches: Iterable[Any], loss: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    """Σ ∂L/∂W0 [d, k] of each layer over the batches, in fp32 at least."""
    weights = {name: layer.own(layer.weight_name) for name, layer in layers.items()}
    sums: dict[str, Tensor] = {}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with adapters_off(model), torch.enable_grad():
            for batch in batches:
                loss(batch).backward()
                for name, weight in weights.items():
                    if weight.grad is not None:
                        own = as_matrix(layers[name].base, weight.grad).to(working_dtype(weight))
                        sums[name] = sums[name] + own if name in sums else own
                        weight.grad = None
        return sums
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
