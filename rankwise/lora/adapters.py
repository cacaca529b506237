"""Many adapters over one base: which of them work, for all rows of a batch, row by row or part by part."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import isfinite

import torch
from torch import nn

from rankwise.errors import ConfigError, listing, nearest
from rankwise.lora.fit import check_weights_are_finite, refuse_change_of_merged_biases
from rankwise.lora.inject import (
    DEFAULT_ADAPTER,
    biases_off,
    check_outside_blocks,
    drop_idle_,
    eject_,
    injection,
    parameters_of,
    set_active,
    wake,
)
from rankwise.lora.layers import LoraLayer
from rankwise.lora.linear import LoraLinear
from rankwise.lora.merge import refuse_dora_beside_merged
from rankwise.lora.parts import Parts
from rankwise.lora.places import merged_adapters, named_base_modules, named_lora_layers, named_wrappers
from rankwise.lora.rows import ByRow
from rankwise.lora.trained import TokenRows, TrainedCopy, biases_off_in, show_biases


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters in a model, in the order in which they came; none is no error."""
    try:
        return list(injection(model).configs)
    except ConfigError:
        return []


def activate_(model: nn.Module, adapters: str | Mapping[str, float]) -> None:
    """Let one adapter work, or the weighted sum of several: the model computes with W0 + Σ weight·ΔW.

    An adapter that is merged stays at work, with its weight. Raises ConfigError for a name that is not there, a weight
    that is no finite number, if two adapters of the sum train the same module in full or the same token's row, if an
    adapter that trains such or biases has another weight than 1, or in a block of `adapters_off` or `adapters_by_row`;
    MergeError for a DoRA adapter beside a merged one, or a change of biases that are merged. The model is then as it
    was.
    """
    weights = {adapters: 1.0} if isinstance(adapters, str) else adapters
    check_weights(weights)
    check_names(model, weights)
    check_outside_blocks(model)
    active = {name: weight for name, weight in weights.items() if weight}
    for _, layer in named_lora_layers(model):
        active |= layer.merged
    _check_whole_shares(model, active)
    for _, layer in named_lora_layers(model):
        if layer.merged:
            refuse_dora_beside_merged(layer, active, layer.merged)
    refuse_change_of_merged_biases(model, injection(model).biases, active)
    set_active(model, active)


def _check_whole_shares(model: nn.Module, active: Mapping[str, float]) -> None:
    """What is trained in full cannot be summed or weighted."""
    problems = [
        f"{bias.adapter} trains biases, and has weight {active[bias.adapter]}; it can only have 1"
        for bias in injection(model).biases
        if active.get(bias.adapter, 1) != 1
    ][:1]
    for name, layer in named_wrappers(model):
        own = [adapter for adapter in active if adapter in layer.adapters()]
        if not isinstance(layer, TrainedCopy | TokenRows):
            continue
        if isinstance(layer, TrainedCopy) and own:
            inside = set(layer.base.modules())
            others = {b.adapter for b in injection(model).biases if b.adapter in active and b.module in inside}
            problems += [
                f"{own[0]} trains {name} in full and {other} a bias in it; only one of them can work at a time"
                for other in others - {own[0]}
            ]
        if isinstance(layer, TrainedCopy) and len(own) > 1:
            problems.append(f"{', '.join(own)} all train {name} in full; only one of them can work at a time")
        elif isinstance(layer, TokenRows):
            counts = Counter(token for adapter in own for token in layer.rows(adapter).tokens)
            shared = [token for token, count in counts.items() if count > 1]
            if shared:
                problems.append(f"{', '.join(own)} all train rows {shared[:5]} of {name}; only one can work at a time")
        problems += [
            f"{adapter} trains {name} itself, and has weight {active[adapter]}; it can only have 1"
            for adapter in own
            if active[adapter] != 1
        ]
    if problems:
        raise ConfigError("these adapters cannot work so:\n" + listing(problems))


