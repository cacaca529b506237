"""The settings of a training run: command-line flags, YAML keys and `run.yaml` are all made from this one class."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rankwise.data.shapes import Format
from rankwise.data.transcripts import TrainOn
from rankwise.errors import ConfigError, listing


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Fine-tune a base model on your own file with a low-rank adapter."""

    model: str
    """Base model: smollm2-135m, minilm-l6, a Hugging Face folder, a .gguf file or a hub id."""
    data: tuple[Path, ...]
    """Training data: files (JSONL, JSON, CSV, TSV, Parquet), folders of them, or hub data sets (OWNER/NAME@SPLIT).
    b.csv:2 counts the rows of b.csv twice."""
    out: Path
    """Folder of the run; it must not exist yet."""
    task: Literal["causal_lm", "seq_cls"] = "causal_lm"
    """causal_lm: answer prompts. seq_cls: give texts a label."""
    format: Format | None = None
    """Shape of the rows; without it, the one that most rows have."""
    columns: tuple[str, ...] = ()
    """Names of the data's own columns, such as prompt=question completion=answer."""
    train_on: TrainOn = "completion"
    """completion: every answer of a row. last: only its last answer. all: the prompts too. (causal_lm)"""
    eval_data: Path | None = None
    """Held-out data in the same shape; without it, --eval-fraction of the training data is held out."""
    eval_fraction: float = 0.1
    """Share of the training data to hold out when there is no --eval-data; 0: no evaluation."""
    eval_answers: int = 100
    """At most so many held-out prompts are answered to count exact matches (causal_lm)."""
    r: int = 8
    """Rank of the adapter."""
    lora_alpha: float = 32
    """The adapter is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input, in [0, 1)."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Module names (whole, or the last parts), or one regular expression of whole names, or all-linear."""
    epochs: float = 1.0
    """How often each row is seen."""
    max_steps: int | None = None
    """Stop after so many optimiser steps, however many epochs that is."""
    batch_size: int = 8
    """Rows in one optimiser step."""
    batches: Literal["random", "alike"] = "random"
    """random: rows in any order. alike (causal_lm): rows with the same beginning, such as a document with several
    questions, go together, up to half a batch of them, and the beginning is computed once."""
    max_length: int = 1024
    """Longest row, in tokens."""
    long_rows: Literal["error", "cut", "drop"] = "error"
    """What to do with rows longer than --max-length."""
    lr: float = 1e-3
    """Highest learning rate: reached after the first 5 % of the steps, then falling linearly to 0."""
    seed: int = 0
    """Decides the adapter's start, the order of the rows, dropout and the held-out split."""

    def __post_init__(self) -> None:
        for name in ("out", "eval_data"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else Path(value))
        entries: Any = (self.data,) if isinstance(self.data, str | Path) else self.data
        object.__setattr__(self, "data", tuple(map(Path, entries)))
        problems = list(self._problems())
        if problems:
            raise ConfigError("these settings cannot be:\n" + listing(problems))

    def _problems(self):
        if not self.data:
            yield "--data must name at least one file, folder or hub data set"
        if not 0 <= self.eval_fraction < 1:
            yield f"--eval-fraction must lie in [0, 1), found {self.eval_fraction}"
        for name in ("epochs", "lr"):
            if not getattr(self, name) > 0:
                yield f"--{name} must be above 0, found {getattr(self, name)}"
        for name, least in (("batch_size", 1), ("max_length", 2), ("eval_answers", 0), ("seed", 0)):
            if getattr(self, name) < least:
                yield f"--{name.replace('_', '-')} must be at least {least}, found {getattr(self, name)}"
        if self.batches == "alike" and self.task != "causal_lm":
            yield "--batches alike needs --task causal_lm; a classifier's rows share nothing"
        if self.max_steps is not None and self.max_steps < 1:
            yield f"--max-steps must be at least 1, found {self.max_steps}"

    @property
    def targets(self) -> tuple[str, ...] | str:
        """target_modules as LoraConfig takes them: a single entry that is not a plain name is a regular expression."""
        if len(self.target_modules) == 1 and not self.target_modules[0].replace(".", "_").isidentifier():
            return self.target_modules[0]
        return self.target_modules

    def as_dict(self) -> dict[str, Any]:
        """Plain values for YAML, enough to repeat the run."""
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
        data = [str(entry) for entry in self.data]
        lists = {"target_modules": list(self.target_modules), "columns": list(self.columns)}
        return {**plain, "data": data[0] if len(data) == 1 else data, **lists}
