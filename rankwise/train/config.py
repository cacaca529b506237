"""The settings of a training run: command-line flags, YAML keys and `run.yaml` are all made from this one class."""

from dataclasses import asdict, dataclass, fields
from math import inf
from numbers import Number
from os.path import expanduser
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import yaml

from rankwise.data.shapes import ASKING, TASK_TYPES, Format, Task
from rankwise.data.transcripts import TrainOn
from rankwise.errors import ConfigError, listing
from rankwise.lora.config import LoraConfig
from rankwise.plan.memory_options import MemoryOptions
from rankwise.train.setting_types import entries, fits, wanted
from rankwise.train.trackers import TrackerName

AUTO_RANK = 32
"""The rank that trains where the rank is to be found: most tasks need less."""
FIXED_RANK = 8
"""The rank of --r auto where nothing can show which one is enough."""
ROWS_TO_CHOOSE = 75
"""Held-out rows without which `rankwise shrink` cannot choose ranks."""
STATES_GB = 4.0
"""Room in the user's cache for the states of frozen blocks, where they are used again."""
MOST_STEPS = 10**6
"""All steps are planned before the first."""
MOST_SEED = 2**64 - 1
"""PyTorch takes no larger one."""
LEAST = {
    "cache_gb": 0,
    "batch_size": 1,
    "batch_tokens": 1,
    "accumulate": 1,
    "max_length": 2,
    "max_steps": 1,
    "eval_answers": 0,
    "eval_steps": 0,
    "patience": 0,
    "save_steps": 1,
    "seed": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
}
"""The least value of a setting."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Fine-tune a base model on your own file with a low-rank adapter.

    --resume RUN goes on with an interrupted run, with the settings in its run.yaml and no others. --print-config prints
    the settings as run.yaml would hold them, and does nothing else.
    """

    needs_data: ClassVar[bool] = True

    model: str
    """Base model: smollm2-135m, minilm-l6, a Hugging Face folder, a .gguf file or a hub id."""
    data: tuple[Path, ...]
    """Training data: files (JSONL, JSON, CSV, TSV, Parquet, CoNLL, .txt), folders of them, or hub data sets
    (OWNER/NAME:CONFIGURATION@SPLIT). b.csv:2 counts the rows of b.csv twice."""
    out: Path
    """Folder of the run; it must not exist yet."""
    task: Task = "causal_lm"
    """causal_lm: answer prompts. seq_cls: give texts a label, or several. token_cls: give each word a tag. embedding:
    bring texts that belong together near to each other. seq2seq_lm: answer prompts with an encoder and a decoder (T5,
    BART)."""
    format: Format | None = None
    """Shape of the rows; without it, the one that most rows have."""
    columns: tuple[str, ...] = ()
    """Names of the data's own columns, such as prompt=question completion=answer."""
    train_on: TrainOn = "completion"
    """completion: every answer of a row. last: only its last answer. all: the prompts too. (causal_lm)"""
    eval_data: tuple[Path, ...] = ()
    """Held-out data in the same shape, named as --data is; without it, --eval-fraction of the training data is held
    out."""
    eval_fraction: float | Literal["auto"] = "auto"
    """Share of the training data to hold out when there is no --eval-data; auto: a tenth, but at most 600 rows, which
    tell enough and are soon evaluated; 0: no evaluation."""
    eval_answers: int = 100
    """At most so many held-out prompts are answered to count exact matches (causal_lm, seq2seq_lm)."""
    metrics: bool = False
    """Measure BLEU, chrF and ROUGE of these answers too; needs pip install 'rankwise[metrics]'."""
    r: int | Literal["auto"] = "auto"
    """Rank of the adapter. auto: trains at rank 32, then cuts each module to the smallest rank that the held-out rows
    show to be as good (rankwise shrink); rank 8, uncut, where fewer than 75 rows are held out."""
    lora_alpha: float = 32.0
    """The adapter is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input, in [0, 1)."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Module names (whole, or the last parts), or one regular expression of whole names, or all-linear."""
    layers_to_transform: tuple[int, ...] = ()
    """Adapt only the blocks of these indices, counted from 0; without it, all. What enters the lowest adapted block is
    then computed once a row and kept (--cache-gb)."""
    init_lora_weights: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva", "corda", "lora_ga"] = (
        "default"
    )
    """How the adapter starts; docs/variants.md compares them."""
    use_rslora: bool = False
    """Scale the adapter by lora_alpha / √r (rsLoRA)."""
    use_dora: bool = False
    """Train the length of each row of the weights beside the adapter (DoRA)."""
    epochs: float = 1.0
    """How often each row is seen."""
    max_steps: int | None = None
    """Stop after so many optimiser steps, however many epochs that is."""
    batch_size: int = 8
    """Rows in one batch."""
    batch_tokens: int | None = None
    """Instead of --batch-size: as many rows in one batch as fit into so many tokens."""
    accumulate: int = 1
    """Batches in one optimiser step; their loss is the mean over all of its trained tokens (of embedding, over all
    rows, each told apart from the others of its own batch)."""
    batches: Literal["random", "alike"] = "random"
    """random: rows in any order. alike (causal_lm): rows with the same beginning, such as a document with several
    questions, go together, up to half a batch of them, and the beginning is computed once."""
    max_length: int = 1024
    """Longest row, in tokens."""
    long_rows: Literal["error", "cut", "drop"] = "error"
    """What to do with rows longer than --max-length."""
    lr: float | Literal["auto"] | None = None
    """Highest learning rate; without it 1e-3, and 1.5e-3 for a run of fewer than 100 steps. auto: the best of a third,
    once and three times that, after a short check on the first steps' rows."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up: falling to 0 along a line or a cosine, or staying."""
    warmup: float = 0.05
    """Share of the steps, in [0, 1], in which the learning rate rises to its highest."""
    weight_decay: float = 0.0
    """Decoupled decay of the adapter's factors A and B: each step multiplies them by 1 - rate · weight_decay."""
    max_grad_norm: float = 1.0
    """A longer gradient (2-norm over all trained numbers) is shortened to this length; 0: none is."""
    label_smoothing: float = 0.0
    """Share in [0, 1) of a target's probability that training spreads over all tokens (labels). Held-out losses are
    those without."""
    lora_plus_ratio: float = 1.0
    """The factor B learns so many times faster than A (LoRA+)."""
    preconditioned: bool = False
    """Precondition the gradients of A and B by r × r matrices: a step then depends less on the rank and the scale."""
    eval_steps: int | None = None
    """Measure the held-out loss every so many steps and keep the best adapter; 0: never. Without it, five times a
    run, on as many of the rows as a tenth of the training's work allows."""
    patience: int = 3
    """Stop after so many of these evaluations without a new best; 0: never."""
    save_steps: int | None = None
    """Save a checkpoint every so many steps; without it, about ten times a run. The last two are kept."""
    tracker: tuple[TrackerName, ...] = ()
    """Send the curves there too; tensorboard and aim write into the run's folder."""
    base_dtype: Literal["fp32", "bf16"] = "fp32"
    """How the frozen weights are kept: bf16 takes half the memory, and is exact for a model that is published in it.
    The computation, the adapter and all that trains are in fp32 either way."""
    recompute: Literal["never", "always", "auto"] = "never"
    """Keep of each block its input alone and compute its activations again in the backward pass: the same numbers with
    less memory, in more time. auto: if the run would otherwise need more memory than is free (docs/engine.md)."""
    cache_gb: float | None = None
    """How much of the user's cache folder the hidden states may take that enter the lowest adapted block; they are the
    same in every epoch, rank and seed. Without it, 4 where a row runs more than once. 0: none are kept."""
    explain_engine: bool = False
    """Say before training which of the engine's techniques the run uses, and why not the others."""
    seed: int = 0
    """Decides the adapter's start, the order of the rows, dropout and the held-out split."""

    def __post_init__(self) -> None:
        hints, wrong = get_type_hints(type(self)), []
        for name in (setting.name for setting in fields(self)):
            given, hint = getattr(self, name), hints[name]
            value = _taken(given, hint)
            if not fits(value, hint):
                wrong.append(f"--{name.replace('_', '-')} must be {wanted(hint)}, found {given!r}")
                # What is said of the other settings is said as if this one had not been given.
                value = getattr(type(self), name, None)
            object.__setattr__(self, name, value)
        problems = [*wrong, *self._problems()]
        if problems:
            raise ConfigError("invalid settings:\n" + listing(problems))

    def _problems(self):
        if self.needs_data and not self.data:
            yield "--data must name at least one file, folder or hub data set"
        if self.r != "auto" and self.r < 1:
            yield f"--r must be a whole number of at least 1, or auto, found {self.r}"
        if not 0 <= self.lora_dropout < 1:
            yield f"--lora-dropout must lie in [0, 1), found {self.lora_dropout}"
        if self.eval_fraction != "auto" and not 0 <= self.eval_fraction < 1:
            yield f"--eval-fraction must lie in [0, 1), found {self.eval_fraction}"
        if not 0 <= self.warmup <= 1:
            yield f"--warmup must lie in [0, 1], found {self.warmup}"
        if not 0 <= self.label_smoothing < 1:
            yield f"--label-smoothing must lie in [0, 1), found {self.label_smoothing}"
        for name in ("lora_alpha", "epochs", "lr", "lora_plus_ratio"):
            value = getattr(self, name)
            if value not in (None, "auto") and not 0 < value < inf:
                yield f"--{name.replace('_', '-')} must be above 0 and finite, found {value}"
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < inf:
                yield f"--{name.replace('_', '-')} must be a number of at least {least}, found {value}"
        for name, most in {"max_steps": MOST_STEPS, "seed": MOST_SEED}.items():
            if (getattr(self, name) or 0) > most:
                yield f"--{name.replace('_', '-')} can be at most {most:,}, found {getattr(self, name):,}"
        if self.eval_data and self.eval_fraction != "auto":
            yield "--eval-data and --eval-fraction both say what is held out; give one of them"
        # A value that is the default need not have been given.
        waits = self.patience not in (0, type(self).patience)
        answers = self.eval_answers not in (0, type(self).eval_answers)
        needing = {
            "eval-steps": self.eval_steps,
            f"patience {self.patience}": waits,
            "eval-answers": answers,
            "metrics": self.metrics,
        }
        if not self.eval_data and not self.eval_fraction:
            for option in (option for option, asked in needing.items() if asked):
                yield f"--{option} needs held-out data; give --eval-data, or an --eval-fraction above 0"
        if waits and self.eval_steps == 0:
            yield f"--patience {self.patience} waits for held-out losses, which --eval-steps 0 never measures; give one"
        if self.batch_tokens is not None and self.batch_size != type(self).batch_size:
            yield "--batch-tokens and --batch-size both say how large a batch is; give one of them"
        if answers and self.task not in ASKING:
            yield f"--eval-answers needs --task {' or '.join(ASKING)}; other tasks have no answers"
        if self.metrics and self.task not in ASKING:
            yield f"--metrics needs --task {' or '.join(ASKING)}; what other tasks measure is always measured"
        if self.metrics and not self.eval_answers:
            yield "--metrics measures answers; give --eval-answers above 0"
        if self.batches == "alike" and self.task != "causal_lm":
            yield "--batches alike needs --task causal_lm; rows of other tasks share nothing"
        if self.train_on != "completion" and self.task != "causal_lm":
            yield f"--train-on {self.train_on} needs --task causal_lm"
        if self.task == "embedding" and self.batch_size < 2:
            yield "--task embedding needs --batch-size of at least 2: a row is told apart from the others of its batch"
        if self.task == "embedding" and self.label_smoothing:
            yield "--label-smoothing does not go with --task embedding, whose texts are right or not"

    @property
    def takes_rows_as_they_come(self) -> bool:
        """Whether the plan of a run follows from the number of the rows, whatever is in them."""
        return self.batches == "random" and self.batch_tokens is None and self.long_rows != "drop"

    @property
    def memory_options(self) -> MemoryOptions:
        """The settings that trade memory for time, as a plan takes them; "auto" is yet to be settled."""
        return MemoryOptions(base_dtype=self.base_dtype, recompute=self.recompute == "always")

    def state_bytes(self, rows_run_again: bool) -> float:
        """How much of the cache the states of frozen blocks may take."""
        gigabytes = self.cache_gb if self.cache_gb is not None else STATES_GB if rows_run_again else 0
        return gigabytes * 1e9

    def why_rank_is_fixed(self, held_out: int | None = None) -> str | None:
        """Why the ranks are not chosen after training; None if they are. `held_out`: rows that can
        choose them, where that is known."""
        if self.r != "auto":
            return "--r is given"
        if not self.eval_data and not self.eval_fraction:
            return "nothing is held out to choose ranks by"
        if self.use_dora:
            return "an adapter with --use-dora cannot be cut"
        if held_out is not None and held_out < ROWS_TO_CHOOSE:
            return (
                f"{held_out} held-out rows are too few to choose ranks by (at least {ROWS_TO_CHOOSE} are needed that "
                "ask different things and are not left out as too long)"
            )
        return None

    def trained_rank(self, held_out: int | None = None) -> int:
        """The rank that trains."""
        if self.r != "auto":
            return self.r
        return FIXED_RANK if self.why_rank_is_fixed(held_out) else AUTO_RANK

    def rank_rule(self, held_out: int | None = None) -> str:
        """What becomes of --r auto, in one line."""
        if reason := self.why_rank_is_fixed(held_out):
            return f"--r auto: rank {FIXED_RANK}, which stays, because {reason}"
        return f"--r auto: rank {AUTO_RANK} trains; then each module is cut to what the held-out rows show to be enough"

    @property
    def targets(self) -> tuple[str, ...] | str:
        """target_modules as LoraConfig takes them: a single entry that is not a plain name is a regular expression."""
        if len(self.target_modules) == 1 and not self.target_modules[0].replace(".", "_").isidentifier():
            return self.target_modules[0]
        return self.target_modules

    def lora(self, rank: int, left_out: tuple[str, ...] | None = None) -> LoraConfig:
        """The settings of an adapter of this rank. `left_out`: modules that no target means."""
        return LoraConfig(
            task_type=TASK_TYPES[self.task],
            r=rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.targets,
            exclude_modules=left_out,
            layers_to_transform=self.layers_to_transform or None,
            init_lora_weights=True if self.init_lora_weights == "default" else self.init_lora_weights,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            base_model_name_or_path=self.model,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for YAML, enough to repeat the run."""
        settings = {name: _plain(value) for name, value in asdict(self).items()}
        for name in ("data", "eval_data"):
            if len(settings[name]) == 1:
                settings[name] = settings[name][0]
        return settings

    def as_yaml(self) -> str:
        """The content of run.yaml; `--config` reads it back."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)


def _taken(value: Any, hint: Any) -> Any:
    """What a setting of a type takes a value for: one entry for a list of one, text for a path, where ~ is the user's
    folder, a path for text, a number of NumPy's, which YAML does not know, for a plain one."""
    if get_origin(hint) is tuple:
        return tuple(_taken(entry, get_args(hint)[0]) for entry in entries(value))
    if isinstance(value, str | Path) and Path in (hint, *get_args(hint)):
        return Path(expanduser(value))
    if isinstance(value, Number):
        return getattr(value, "item", lambda: value)()
    return str(value) if isinstance(value, Path) and hint is str else value


def _plain(value: Any) -> Any:
    """Paths as strings and tuples as lists."""
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
