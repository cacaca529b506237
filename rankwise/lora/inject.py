"""Putting an adapter into a model and taking it out again."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from rankwise.errors import ConfigError
from rankwise.lora import fit
from rankwise.lora.base_weight import dimensions, weight_name
from rankwise.lora.config import LoraConfig
from rankwise.lora.kinds import layer_kind
from rankwise.lora.layers import LoraLayer
from rankwise.lora.parameters import ParametersWrapper, parameter_dimensions
from rankwise.lora.places import (
    ATTRIBUTE,
    check_own_wrappers,
    merged_adapters,
    named_base_modules,
    named_lora_layers,
    named_parameters,
    named_wrappers,
    own_weights,
    replace_,
)
from rankwise.lora.report import AdaptedMatrix, InjectReport
from rankwise.lora.targets import is_inside, select_heads, select_parameters, select_targets, select_tokens
from rankwise.lora.trained import (
    TiedTokenRows,
    TokenHead,
    TokenRows,
    TrainedBias,
    TrainedCopy,
    biases_off_in,
    show_biases,
    tied_to,
)
from rankwise.lora.weight_reads import members_reading, modules_read
from rankwise.lora.wrapper import Wrapper

DEFAULT_ADAPTER = "default"


@dataclass
class Injection:
    """What is in a model now; kept on the model itself under `ATTRIBUTE`."""

    requires_grad: dict[str, bool] = field(repr=False)
    """Whether each base parameter trained before."""
    configs: dict[str, LoraConfig] = field(default_factory=dict)
    """The configuration of each adapter, by the adapter's name."""
    active: dict[str, float] = field(default_factory=dict)
    """The adapters at work and the weight of each in the sum."""
    biases: list[TrainedBias] = field(default_factory=list)
    resting: dict[str, list[bool]] = field(default_factory=dict)
    """For each adapter that is not at work or is merged: which of its parameters train once it is at work again."""
    blocks: int = 0
    """How many blocks of `adapters_off` or `adapters_by_row` last, at whose end the adapters at work come back."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "blocks": 0}  # For a copy that is made in a block no end will come.


def check_free(model: nn.Module, adapter: str) -> None:
    """Raise ConfigError if this cannot name a new adapter of the model, or none can come in now."""
    check_outside_blocks(model)
    present = getattr(model, ATTRIBUTE, None)
    if present is not None and adapter in present.configs:
        raise ConfigError(
            f"this model already carries an adapter named {adapter!r}; choose another name, or take it out first: "
            "rankwise.delete_adapter_ (one adapter) or rankwise.eject_ (all)"
        )
    if (
        not isinstance(adapter, str)
        or not adapter.replace("-", "_").isidentifier()
        or hasattr(nn.ModuleDict(), adapter)
    ):
        raise ConfigError(f"{adapter!r} cannot name an adapter; take letters, digits, - and _, and no attribute's name")


class _Plan(NamedTuple):
    """What `inject_` would do."""

    report: InjectReport
    tokens: dict[str, tuple[int, ...]]
    """Those to train, by the name of their embedding."""
    modules: dict[str, nn.Module]
    """All of the base model, by name."""


def _plan(model: nn.Module, config: LoraConfig, in_file: int | None = None) -> _Plan:
    modules = dict(named_base_modules(model))
    fit.check_ours(config, modules)
    present = getattr(model, ATTRIBUTE, None)
    if present is not None and config.bias != "none" and present.biases:
        raise ConfigError(f'bias="{config.bias}": only one adapter can train biases, and one here already does')
    from_file = in_file is not None
    heads = select_heads(modules, config, type(model).__name__, from_file)
    names = select_targets(model, modules, config, heads, from_file)
    tokens = select_tokens(model, modules, config, taken={*names, *heads})
    parameters = select_parameters(modules, config, type(model).__name__, heads)
    matrices = tuple(
        AdaptedMatrix(name, *dimensions(modules[name]), config.rank_of(fit.configured_as(name, modules)))
        for name in names
    )
    for name, parameter in parameters:
        count, d, k = parameter_dimensions(modules[name], parameter)
        full_name = f"{name}.{parameter}"
        matrices += (AdaptedMatrix(full_name, d, k, config.rank_of(full_name), count),)
    fit.check_nesting(model, [*names, *tokens, *(name for name, _ in parameters)], heads)
    if present is not None and (merged := merged_adapters(model)):
        fit.check_merged(model, config, [*heads, *tokens], merged, present.biases)
        fit.refuse_change_of_merged_biases(model, present.biases, merged)
    fit.check_biases_of_B(names, modules, config)
    weights = {name: getattr(modules[name], weight_name(modules[name]), None) for name in names}
    fit.check_weights_are_finite(weights, config)
    if not from_file:
        fit.check_patterns([fit.configured_as(matrix.name, modules) for matrix in matrices], config)
    fit.check_ranks(matrices, modules, in_file)
    counts = {name: sum(p.numel() for p in modules[name].parameters()) for name in heads}
    # Parameters of adapters that are already there do not count as the base's.
    base = {id(p): p.numel() for module in modules.values() for p in module.parameters(recurse=False)}
    report = InjectReport(matrices, counts, sum(base.values()), _extra(matrices, heads, tokens, modules, config))
    return _Plan(report, tokens, modules)


def _extra(
    matrices: tuple[AdaptedMatrix, ...],
    heads: list[str],
    tokens: dict[str, tuple[int, ...]],
    modules: dict[str, Any],
    config: LoraConfig,
) -> dict[str, int]:
    rows = {f"{name}: {len(ids):,} rows": len(ids) * modules[name].weight.shape[1] for name, ids in tokens.items()}
    per_row = sum(m.d for m in matrices)
    biases = sum(bias.numel() for bias in _bias_parameters(matrices, heads, modules, config).values())
    return {
        **rows,
        **({"magnitudes": per_row} if config.use_dora else {}),
        **({"biases of B": per_row} if config.lora_bias else {}),
        **({"biases of the model": biases} if config.bias != "none" else {}),
    }


def _bias_parameters(
    matrices: tuple[AdaptedMatrix, ...], heads: list[str], modules: dict[str, nn.Module], config: LoraConfig
) -> dict[str, nn.Parameter]:
    """The base's biases that train, by the name of their module; those of `heads` train with the whole module.

    As in PEFT they are the parameters of the name "bias": an nn.MultiheadAttention's in_proj_bias stays frozen.
    """
    adapted = [m.name for m in matrices if m.name in modules]
    names = {"none": [], "lora_only": adapted, "all": list(modules)}[config.bias]
    found = {name: getattr(modules[name], "bias", None) for name in names}
    return {name: bias for name, bias in found.items() if isinstance(bias, nn.Parameter) and not is_inside(name, heads)}


def largest_ranks(model: nn.Module, config: LoraConfig) -> dict[str, int]:
    """min(d, k) of each matrix that `inject_` would adapt, by the name that its rank goes by; none can be higher.

    Raises TargetError as `inject_` does.
    """
    check_free(model, DEFAULT_ADAPTER)
    plan = _plan(model, replace(config, r=1, rank_pattern={}))
    return {fit.configured_as(m.name, plan.modules): fit.largest_rank(m, plan.modules) for m in plan.report.matrices}


def inject_(
    model: nn.Module, config: LoraConfig, generator: torch.Generator | None = None, adapter: str = DEFAULT_ADAPTER
) -> InjectReport:
    """Freeze `model` and put an adapter beside each target module, in place. At first it computes what it did before.

    `generator` draws the adapter's start values; without it they come from torch's global generator. A model may carry
    several adapters, each with its name; the new one is then the one at work, beside those that are merged (`activate_`
    chooses others).
    Returns the report of what is adapted. Raises TargetError for patterns that match nothing, ConfigError for ranks
    that do not fit or a name that is taken; the model is then unchanged.
    """
    check_free(model, adapter)
    plan = _plan(model, config)
    _put_in(model, config, adapter, plan, generator)
    return plan.report


def inject_unset_(model: nn.Module, config: LoraConfig, adapter: str, in_file: int) -> InjectReport:
    """As `inject_`, for an adapter whose values come from a file, and whose name is free (`check_free`).

    Start values are not drawn, and r may be above min(d, k), up to `in_file`, the largest rank in the file.
    """
    plan = _plan(model, config, in_file)
    _put_in(model, config, adapter, plan, None, draw=False)
    return plan.report


def _put_in(
    model: nn.Module,
    config: LoraConfig,
    adapter: str,
    plan: _Plan,
    generator: torch.Generator | None,
    draw: bool = True,
) -> None:
    report, tokens, modules = plan
    wrappers, weights = dict(named_wrappers(model)), own_weights(model) if tokens else {}
    grown: dict[str, Wrapper] = {}
    try:
        for matrix in report.matrices:
            if matrix.name not in modules:
                name, _, parameter = matrix.name.rpartition(".")
                grown[name] = wrappers[name] = layer = _wrapper(name, modules, wrappers, ParametersWrapper)
                layer.part(parameter).add(adapter, config, matrix.name, generator, draw)
                continue
            layer = _wrapper(matrix.name, modules, wrappers, layer_kind(modules[matrix.name]) or LoraLayer)
            grown[matrix.name] = layer
            if isinstance(modules[matrix.name.rpartition(".")[0]], nn.MultiheadAttention):
                layer.inside_attention = True
            layer.add(adapter, config, fit.configured_as(matrix.name, modules), generator, draw)
        for name in report.heads:
            grown[name] = layer = _wrapper(name, modules, wrappers, TrainedCopy)
            with biases_off_in(modules[name], getattr(getattr(model, ATTRIBUTE, None), "biases", ())):
                layer.add(adapter, config)
        for name, indices in tokens.items():
            kind = TokenHead if isinstance(modules[name], nn.Linear) else TokenRows
            grown[name] = layer = _wrapper(name, modules, wrappers, kind)
            layer.add(adapter, config, indices)
            for tied, tied_kind in tied_to(name, modules, weights).items():
                if not isinstance(grown.get(tied, wrappers.get(tied)), TiedTokenRows | None):
                    raise ConfigError(
                        f"{tied} uses the table of {name}, of which rows train, so it cannot be adapted or trained in "
                        "full too; leave one of them out"
                    )
                grown[tied] = wrappers.setdefault(tied, tied_kind(modules[tied], layer))
    except Exception:
        for layer in grown.values():
            layer.remove(adapter)
        raise
    _freeze(model)
    read = modules_read(modules.values())
    for layer in grown.values():
        layer.reading = members_reading(type(layer.base))
        layer.weight_is_read |= layer.base in read or bool(layer.reading)
    replace_(model, {layer.base: layer for layer in grown.values()})
    injected: Injection = getattr(model, ATTRIBUTE)
    for layer in grown.values():
        layer.injection = injected
    injected.configs[adapter] = config
    biases = _bias_parameters(report.matrices, list(report.heads), modules, config)
    injected.biases += [TrainedBias(modules[name], adapter, config) for name in biases]
    set_active(model, {**merged_adapters(model), adapter: 1.0})


def _wrapper(name: str, modules: dict[str, nn.Module], wrappers: dict[str, Wrapper], kind: type) -> Any:
    """The wrapper that is already around a module, or a new one."""
    found = wrappers.get(name)
    if found is not None and not isinstance(found, kind):
        raise ConfigError(f"{name} is already adapted as a {type(found).__name__}; it cannot be a {kind.__name__} too")
    return found if found is not None else kind(modules[name])


def _freeze(model: nn.Module) -> None:
    if getattr(model, ATTRIBUTE, None) is None:
        before = {name: p.requires_grad for name, p in named_parameters(model)}
        setattr(model, ATTRIBUTE, Injection(before))
        model.requires_grad_(False)


def check_outside_blocks(model: nn.Module) -> None:
    """Raise ConfigError in a block of `adapters_off` or `adapters_by_row`, whose end would undo a part of a change, and
    where layers are another model's."""
    check_own_wrappers(model)
    if getattr(getattr(model, ATTRIBUTE, None), "blocks", 0):
        raise ConfigError("adapters cannot change in a block of adapters_off or adapters_by_row; do it after the block")