def delete_adapter_(model: nn.Module, adapter: str) -> None:
    """Take one adapter out. With the last one the very base model returns, as by `eject_`.

    Raises ConfigError if there is no such adapter, if it is merged, or in a block of `adapters_off` or
    `adapters_by_row`; MergeError if its biases are merged.
    """
    check_names(model, [adapter])
    check_outside_blocks(model)
    injected = injection(model)
    active = {name: weight for name, weight in injected.active.items() if name != adapter}
    refuse_change_of_merged_biases(model, injection(model).biases, active)
    check_unmerged(model, adapter)
    if len(injected.configs) == 1:
        eject_(model)
        return
    show_biases(model, injected.biases, active)
    injected.biases = [bias for bias in injected.biases if bias.adapter != adapter]
    for _, layer in named_wrappers(model):
        layer.remove(adapter)
    drop_idle_(model)
    del injected.configs[adapter]
    set_active(model, active)


def reset_adapter_(model: nn.Module, adapter: str = DEFAULT_ADAPTER, generator: torch.Generator | None = None) -> None:
    """Give an adapter the start values of a new one, in place: after `model.to_empty`, or to train again.

    The base must have its values. `generator` as in `inject_`. Raises ConfigError if the model carries no such adapter,
    or if it is merged.
    """
    check_names(model, [adapter])
    check_unmerged(model, adapter)
    injected = injection(model)
    layers = {name: layer for name, layer in named_lora_layers(model) if adapter in layer.shares}
    weights = {name: layer.own(layer.weight_name) for name, layer in layers.items()}
    check_weights_are_finite(weights, injected.configs[adapter])
    for layer in layers.values():
        layer.reset(adapter, injected.configs[adapter], generator)
    for _, layer in named_wrappers(model):
        if isinstance(layer, TrainedCopy | TokenRows) and adapter in layer.shares:
            with biases_off_in(layer.base, injected.biases):
                layer.reset(adapter)
    for bias in injected.biases:
        if bias.adapter == adapter:
            bias.reset()


@contextmanager
def adapters_by_row(model: nn.Module, adapters: Sequence[str | None]) -> Iterator[None]:
    """Let each row of a batch use its own adapter (None: the base) while the block lasts, in training too.

    The rows are those of the first dimension of what every layer receives; where that is a multiple of them, as in a
    decoder under beam search, each comes so often in succession. Rows with the same adapter go together. The backward
    pass must end in the block too where it computes layers anew (gradient checkpointing).
    What was named trains from then on as if it had been activated, unless gradients are off.
    Raises ConfigError for no rows, a name that is not there, a merged model, or an adapter of bare parameters or
    biases: those cannot differ within a batch. A layer raises it that receives another number of rows, and a module
    trained in full that does not return a tensor of as many.
    """
    if not adapters:
        raise ConfigError("adapters_by_row takes an adapter's name, or None, for each row of the batch; found none")
    named = [name for name in adapters if name is not None]
    check_names(model, named)
    for name, layer in named_wrappers(model):
        if isinstance(layer, LoraLayer) or not layer.adapters() & set(named):
            continue
        if not isinstance(layer, TrainedCopy | TokenRows):
            raise ConfigError(f"{name} has bare parameters adapted; that cannot differ by row")
        if layer.weight_is_read:
            raise ConfigError(f"the model computes with the weight of {name} itself, which cannot differ by row")
    if any(bias.adapter in named for bias in injection(model).biases):
        raise ConfigError("an adapter that trains the model's biases cannot serve single rows")
    if merged_adapters(model):
        raise ConfigError("this model has merged adapters, in all rows; go back first: rankwise.unmerge_(model)")
    if first := _puts_time_first(model):
        raise ConfigError(f"{first} puts time before the rows of a batch, so adapters cannot be told by row")
    rows = {
        name or "": torch.tensor([index for index, own in enumerate(adapters) if own == name])
        for name in dict.fromkeys(adapters)
    }
    if torch.is_grad_enabled():
        _let_train_too(model, dict.fromkeys(named))
    layers = [w for _, w in named_wrappers(model) if isinstance(w, LoraLayer | TrainedCopy | TokenRows)]
    with ExitStack() as stack:
        # What an adapter at work trains in full is no row's: a row without an adapter is the base's.
        for _, layer in named_wrappers(model):
            if not isinstance(layer, LoraLayer):
                stack.enter_context(layer.off())
        stack.enter_context(biases_off(model))
        for layer in layers:
            device = next(layer.parameters()).device
            stack.callback(setattr, layer, "by_row", layer.by_row)
            layer.by_row = ByRow(len(adapters), {name: index.to(device) for name, index in rows.items()})
        yield


