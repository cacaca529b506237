"""The settings of a LoRA adapter, under the names that the ecosystem uses for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from rankwise.errors import ConfigError, listing

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
    inference_mode: bool = False
    """True: the adapter is not trained."""
    base_model_name_or_path: str | None = None
    """Where the base model came from; a note for whoever loads the adapter."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "task_type", _task_type(self.task_type))
        for name in ("target_modules", "modules_to_save"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        problems = list(self._problems())
        if problems:
            raise ConfigError("this LoRA configuration cannot be:\n" + listing(problems))

    def _problems(self):
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            yield f"r must be a whole number of at least 1, found {self.r!r}"
        if not _is_number(self.lora_alpha) or self.lora_alpha <= 0:
            yield f"lora_alpha must be a number above 0, found {self.lora_alpha!r}"
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            yield f"lora_dropout must lie in [0, 1), found {self.lora_dropout!r}"
        if not self.target_modules:
            yield "target_modules is empty; name at least one module, or leave it out for all linear layers"
        for name in ("target_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, tuple) and not all(isinstance(entry, str) for entry in value):
                yield f"{name} must hold names, found {value!r}"
        if isinstance(self.modules_to_save, str):
            yield f'modules_to_save must be a list, found a string; write ["{self.modules_to_save}"]'

    @property
    def scale(self) -> float:
        """The factor before B·A."""
        return self.lora_alpha / self.r

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of all modules that are trained in full: the user's own and the task's."""
        own = tuple(self.modules_to_save or ())
        return own + tuple(name for name in self.task_heads if name not in own)

    @property
    def task_heads(self) -> tuple[str, ...]:
        """Names of the heads that the task trains in full, whether a model has them or not."""
        return TaskType(self.task_type).head_names if self.task_type is not None else ()


def _task_type(value: TaskType | str | None) -> TaskType | None:
    if value is None:
        return None
    try:
        return TaskType(value)
    except ValueError:
        names = ", ".join(TaskType)
        raise ConfigError(f"task_type {value!r} is not known; choose one of {names}, or None") from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
