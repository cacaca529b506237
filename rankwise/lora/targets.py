"""Which modules an adapter goes to: the selection rules of PEFT, but a pattern that matches nothing is an error."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from rankwise.errors import TargetError, listing, nearest
from rankwise.lora.base_weight import dimensions, is_conv1d
from rankwise.lora.config import ALL_LINEAR, LoraConfig, matches_head, matches_name, matches_target
from rankwise.lora.kinds import computes_otherwise, unsupported_reason
from rankwise.lora.narrow import is_plain_linear
from rankwise.lora.places import own_weights

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _maps_to_one_vector(module: nn.Module) -> bool:
    """Whether a layer gives d numbers for k; what derives from nn.Linear may do more, such as a mixture's router."""
    if not isinstance(module, nn.Linear) or is_plain_linear(module) or type(module).forward is nn.Linear.forward:
        return True
    weight = module.weight
    if not weight.is_floating_point():  # A quantised layer, which has to have its own forward.
        return True
    try:
        with torch.no_grad():
            result = module(torch.zeros(1, module.in_features, dtype=weight.dtype, device=weight.device))
    except Exception:  # It takes something else than one vector.
        return False
    return isinstance(result, torch.Tensor) and result.shape == (1, module.out_features)


def select_heads(modules: Mapping[str, nn.Module], config: LoraConfig, kind: str, from_file: bool = False) -> list[str]:
    """Names of the modules to train in full, in the model's order; `kind` is the model's type, for messages.

    Raises TargetError if an entry of modules_to_save, or every head name of the task, matches nothing. With `from_file`
    entries may match nothing, as PEFT lets them: that all is there, the tensors of the file tell.
    """
    names = [name for name in modules if name]
    chosen = [name for name in names if any(matches_head(name, head) for head in config.heads)]
    unmatched = [entry for entry in config.modules_to_save or () if not any(matches_head(n, entry) for n in names)]
    unmatched = [] if from_file else unmatched
    problems = [f"modules_to_save {entry!r} matches no module{nearest(entry, _endings(names))}" for entry in unmatched]
    problems += [
        f"{name} is a {type(modules[name]).__name__}, which a model never calls itself; name what is in it"
        for name in chosen
        if isinstance(modules[name], _CONTAINERS)
    ]
    problems += [
        f"{name} holds numbers that cannot train (quantised?)"
        for name in chosen
        if not all(parameter.is_floating_point() for parameter in modules[name].parameters())
    ]
    if config.task_heads and not chosen and not from_file:
        wanted = " or ".join(config.task_heads)
        problems.append(
            f"task_type {config.task_type} trains a head named {wanted}; this model has none (modules_to_save names "
            "heads that are called otherwise)"
        )
    if problems:
        raise TargetError(f"{kind} lacks modules that the configuration names:\n" + listing(problems))
    return [name for name in chosen if not is_inside(name, set(chosen) - {name})]


def select_targets(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    heads: Iterable[str],
    from_file: bool = False,
) -> list[str]:
    """Names of the modules that get an update, in the model's order; modules inside `heads` are left out.

    `modules` are those of the base model by name. Raises TargetError, with every problem and the nearest names, if a
    pattern matches nothing or a module that cannot carry an adapter. With `from_file` some patterns may match nothing.
    """
    heads = set(heads)
    free = {name: module for name, module in modules.items() if name and not is_inside(name, heads)}
    problems: list[str] = []
    unmatched: list[str] = []
    if config.target_modules == ALL_LINEAR:
        chosen = _all_linear(model, free, modules)
        if not chosen:
            raise TargetError(f"{type(model).__name__} has no linear layer to adapt; name modules in target_modules")
    else:
        chosen = _matching("target_modules", config.target_modules, free, unmatched)
    if not (from_file and chosen):
        problems += unmatched
    if config.exclude_modules:
        left_out = set(_matching("exclude_modules", config.exclude_modules, free, [] if from_file else problems))
        if chosen and not from_file and left_out.issuperset(chosen):
            problems.append("exclude_modules leaves out every module that target_modules names")
        chosen = [name for name in chosen if name not in left_out]
    chosen = _in_layers(chosen, config, problems)
    problems += [
        f"{name}: {reason}"
        for name in chosen
        if (reason := unsupported_reason(modules[name], modules[name.rpartition(".")[0]]))
    ]
    if problems:
        raise TargetError(f"the configuration does not fit {type(model).__name__}:\n" + listing(problems))
    outputs = [f"{name}.out_proj" for name in chosen if isinstance(modules[name], nn.MultiheadAttention)]
    return sorted({*chosen, *outputs}, key=list(free).index) if outputs else chosen


def select_parameters(
    modules: Mapping[str, nn.Module], config: LoraConfig, kind: str, heads: Iterable[str]
) -> list[tuple[str, str]]:
    """(module, parameter) of each bare parameter that gets an update, in the model's order; none inside `heads`.

    Raises TargetError for an entry that matches none; `kind` is the model's type, for messages.
    """
    wanted = config.target_parameters
    if not wanted:
        return []
    there = [
        (name, parameter)
        for name, module in modules.items()
        for parameter, _ in module.named_parameters(recurse=False)
        if name and not is_inside(name, heads)
    ]
    chosen = [(m, p) for m, p in there if any(matches_name(f"{m}.{p}", entry) for entry in wanted)]
    problems = [
        f"target_parameters {entry!r} matches none{nearest(entry, [p for _, p in there])}"
        for entry in wanted
        if not any(matches_name(f"{m}.{p}", entry) for m, p in chosen)
    ]
    if problems:
        raise TargetError(f"the configuration does not fit {kind}:\n" + listing(problems))
    return chosen


