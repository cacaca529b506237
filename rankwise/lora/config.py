"""The settings of a LoRA adapter, under the names that the ecosystem uses for them."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import inf
from typing import Any, Literal

from rankwise.errors import ConfigError, TargetError, listing

ALL_LINEAR = "all-linear"


class TaskType(StrEnum):
    """What the model is for. It decides which task head is trained in full and saved with the adapter."""

    CAUSAL_LM = "CAUSAL_LM"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"
    SEQ_CLS = "SEQ_CLS"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"

    @property
    def head_names(self) -> tuple[str, ...]:
        """The module names that PEFT trains and saves in full for this task."""
        match self:
            case TaskType.SEQ_CLS | TaskType.TOKEN_CLS:
                return ("classifier", "score")
            case TaskType.QUESTION_ANS:
                return ("qa_outputs",)
            case _:
                return ()


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A LoRA adapter: h = W0·x + (lora_alpha / r)·B·A·x (Hu et al. 2021, arXiv 2106.09685).

    Raises ConfigError, with every problem at once, if a value cannot be.
    """

    task_type: TaskType | str | None = None
    """What the model is for; SEQ_CLS, TOKEN_CLS and QUESTION_ANS also train the model's task head."""
    r: int = 8
    """Rank of the update."""
    lora_alpha: float = 32
    """The update is scaled by lora_alpha / r. With alpha fixed, one learning rate serves all ranks."""
    lora_dropout: float = 0.0
    """Share of the adapter's input that is dropped in training, in [0, 1)."""
    target_modules: Sequence[str] | str = ALL_LINEAR
    """A list: names that match exactly or as a dotted suffix. A string: a regular expression that matches the whole
    name, or "all-linear": every linear layer but the output head."""
    modules_to_save: Sequence[str] | None = None
    """Modules (exact name or dotted suffix) that are copied, trained in full and saved with the adapter."""
    exclude_modules: Sequence[str] | str | None = None
    """Target modules to leave out, matched as target_modules are."""
    target_parameters: Sequence[str] | None = None
    """Names (exact or dotted suffix) of parameters that get an update of their own, such as the fused 3-D weights of
    a mixture's experts: [experts, out, in], or [experts, in, out] where the module computes x·W."""
    layers_to_transform: Sequence[int] | int | None = None
    """Adapt only the blocks of these indices (the first number in a module's name)."""
    layers_pattern: Sequence[str] | str | None = None
    """Name of the list of blocks that layers_to_transform counts in, where a model has several."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for some modules: the end of a name, or a regular expression of it → r. The first match counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other values of lora_alpha for some modules, as in rank_pattern."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Whether bias vectors train too: all of the model's, or those of the adapted layers. The base's own are kept."""
    lora_bias: bool = False
    """Give B a bias: h = W0·x + scale·(B·A·x + b)."""
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    """Tokens whose rows of the embedding train, as indices, or by the name of an embedding or output head."""
    init_lora_weights: bool | str = True
    """How A and B start: True (A Kaiming-uniform, B zero), "gaussian", "orthogonal", "pissa", "pissa_niter_<n>",
    "olora", "eva", "lora_ga", "corda"; False: both random, so that the adapter changes the model from the start."""
    use_rslora: bool = False
    """Scale by lora_alpha / √r (Kalajdzievski 2023, arXiv 2312.03732) instead of lora_alpha / r."""
    use_dora: bool = False
    """Train direction and length of the rows of W apart (DoRA, Liu et al. 2024, arXiv 2402.09353)."""
    fan_in_fan_out: bool = False
    """Whether the adapted weights are stored as [in, out]. The layers themselves say so; this is a note for others."""
    inference_mode: bool = False
    """True: the adapter is not trained."""
    base_model_name_or_path: str | None = None
    """Where the base model came from; a note for whoever loads the adapter."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "task_type", _task_type(self.task_type))
        for name in (*_LISTS, "layers_to_transform", "trainable_token_indices"):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str | Mapping):
                object.__setattr__(self, name, tuple(value))
        problems = list(self._problems())
        if problems:
            raise ConfigError("invalid LoRA configuration:\n" + listing(problems))

    def _problems(self):
        if not _is_whole(self.r, 1):
            yield f"r must be a whole number of at least 1, found {self.r!r}"
        if not _is_number(self.lora_alpha) or not 0 < self.lora_alpha < inf:
            yield f"lora_alpha must be a number above 0, found {self.lora_alpha!r}"
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            yield f"lora_dropout must lie in [0, 1), found {self.lora_dropout!r}"
        trained = self.target_modules, self.target_parameters, self.trainable_token_indices, self.modules_to_save
        if not any(trained) and not self.task_heads:
            yield "target_modules is empty; name at least one module, or leave it out for all linear layers"
        for name in _LISTS:
            value = getattr(self, name)
            names = value if isinstance(value, tuple) else [value]
            if value is not None and not all(isinstance(entry, str) for entry in names):
                yield f"{name} must hold names, found {value!r}"
        for name in ("modules_to_save", "target_parameters"):
            if isinstance(getattr(self, name), str):
                yield f'{name} must be a list, found a string; write ["{getattr(self, name)}"]'
        yield from self._problems_of_patterns()
        tokens = self.trainable_token_indices
        by_name = tokens if isinstance(tokens, Mapping) else {"": tokens}
        if tokens is not None and not all(isinstance(key, str) and _are_indices(own) for key, own in by_name.items()):
            yield f"trainable_token_indices must be indices from 0, or {{name of a module: indices}}, found {tokens!r}"
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                yield f"{name} must be True or False, found {getattr(self, name)!r}"
        if self.bias not in ("none", "all", "lora_only"):
            yield f'bias must be "none", "all" or "lora_only", found {self.bias!r}'
        start = self.init_lora_weights
        if not isinstance(start, bool) and not (isinstance(start, str) and _STARTS.fullmatch(start)):
            yield f"init_lora_weights {start!r} is not known; choose True, False, {', '.join(STARTS)}"
        if self.lora_bias and (self.use_dora or not isinstance(start, bool)):
            yield "lora_bias goes with the plain layer (use_dora off) and init_lora_weights True or False alone"

    def _problems_of_patterns(self):
        for name, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
            patterns = getattr(self, name)
            if not isinstance(patterns, dict):
                yield f"{name} must map names to numbers, found {patterns!r}"
                continue
            for key, value in patterns.items():
                fits = _is_whole(value, 1) if least else _is_number(value) and 0 < value < inf
                if not fits:
                    wanted = "a whole number of at least 1" if least else "above 0"
                    yield f"{name}[{key!r}] must be {wanted}, found {value!r}"
                if not isinstance(key, str) or not _compiles(key):
                    yield f"{name} key {key!r} is not a regular expression"
        indices = self.layers_to_transform
        if indices is not None:
            if not _are_indices(indices if isinstance(indices, tuple) else [indices]):
                yield f"layers_to_transform must hold indices from 0, found {indices!r}"
            if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
                yield "layers_to_transform goes with a list of target_modules; a regular expression can name the layers"
        elif self.layers_pattern:
            yield "layers_pattern says where layers_to_transform counts, which is not set"

    def rank_of(self, name: str) -> int:
        """The rank of the update of a module."""
        return _first_match(self.rank_pattern, name, self.r)

    def scale_of(self, name: str) -> float:
        """The factor before B·A in a module."""
        alpha, r = _first_match(self.alpha_pattern, name, self.lora_alpha), self.rank_of(name)
        return alpha / r**0.5 if self.use_rslora else alpha / r

    def lowered_to(self, limits: Mapping[str, int]) -> "LoraConfig":
        """The same with the rank of each module at most its limit; `limits`: of all adapted ones, by whole name.

        The scales stay.
        """
        ranks = {name: limit for name, limit in limits.items() if limit < self.rank_of(name)}
        alphas = {name: self.scale_of(name) * (r**0.5 if self.use_rslora else r) for name, r in ranks.items()}
        return replace(
            self,
            rank_pattern=exact_patterns(ranks, limits) | dict(self.rank_pattern),
            alpha_pattern=exact_patterns(alphas, limits) | dict(self.alpha_pattern),
        )

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of all modules that are trained in full: the user's own and the task's."""
        own = tuple(self.modules_to_save or ())
        return own + tuple(name for name in self.task_heads if name not in own)

    @property
    def task_heads(self) -> tuple[str, ...]:
        """Names of the heads that the task trains in full, whether a model has them or not."""
        return TaskType(self.task_type).head_names if self.task_type is not None else ()