@contextmanager
def adapters_by_part(model: nn.Module, adapters: Sequence[str], sizes: Mapping[int, tuple[int, ...]]) -> Iterator[None]:
    """Let each adapter compute its part of all tokens while the block lasts, in training too; see `Parts`.

    They train from then on as if they had been activated.
    Raises ConfigError for a name that is not there, a merged model, or an adapter of another kind than low-rank updates
    of linear layers and modules trained in full.
    """
    check_names(model, adapters)
    if merged_adapters(model):
        raise ConfigError("this model has merged adapters, for all tokens; go back first: rankwise.unmerge_(model)")
    layers = []
    for name, layer in named_wrappers(model):
        if isinstance(layer, LoraLinear | TrainedCopy) and not layer.weight_is_read:
            layers.append(layer)
        elif layer.active or layer.adapters() & set(adapters):
            raise ConfigError(f"{name} is no linear layer that the model calls; adapters cannot share a pass there")
    if any(bias.adapter in adapters for bias in injection(model).biases):
        raise ConfigError("an adapter that trains the model's biases cannot share a pass with others")
    _let_train_too(model, adapters)
    parts = Parts(tuple(adapters), sizes)
    for layer in layers:
        layer.parts = parts
    try:
        yield
    finally:
        for layer in layers:
            layer.parts = None


def _let_train_too(model: nn.Module, adapters: Iterable[str]) -> None:
    """Let adapters train that work in a block. They go on after it, where the backward pass may come, until the next
    choice of those at work."""
    resting = injection(model).resting
    for adapter in adapters:
        if any(resting.get(adapter, ())):
            wake(parameters_of(model, adapter), resting.pop(adapter))


def _puts_time_first(model: nn.Module) -> str | None:
    """What in a model takes [time, rows, …], where rows cannot be told once there are as many of both."""
    if getattr(getattr(model, "config", None), "model_type", None) == "xlnet":
        return "XLNet"
    named = ((name, getattr(module, "batch_first", True)) for name, module in named_base_modules(model))
    return next((name or type(model).__name__ for name, rows_first in named if rows_first is False), None)


def check_unmerged(model: nn.Module, adapter: str) -> None:
    """Raise ConfigError if an adapter is merged: the weights would not follow a change of it."""
    if adapter in merged_adapters(model):
        raise ConfigError(f"{adapter!r} is merged; go back first: rankwise.unmerge_(model)")


def check_weights(weights: object) -> None:
    """Raise ConfigError if this is not a mapping of names to finite numbers."""
    numbers = weights.values() if isinstance(weights, Mapping) else [None]
    if not all(isinstance(number, int | float) and isfinite(number) for number in numbers):
        raise ConfigError(f"several adapters are given as {{name: weight}}, with finite numbers, found {weights!r}")


def check_names(model: nn.Module, adapters: Sequence[str] | Mapping[str, float]) -> None:
    """Raise ConfigError, with the nearest name, if the model does not carry one of these adapters."""
    present = injection(model).configs
    unknown = [name for name in adapters if name not in present]
    if unknown:
        there = nearest(unknown[0], present) or f" (there are: {', '.join(present)})"
        raise ConfigError(f"this model carries no adapter named {unknown[0]!r}{there}")