def eject_(model: nn.Module) -> nn.Module:
    """Take all adapters out, in place: the very base modules return, every tensor bit for bit as it was.

    Returns the model. Raises ConfigError if there is no adapter.
    """
    injected = injection(model)
    check_outside_blocks(model)
    for _, layer in named_lora_layers(model):
        layer.unmerge()
    show_biases(model, injected.biases, ())  # After the layers, which put back what a merge had replaced.
    replace_(model, {layer: layer.base for _, layer in named_wrappers(model)})
    delattr(model, ATTRIBUTE)
    for name, parameter in named_parameters(model):
        # What came into the model later stays as it is.
        parameter.requires_grad_(injected.requires_grad.get(name, parameter.requires_grad))
    return model


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let the model compute as the base alone while the block lasts, merged or not, also if the block raises.

    Which adapters work, or are in the model or merged, cannot change in the block.
    """
    with ExitStack() as stack:
        for _, layer in named_wrappers(model):
            stack.enter_context(layer.off())
        # After the layers, which put back what a merge had replaced.
        stack.enter_context(biases_off(model))
        yield


@contextmanager
def biases_off(model: nn.Module) -> Iterator[None]:
    """Let the model use its own biases while the block lasts, also if the block raises."""
    injected = getattr(model, ATTRIBUTE, None) or Injection({})
    show_biases(model, injected.biases, ())
    injected.blocks += 1
    try:
        yield
    finally:
        injected.blocks -= 1
        show_biases(model, injected.biases, () if injected.blocks else injected.active)


def drop_idle_(model: nn.Module) -> None:
    """Put the base's own modules back where no adapter has a share any more."""
    replace_(model, {layer: layer.base for _, layer in named_wrappers(model) if not layer.adapters()})


