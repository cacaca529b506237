"""The most main memory that a run holds at once, in bytes.

Everything is fp32, but for frozen weights that are stored in bf16. A frozen number takes 4 bytes (2 in bf16); one that
trains takes 16: itself, its gradient and AdamW's two means.
To that comes what the forward pass keeps for the backward pass; at the turn from one to the other all of it is held.
"""

import os
from dataclasses import dataclass
from math import inf
from pathlib import Path

from rankwise.lora.report import InjectReport
from rankwise.plan.flops import places_of_head
from rankwise.plan.memory_options import DEFAULT_OPTIONS, MemoryOptions
from rankwise.plan.shape import SOURCE, ModelShape, is_dora
from rankwise.plan.workload import Batch

FLOAT = 4
NARROW = 2
"""Bytes of a number in bf16."""
TRAINED = 16
"""Bytes for each number that trains: 4 itself, 4 its gradient, 8 AdamW's two means."""
PROCESS = 360e6
"""Python with torch and transformers (torch 2.13 for the CPU on Linux), where this machine was not measured."""
VOCABULARY_ENTRY = 1000
"""A tokenizer holds about so many bytes for each entry of its vocabulary (0.8 and 1.1 kB in two of them)."""
SLACK = 0.45
"""Share of what comes and goes with each step that glibc's allocator holds beside it, in gaps that no tensor fits."""
LOGITS_BYTES = 30 * 2**20
"""Logits and their gradient share one chunk of at most this size (engine/head.py)."""
LOGITS = 3
"""Tensors of their size where logits come whole (engine/seq2seq.py)."""

_GROUP = Path("/sys/fs/cgroup")
COPIES = 2
"""Copies of the adapted weights that a run prepares for faster products (lora/prepared.py) …"""
COPIES_SHARE = 1 / 8
"""… if they take no larger a share of the machine's memory than this."""


def most_bytes_of_copies() -> float:
    """Bytes that the prepared copies of weights may take; above that it does without them."""
    try:
        return COPIES_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows has no sysconf
        return 0.0


def free_bytes() -> float:
    """Memory that this process may still take: what Linux calls available, within the limit of its control group.

    Infinity where nothing says how much it is.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        available = inf
    try:
        limit, taken = (int((_GROUP / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # No group, or "max": no limit.
        return available
    return min(available, limit - taken)


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for."""

    process: float
    """Python, torch, transformers, tokenizer."""
    frozen: float
    """Weights that do not train, and prepared copies of those that are adapted."""
    trained: float
    """Numbers that train, with gradients and AdamW's state."""
    activations: float
    """What the forward pass of the largest batch keeps."""
    working: float
    """What is alive for a moment at the turn to the backward pass: logits, or one block's intermediate results."""
    slack: float
    """Lost between the pieces that the allocator hands out."""

    @property
    def peak(self) -> float:
        return sum(vars(self).values())


def lora_memory(
    shape: ModelShape,
    report: InjectReport,
    batch: Batch,
    process_bytes: float,
    options: MemoryOptions = DEFAULT_OPTIONS,
) -> Memory:
    """Of a run whose largest batch is `batch`."""
    ranks = {matrix.name: matrix.r for matrix in report.matrices}
    frozen = base_bytes(shape, report, options) + copied_bytes(report, options)
    kept = kept_numbers(shape, ranks, batch, options.recompute, is_dora(report))
    return _memory(shape, kept, batch, process_bytes, frozen, TRAINED * report.trainable_parameters)


def copied_bytes(report: InjectReport, options: MemoryOptions) -> float:
    """Of the copies that a run prepares; with DoRA it prepares none."""
    copies = COPIES * FLOAT * sum(matrix.d * matrix.k for matrix in report.matrices)
    if options.base_dtype != "fp32" or is_dora(report) or copies > most_bytes_of_copies():
        return 0.0
    return copies


def base_bytes(shape: ModelShape, report: InjectReport, options: MemoryOptions) -> float:
    """Of the base's numbers. In bf16 are linear layers and embeddings, but no head that trains in full."""
    wide = report.total_parameters
    if options.base_dtype == "fp32":
        return FLOAT * wide
    linears = [linear for linear in (*shape.linears(), shape.head) if linear.name not in report.heads]
    linears = linears[:-1] if shape.head_is_tied else linears
    # Outside of the blocks lie embeddings and a norm or two, which are too small to tell apart.
    narrow = shape.other + (0 if shape.keeps_linears_wide else sum(linear.d * linear.k for linear in linears))
    return NARROW * narrow + FLOAT * (wide - narrow)


def full_memory(shape: ModelShape, batch: Batch, process_bytes: float) -> Memory:
    """The same for full fine-tuning: every matrix needs its input, and no number is frozen."""
    every = {linear.name: 0 for linear in shape.linears()}
    kept = kept_numbers(shape, every, batch)
    return _memory(shape, kept, batch, process_bytes, 0, TRAINED * shape.total_parameters)


def _memory(shape: ModelShape, kept: int, batch: Batch, process_bytes: float, frozen: float, trained: float) -> Memory:
    """`kept`: numbers that the forward pass keeps."""
    activations = FLOAT * kept
    logits = FLOAT * places_of_head(shape, batch) * shape.head.d
    # A decoder's logits that read an encoder come whole: they, their logarithms and the gradient.
    head = LOGITS * logits if len(shape.stacks) > 1 else min(logits, LOGITS_BYTES)
    block = max(
        run.computed * (3 * stack.block.activations + 2 * shape.width)
        for stack, run in zip(shape.stacks, batch.runs, strict=True)
    )
    working = max(head, FLOAT * block)
    process = process_bytes + VOCABULARY_ENTRY * shape.vocabulary
    return Memory(process, frozen, trained, activations, working, SLACK * (activations + working))


def kept_numbers(
    shape: ModelShape, ranks: dict[str, int], batch: Batch, recompute: bool = False, dora: bool = False
) -> int:
    """Numbers of a batch that all blocks from the lowest adapted one on keep for the backward pass.

    `ranks`: of the adapted matrices, by whole name. With `recompute` all blocks of a stack but the last keep their
    input alone. The others' numbers are there one block after the other, once the last block's are gone. What an
    encoder puts out is kept once for all blocks that read it.
    """
    total, reached = 0, False
    for stack, run in zip(shape.stacks, batch.runs, strict=True):
        adapted = [stack.adapted(ranks, index) for index in range(stack.layers)]
        lowest = next((index for index, found in enumerate(adapted) if found or reached), stack.layers)
        kept = [stack.kept_in_block(ranks, index, run, dora) for index in range(lowest, stack.layers)]
        total += shape.width * run.computed * (len(kept) - 1) + max(kept) if recompute and kept else sum(kept)
        reads_source = any(linear.reads == SOURCE for found in adapted for linear, _ in found)
        total += shape.width * run.source * reads_source
        reached = reached or lowest < stack.layers
    return total
