"""What an adapter folder holds, what its updates look like, and which programs will load it. Nothing here decides."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rankwise.errors import CheckpointError
from rankwise.lora import format
from rankwise.lora.checkpoint import Adapter, read_adapter, read_stored
from rankwise.lora.config import LoraConfig
from rankwise.lora.inject import DEFAULT_ADAPTER
from rankwise.lora.low_rank import LowRank
from rankwise.lora.places import named_lora_layers
from rankwise.lora.report import TrainedUpdate
from rankwise.rank.spectrum import effective_rank, singular_values, sparkline, stable_rank

INTRUDER_VECTORS = 10
"""Singular vectors of W0 + ΔW that are looked at for intruders."""
INTRUDER_MAX_COSINE = 0.5
"""A singular vector of W0 + ΔW is an intruder if its |cos| to every one of W0's is below this."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be (vLLM 0.14 to 0.22, vllm/config/lora.py); the default is 16."""
VLLM_WITH = (
    "Cohere|Cohere2|Ernie4_5|Exaone|Exaone4|GPTBigCode|Gemma|Gemma2|Gemma3|Gemma4|Glm|Glm4|Glm4Moe|GptOss|"
    "Granite|GraniteMoe|InternLM2|InternLM3|Lfm2|Llama|MiniCPM|MiniCPM3|Mistral|Mixtral|Nemotron|NemotronH|"
    "Olmo|Olmo2|Olmo3|Phi|Phi3|PhiMoE|Qwen2|Qwen2Moe|Qwen3|Qwen3Moe|Qwen3Next|SeedOss|SmolLM3|Starcoder2"
)
"""Families (…ForCausalLM) that vLLM has LoRA for, by docs/models/supported_models.md of 2026."""
VLLM_WITHOUT = (
    "Bert|Bloom|Falcon|FalconMamba|GPT2|GPTJ|GPTNeoX|Mamba|Mamba2|ModernBert|Mpt|OPT|Olmoe|Roberta|StableLm|XLMRoberta"
)
"""Families that it computes but declares no SupportsLoRA for (there, and bert.py, roberta.py, modernbert.py)."""

OF_DORA = (
    "DoRA: the singular values and both ranks are those of scale·B·A alone; ‖ΔW‖/‖W0‖ and intruders, which --model "
    "adds, are of the whole change, with the magnitudes"
)


@dataclass(frozen=True)
class Verdict:
    """Whether a program loads an adapter as it is, and what to know about it."""

    loads: bool | None
    """None: it depends on what the notes name."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """All that is found. Printing it gives a page."""

    folder: str
    file_bytes: int
    base_model: str | None
    task_type: str | None
    r: int
    lora_alpha: float
    matrices: tuple[TrainedUpdate, ...]
    rest: dict[str, int]
    """Everything else in the file, with its number of values."""
    readers: dict[str, Verdict]
    notes: tuple[str, ...] = ()
    """Which figure is of which matrix, where they are not all of the same ΔW."""

    @property
    def numbers(self) -> int:
        return sum(matrix.numbers for matrix in self.matrices) + sum(self.rest.values())

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *self._kinds(), "", *self._spectra(), "", *self._readers()])

    def _head(self) -> list[str]:
        return [
            f"{self.folder}: r {self.r}, lora_alpha {self.lora_alpha:g}, {self.task_type or 'no task type'}, "
            f"base model {self.base_model or 'not named'}",
            f"{len(self.matrices)} updates, {self.numbers:,} numbers, {self.file_bytes:,} bytes",
            *[f"{name}: {count:,} numbers besides the updates" for name, count in self.rest.items()],
        ]

    def _kinds(self) -> list[str]:
        kinds: dict[tuple[str, int, int], list[TrainedUpdate]] = {}
        for matrix in self.matrices:
            kinds.setdefault((matrix.kind, matrix.d, matrix.k), []).append(matrix)
        width = max((len(kind) for kind, _, _ in kinds), default=4)
        lines = [f"{'kind':<{width}} {'count':>5} {'d':>7} {'k':>7} {'rank':>9} {'scale':>13} {'numbers':>11}"]
        for (kind, d, k), group in kinds.items():
            ranks, scales = (_range(values) for values in ([m.rank for m in group], [m.scale for m in group]))
            numbers = sum(m.numbers for m in group)
            lines.append(f"{kind:<{width}} {len(group):>5} {d:>7} {k:>7} {ranks:>9} {scales:>13} {numbers:>11,}")
        return lines

    def _spectra(self) -> list[str]:
        width = max((len(m.name) for m in self.matrices), default=6)
        beside = any(m.strength is not None for m in self.matrices)
        more = f" {'‖ΔW‖/‖W0‖':>10} {'intruders':>9}" if beside else ""
        lines = [
            "singular values of ΔW; an illustration, which decides nothing (rankwise shrink measures what is needed)",
            f"{'matrix':<{width}} {'largest':>9} {'effective':>9} {'stable':>6}{more}  first 16",
        ]
        for m in self.matrices:
            largest = f"{m.sigma[0]:.3g}" if m.sigma else "–"
            more = "" if m.strength is None else f" {m.strength:>10.4f} {m.intruders:>9}"
            bars = sparkline(torch.tensor(m.sigma))
            lines.append(f"{m.name:<{width}} {largest:>9} {m.effective_rank:>9.1f} {m.stable_rank:>6.1f}{more}  {bars}")
        return [*lines, *self.notes]

    def _readers(self) -> list[str]:
        if not self.matrices and not self.rest:
            return ["nothing is in it: adapter_model.safetensors holds no tensor, so there is nothing to load"]
        lines = []
        for reader, verdict in self.readers.items():
            says = {True: "loads it", False: "does not load it", None: "it depends"}
            lines.append(f"{reader}: {says[verdict.loads]}")
            lines += [f"  - {note}" for note in verdict.notes]
        return lines


def _range(values: list[int] | list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def inspect_adapter(folder: Path, architecture: str | None = None, loaded: nn.Module | None = None) -> Inspection:
    """What is in an adapter folder. `architecture`: the class of its base. `loaded`: the base with the adapter in it,
    needed for one that started from a part of the base. Raises CheckpointError.

    An adapter without any tensor has no readers.
    """
    adapter = read_adapter(folder) if loaded is None else read_stored(folder)
    updates = adapter.low_rank | ({} if loaded is None else _without_start(loaded))
    config = adapter.config
    readers = {
        "PEFT": Verdict(True),
        "vLLM": _in_vllm(adapter, architecture),
        "llama.cpp (convert_lora_to_gguf.py)": _in_llama_cpp(adapter),
    }
    return Inspection(
        folder=str(folder),
        file_bytes=(folder / format.WEIGHTS_FILE).stat().st_size,
        base_model=config.base_model_name_or_path,
        task_type=config.task_type,
        r=config.r,
        lora_alpha=config.lora_alpha,
        matrices=tuple(_matrix(name, stored, updates[name]) for name, stored in adapter.low_rank.items()),
        rest={name: tensor.numel() for name, tensor in adapter.rest.items()},
        readers=readers if adapter.low_rank or adapter.rest else {},
        notes=(OF_DORA,) if config.use_dora else (),
    )


def _without_start(model: nn.Module) -> dict[str, LowRank]:
    """The updates of a loaded adapter's layers from which a start is subtracted."""
    updates = {name: layer.update(DEFAULT_ADAPTER) for name, layer in named_lora_layers(model)}
    return {name: update.low_rank() for name, update in updates.items() if update.has_start}