def injection(model: nn.Module) -> Injection:
    """What `inject_` noted on the model; raises ConfigError if it carries no adapter."""
    found = getattr(model, ATTRIBUTE, None)
    if found is None and hasattr(getattr(model, "module", None), ATTRIBUTE):
        raise ConfigError(
            f"this is a {type(model).__name__} around the model that carries the adapter; give that one: its .module"
        )
    if found is None:
        raise ConfigError("this model carries no adapter; put one in first: rankwise.inject_(model, LoraConfig())")
    return found


def set_active(model: nn.Module, active: dict[str, float]) -> None:
    """Let these adapters, each with its weight, work in every layer where they have a share."""
    injected = injection(model)
    show_biases(model, injected.biases, active)
    injected.active = dict(active)
    for _, layer in named_wrappers(model):
        layer.activate(active)
    let_train(model)


def let_train(model: nn.Module) -> None:
    """Let the adapters train that are at work and not merged, and no others.

    What was frozen of one when it went out of work stays so when it comes back.
    """
    injected, merged = injection(model), merged_adapters(model)
    before, injected.resting = injected.resting, {}
    for name in injected.configs:
        if name in injected.active and name not in merged:
            if name in before:
                wake(parameters_of(model, name), before[name])
        elif name in before:
            injected.resting[name] = before[name]
        else:
            own = parameters_of(model, name)
            injected.resting[name] = [parameter.requires_grad for parameter in own]
            for parameter in own:
                parameter.requires_grad_(False)


def wake(parameters: list[nn.Parameter], trained: list[bool]) -> None:
    """Let those of an adapter's parameters train again that did."""
    for parameter, train in zip(parameters, trained, strict=False):
        if train:
            parameter.requires_grad_(True)


def parameters_of(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """All that an adapter trains, or would."""
    own = [parameter for _, layer in named_wrappers(model) for parameter in layer.parameters_of(adapter)]
    return own + [bias.trained for bias in injection(model).biases if bias.adapter == adapter]


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the adapters at work that train, told by the type of their layer and not by a name.

    An adapter that is merged does not train.
    """
    injected = injection(model)
    merged = merged_adapters(model)
    at_work = [name for name in injected.active if name not in merged]
    own = [p for _, layer in named_wrappers(model) for name in at_work for p in layer.parameters_of(name)]
    own += [bias.trained for bias in injected.biases if bias.adapter in at_work]
    return [parameter for parameter in own if parameter.requires_grad]


def set_adapter_training(model: nn.Module, training: bool) -> None:
    """Switch the adapters' dropout on or off. The frozen base stays in evaluation mode: it is a fixed function."""
    model.eval()
    for _, layer in named_wrappers(model):
        layer.shares.train(training)
