"""The most main memory that a run holds at once, in bytes.

Everything is fp32. A frozen number takes 4 bytes; one that trains takes 16: itself, its gradient and AdamW's two means.
To that comes what the forward pass keeps for the backward pass; at the turn from one to the other all of it is held.
"""

import os
from dataclasses import dataclass

from rankwise.lora.report import InjectReport
from rankwise.plan.flops import places_of_head
from rankwise.plan.shape import ModelShape
from rankwise.plan.workload import Batch

FLOAT = 4
TRAINED = 16
"""Bytes for each number that trains: 4 itself, 4 its gradient, 8 AdamW's two means."""
PROCESS = 360e6
"""Python with torch and transformers (torch 2.13 for the CPU on Linux), where this machine was not measured."""
VOCABULARY_ENTRY = 1000
"""A tokenizer holds about so many bytes for each entry of its vocabulary (0.8 and 1.1 kB in two of them)."""
SLACK = 0.55
"""Share of what comes and goes with each step that glibc's allocator holds beside it, in gaps that no tensor fits."""
LOGITS_BYTES = 30 * 2**20
"""Logits and their gradient share one chunk of at most this size (engine/head.py)."""

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


def lora_memory(shape: ModelShape, report: InjectReport, batch: Batch, process_bytes: float) -> Memory:
    """Of a run whose largest batch is `batch`."""
    ranks = {matrix.name: matrix.r for matrix in report.matrices}
    copies = COPIES * FLOAT * sum(matrix.d * matrix.k for matrix in report.matrices)
    frozen = FLOAT * report.total_parameters + (copies if copies <= most_bytes_of_copies() else 0)
    return _memory(shape, ranks, batch, process_bytes, frozen, TRAINED * report.trainable_parameters)


def full_memory(shape: ModelShape, batch: Batch, process_bytes: float) -> Memory:
    """The same for full fine-tuning: every matrix needs its input, and no number is frozen."""
    every = {linear.name: 0 for linear in shape.linears()}
    return _memory(shape, every, batch, process_bytes, 0, TRAINED * shape.total_parameters)


def _memory(
    shape: ModelShape, ranks: dict[str, int], batch: Batch, process_bytes: float, frozen: float, trained: float
) -> Memory:
    activations = FLOAT * batch.computed * kept_numbers(shape, ranks, batch.padded_to)
    logits = FLOAT * places_of_head(shape, batch) * shape.head.d
    block = batch.computed * (3 * shape.block.activations + 2 * shape.width)
    working = max(min(logits, LOGITS_BYTES), FLOAT * block)
    process = process_bytes + VOCABULARY_ENTRY * shape.vocabulary
    return Memory(process, frozen, trained, activations, working, SLACK * (activations + working))


def kept_numbers(shape: ModelShape, ranks: dict[str, int], padded_to: int) -> int:
    """Numbers a token that all blocks from the lowest adapted one on keep for the backward pass."""
    adapted = [
        any(f"{shape.path}.{index}.{linear.name}" in ranks for linear in shape.block.linears)
        for index in range(shape.layers)
    ]
    lowest = adapted.index(True) if any(adapted) else shape.layers
    return sum(shape.kept_in_block(ranks, index, padded_to) for index in range(lowest, shape.layers))