def _matrix(name: str, stored: LowRank, update: LowRank) -> TrainedUpdate:
    """`stored`: as the file has it; `update`: what it adds."""
    d, k = update.shape
    # No value of ΔW is larger.
    bound = _norm(update.A) * _norm(update.B) * max(1.0, abs(update.scale))
    if bound > torch.finfo(torch.float32).max:
        raise CheckpointError(f"{name}: A and B are so large that their product is not finite in fp32")
    whole = update.A.shape[0] == update.B.shape[1]
    sigma = singular_values(update) if whole else torch.empty(0)
    return TrainedUpdate(
        name=name,
        d=d,
        k=k,
        rank=stored.rank,
        scale=stored.scale,
        numbers=stored.A.numel() + stored.B.numel(),
        sigma=tuple(sigma.tolist()),
        effective_rank=effective_rank(sigma),
        stable_rank=stable_rank(sigma),
    )


def _norm(tensor: Tensor) -> float:
    # In fp32 the squares of values that are finite themselves may not be.
    return torch.linalg.vector_norm(tensor.float(), dtype=torch.float64).item()


def _in_vllm(adapter: Adapter, architecture: str | None) -> Verdict:
    """By vllm/lora/peft_helper.py, lora/utils.py and config/lora.py as of versions 0.14 to 0.26 (read, not run)."""
    config = adapter.config
    reasons = _not_plain(adapter, ("embed_tokens.base_layer.weight", "lm_head.base_layer.weight"))
    if config.heads:
        reasons.append(f"modules_to_save is set ({', '.join(config.heads)}), which it refuses")
    if config.use_dora:
        reasons.append("DoRA is not supported")
    if config.r > VLLM_RANKS[-1]:
        reasons.append(f"r = {config.r} is above {VLLM_RANKS[-1]}, the most that --max-lora-rank may be")
    notes = []
    if VLLM_RANKS[2] < config.r <= VLLM_RANKS[-1]:
        least = next(rank for rank in VLLM_RANKS if rank >= config.r)
        notes.append(f"start it with --max-lora-rank {least} (without it, 16)")
    whole = config.lora_alpha / config.r**0.5 if config.use_rslora else config.lora_alpha / config.r
    if wrong := [name for name, update in adapter.low_rank.items() if not _same(update.scale, whole)]:
        reasons.append(
            f"it would compute with wrong updates, without a word: it applies lora_alpha / r of the whole adapter to "
            f"every module, which is not the factor of {len(wrong)} of {len(adapter.low_rank)} (such as {wrong[0]})"
        )
    if largest := [name for name, update in adapter.low_rank.items() if update.rank > config.r]:
        reasons.append(f"r = {config.r} in the configuration is below the rank of {largest[0]}")
    reasons += _with_start(config)
    has_lora, note = _lora_in_vllm(architecture)
    if has_lora is False:
        reasons.append(note)
    elif has_lora is None:
        notes.append(note)
    return Verdict(has_lora if not reasons else False, (*reasons, *notes))