def select_tokens(
    model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig, taken: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """The tokens whose rows train, by the name of their embedding or output head.

    Raises TargetError for what cannot be.
    """
    wanted = config.trainable_token_indices
    if not wanted:
        return {}
    if not isinstance(wanted, Mapping):
        try:
            embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        except NotImplementedError:  # transformers' way to say that there are none
            embeddings = None
        found = [name for name, module in modules.items() if module is getattr(embeddings, "base", embeddings)]
        if not found:
            raise TargetError("trainable_token_indices: the model names no input embedding; give {name: indices}")
        wanted = {found[0]: wanted}
    chosen: dict[str, tuple[int, ...]] = {}
    problems: list[str] = []
    weights = own_weights(model)
    for pattern, indices in wanted.items():
        for name in _matching("trainable_token_indices", [pattern], modules, problems):
            module = modules[name]
            shared = [other for other in chosen if weights[other] is weights[name]]
            if not isinstance(module, nn.Embedding | nn.Linear):
                kind = type(module).__name__
                problems.append(f"trainable_token_indices {name}: a {kind} is neither an embedding nor an output head")
            elif reason := computes_otherwise(module):
                problems.append(f"trainable_token_indices {name}: {reason}")
            elif shared and chosen[shared[0]] == tuple(dict.fromkeys(indices)):
                continue  # They are the same rows.
            elif shared:
                problems.append(
                    f"trainable_token_indices {name}: it shares its table with {shared[0]}; give both the same"
                )
            elif wrong := [index for index in indices if not 0 <= index < len(module.weight)]:
                problems.append(f"trainable_token_indices {name}: there are no rows {wrong[:5]}")
            elif name in set(taken):
                problems.append(f"trainable_token_indices {name}: it is adapted or trained in full already")
            else:
                chosen[name] = tuple(dict.fromkeys(indices))
    if problems:
        raise TargetError(f"the configuration does not fit {type(model).__name__}:\n" + listing(problems))
    return chosen


def _all_linear(model: nn.Module, free: dict[str, nn.Module], modules: Mapping[str, nn.Module]) -> list[str]:
    head = _output_head(model)
    return [
        name
        for name, module in free.items()
        if is_linear(module)
        and min(dimensions(module)) > 1  # The update of a vector, such as a gate's, has no low rank.
        and module is not getattr(head, "base", head)
        and not unsupported_reason(module, modules[name.rpartition(".")[0]])
        and _maps_to_one_vector(module)
    ]


def _matching(
    option: str, wanted: Sequence[str] | str, modules: Mapping[str, nn.Module], problems: list[str]
) -> list[str]:
    """The names that the patterns match, in the model's order; patterns that match nothing go to `problems`."""
    as_regex = isinstance(wanted, str)
    chosen: set[str] = set()
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        matched = [name for name in modules if name and matches_target(name, pattern, as_regex)]
        if not matched:
            problems.append(f"{option}: " + _nothing_matched(pattern, as_regex, modules))
        chosen.update(matched)
    return [name for name in modules if name in chosen]


def _in_layers(names: list[str], config: LoraConfig, problems: list[str]) -> list[str]:
    """Those of the modules that lie in the blocks of layers_to_transform."""
    if config.layers_to_transform in (None, ()):
        return names
    wanted = config.layers_to_transform
    wanted = {wanted} if isinstance(wanted, int) else set(wanted)
    pattern = config.layers_pattern or ()
    lists = "|".join([pattern] if isinstance(pattern, str) else pattern) or r"[^.]*"
    # The first number counts: a second one is, for example, that of an expert.
    place = re.compile(rf"(?:^|.*?\.)(?:{lists})\.(\d+)\.")
    index = {name: int(found.group(1)) for name in names if (found := place.match(name))}
    if missing := sorted(wanted - set(index.values())):
        there = f"0 to {max(index.values())}" if index else "none"
        problems.append(f"layers_to_transform: no adapted module lies in the blocks {missing} (there are: {there})")
    return [name for name in names if index.get(name) in wanted]


def shortest_names(adapted: Iterable[str], others: Iterable[str]) -> list[str] | str:
    """The shortest dotted suffixes that match the adapted modules and none of the other ones, sorted.

    A regular expression of all names, if another module's name ends as a whole one of theirs.
    """
    adapted = sorted(adapted)
    taken = {ending for name in others for ending in _suffixes(name)}
    if not taken.isdisjoint(adapted):
        return "|".join(map(re.escape, adapted))
    return sorted({next(s for s in _suffixes(name) if s not in taken) for name in adapted})


def _nothing_matched(pattern: str, as_regex: bool, modules: Mapping[str, nn.Module]) -> str:
    if as_regex and any(matches_name(name, pattern) for name in modules):
        return (
            f"the regular expression {pattern!r} must match a module's whole name; "
            f'to match by the last part write target_modules=["{pattern}"]'
        )
    able = [name for name, module in modules.items() if name and not unsupported_reason(module, None)]
    kind = "the regular expression " if as_regex else ""
    choices = nearest(pattern, [*_endings(able), *able])
    return f"{kind}{pattern!r} matches no module" + (choices or f" (there are: {', '.join(_endings(able)[:12])})")


def _output_head(model: nn.Module) -> nn.Module | None:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    return get_output_embeddings() if get_output_embeddings else None


def _endings(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _suffixes(name: str) -> Iterator[str]:
    """The dotted endings of a name, the shortest first."""
    start = len(name)
    while (start := name.rfind(".", 0, start)) >= 0:
        yield name[start + 1 :]
    yield name


def is_inside(name: str, heads: Iterable[str]) -> bool:
    """Whether a module is one of `heads` or lies in one of them."""
    return any(name == head or name.startswith(head + ".") for head in heads)