_LISTS = ("target_modules", "modules_to_save", "exclude_modules", "target_parameters", "layers_pattern")
_SWITCHES = ("lora_bias", "use_rslora", "use_dora", "fan_in_fan_out", "inference_mode")
STARTS = ("gaussian", "orthogonal", "pissa", "pissa_niter_<n>", "olora", "eva", "lora_ga", "corda")
_STARTS = re.compile("|".join(STARTS).replace("<n>", "[1-9][0-9]*"))


def matches_name(name: str, pattern: str) -> bool:
    """Whether a module's dotted name is `pattern` or ends with ".pattern"."""
    return name == pattern or name.endswith("." + pattern)


def matches_head(name: str, entry: str) -> bool:
    """Whether an entry of modules_to_save, or a task's head name, means the module `name`: PEFT asks no dot before it.

    So "norm" means each block's input_layernorm too, and a DistilBERT's pre_classifier trains with its classifier.
    """
    return name.endswith(entry)


def lies_in_head(name: str, entries: Iterable[str]) -> bool:
    """Whether a module is one that an entry of modules_to_save means, or lies in one."""
    parts = name.split(".")
    outer = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(matches_head(module, entry) for module in outer for entry in entries)


def matches_target(name: str, pattern: str, as_regex: bool) -> bool:
    """Whether an entry of target_modules (or, `as_regex`, all of it) means the module `name`. Raises TargetError."""
    if not as_regex:
        return matches_name(name, pattern)
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise TargetError(f"{pattern!r} is not a regular expression: {error}") from None


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern means the module `name`."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def exact_patterns(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Patterns that give each module in `values`, and no other one of `names`, its value."""

    def pattern(name: str) -> str:
        # A pattern also means what ends like it after a dot, if it is not tied to the beginning.
        return ("^" if any(other.endswith("." + name) for other in names) else "") + re.escape(name)

    return {pattern(name): value for name, value in values.items()}


def _first_match(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    return next((value for pattern, value in patterns.items() if pattern_matches(pattern, name)), otherwise)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _task_type(value: TaskType | str | None) -> TaskType | None:
    if value is None:
        return None
    try:
        return TaskType(value)
    except ValueError:
        names = ", ".join(TaskType)
        raise ConfigError(f"task_type {value!r} is not known; choose one of {names}, or None") from None


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _are_indices(value: object) -> bool:
    return isinstance(value, Iterable) and all(_is_whole(index, 0) for index in value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