def _lora_in_vllm(architecture: str | None) -> tuple[bool | None, str]:
    """Whether vLLM has LoRA for a class of models (None: not known), and a sentence on it."""
    if architecture is None:
        return None, "it has LoRA for most decoders and for no BERT; --model says which base this is"
    family, _, head = architecture.partition("For")
    if head == "CausalLM" and re.fullmatch(VLLM_WITH, family):
        return True, ""
    if re.fullmatch(f"({VLLM_WITHOUT})(LMHead)?(Model)?", family):
        return False, f"it has no LoRA for {architecture}"
    return None, f"whether it has LoRA for {architecture} was not looked up: its list of supported models says"


def _in_llama_cpp(adapter: Adapter) -> Verdict:
    """By llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.h as of 2026 (read, not run)."""
    reasons = _not_plain(adapter, (".base_layer.weight",), ("_layernorm", ".norm"))
    wrong = [
        name
        for name, update in adapter.low_rank.items()
        if not _same(update.scale, adapter.config.lora_alpha / update.rank)
    ]
    if wrong:
        reasons.append(
            f"it would compute with wrong updates, without a word: it divides lora_alpha by each module's own rank and "
            f"knows neither alpha_pattern nor rsLoRA; that is not the factor of {len(wrong)} of "
            f"{len(adapter.low_rank)} (such as {wrong[0]})"
        )
    reasons += _with_start(adapter.config)
    notes = []
    if any(name.rpartition(".")[2] == "lm_head" for name in adapter.low_rank):
        notes.append("an update of lm_head is refused where the base ties it to the embedding")
    if adapter.config.base_model_name_or_path is None:
        notes.append("the base model is not named: give its folder with --base")
    return Verdict(not reasons, (*reasons, *notes))


def _with_start(config: LoraConfig) -> list[str]:
    start = config.init_lora_weights
    if not isinstance(start, str):
        return []
    return [
        "it would compute with wrong updates, without a word: it does not subtract the start "
        f"(init_lora_weights = {start!r}); load_adapter_ and save_adapter make a plain adapter of it"
    ]


def _not_plain(adapter: Adapter, skipped: tuple[str, ...], kept: tuple[str, ...] = ()) -> list[str]:
    """The tensors that are no lora_A, lora_B or an embedding's, without those that a reader passes over.

    skipped: how the names of these end; kept: what is in the names of those that it passes on as they are.
    """
    plain = (*skipped, "lora_A.weight", "lora_B.weight")
    others = [
        name for name in adapter.rest if not name.endswith(plain) and not any(part in f".{name}" for part in kept)
    ]
    if not others:
        return []
    return [f"{len(others)} tensors are no A or B, such as {others[0]}; it stops at the first of them"]


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-6 * abs(other)


@torch.no_grad()
def beside_base(
    found: Inspection, model: nn.Module, adapter: str, on_progress: Callable[[str], None] = lambda text: None
) -> Inspection:
    """The same with update strengths and intruder dimensions, for a model that carries the adapter.

    Two dense singular value decompositions for each matrix, in fp32. Raises MergeError for a weight that is not dense.
    """
    layers = {name: layer for name, layer in named_lora_layers(model) if adapter in layer.shares}
    figures: dict[str, tuple[float | None, int]] = {}
    for index, (name, layer) in enumerate(layers.items()):
        on_progress(f"{index}/{len(layers)}")
        weight = layer.base_matrix().float()
        delta = layer.delta(adapter, torch.float32)
        size = _norm(weight)
        figures[name] = _norm(delta) / size if size else None, intruders(weight, delta)
    return replace(found, matrices=tuple(_with_figures(matrix, figures) for matrix in found.matrices))


def _with_figures(matrix: TrainedUpdate, figures: Mapping[str, tuple[float | None, int]]) -> TrainedUpdate:
    strength, count = figures.get(matrix.name, (None, None))
    return replace(matrix, strength=strength, intruders=count)


def intruders(weight: Tensor, delta: Tensor) -> int:
    """How many of the first 10 left singular vectors of weight + delta have |cos| < 0.5 to each of weight's.

    weight, delta: [d, k]. Definition and limits: Shuttleworth et al. 2024 (arXiv 2410.21228).
    """
    before = torch.linalg.svd(weight, full_matrices=False).U
    after = torch.linalg.svd(weight + delta, full_matrices=False).U[:, :INTRUDER_VECTORS]
    return int(((before.T @ after).abs().amax(0) < INTRUDER_MAX_COSINE).sum())
