"""Seconds of a run: its arithmetic and its memory traffic, each at the rate that this machine reached."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rankwise.lora.report import InjectReport
from rankwise.plan.flops import Flops, full_flops, lora_flops, places_of_head
from rankwise.plan.machine import Machine
from rankwise.plan.memory import FLOAT, kept_numbers
from rankwise.plan.memory_options import DEFAULT_OPTIONS, MemoryOptions
from rankwise.plan.shape import ModelShape, is_dora
from rankwise.plan.workload import Batch

ACCESSES = 6
"""Each kept number stands for one element-wise operation: two read and one written, forward and backward."""
OPTIMISER = 40
"""Bytes that a step reads and writes for each number that trains: AdamW reads it, its gradient and both means and
writes three; before that the gradient's length is taken, and it is shortened."""
OPERATIONS = 1100
"""Operations that a block starts, forward and backward, views included: about 900 in BERT, 1,300 in Llama beside its
attention's calls, counted with torch.profiler."""
AGAIN = 1.5
"""Forward passes that run a second time are half of a forward and a backward pass more."""


@dataclass(frozen=True)
class Seconds:
    """Of one or more batches, by what they are spent on."""

    matrices: float
    adapter: float
    attention: float
    head: float
    """The output head and the cross-entropy."""
    elementwise: float
    """Norms, rotations, activations, sums: limited by memory."""
    starting: float
    """Starting operations, which weighs most in small batches."""
    optimiser: float = 0.0
    """Once a step, after all of its batches."""
    copying: float = 0.0
    """Preparing copies of the weights, once a run."""

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def lora_seconds(
    shape: ModelShape, report: InjectReport, batch: Batch, machine: Machine, options: MemoryOptions = DEFAULT_OPTIONS
) -> Seconds:
    """Of one batch with the adapter of `report`, without the optimiser."""
    ranks = {matrix.name: matrix.r for matrix in report.matrices}
    kept = kept_numbers(shape, ranks, batch, dora=is_dora(report))
    flops = lora_flops(shape, report, batch, options)
    r = max(ranks.values(), default=1)
    return _seconds(shape, kept, r, flops, batch, machine, AGAIN if options.recompute else 1)


def full_seconds(shape: ModelShape, batch: Batch, machine: Machine) -> Seconds:
    """The same for full fine-tuning."""
    every = {linear.name: 0 for linear in shape.linears()}
    kept = kept_numbers(shape, every, batch)
    return _seconds(shape, kept, 0, full_flops(shape, batch), batch, machine, 1)


def run_seconds(batches: Sequence[Seconds], steps: int, trained: int, copied: float, machine: Machine) -> Seconds:
    """Of a run through these batches in `steps` optimiser steps.

    `trained`: numbers that train. `copied`: bytes of the copies of weights that the run prepares.
    """
    columns = zip(*(vars(batch).values() for batch in batches), strict=True)
    return replace(
        Seconds(*map(sum, columns)),
        optimiser=steps * OPTIMISER * trained / machine.bytes_per_second,
        copying=copied / machine.copied_bytes_per_second,
    )


def _seconds(
    shape: ModelShape, kept: int, r: int, flops: Flops, batch: Batch, machine: Machine, passes: float
) -> Seconds:
    """`kept`: numbers that the forward pass keeps.

    `passes`: how often forward and backward passes of the blocks' small operations run.
    """
    pairs = list(zip(shape.stacks, batch.runs, strict=True))
    rate = machine.product_rate(max(run.computed for run in batch.runs))
    places = places_of_head(shape, batch)
    calls = sum(len(run.attention) * stack.layers for stack, run in pairs)
    activations = sum(run.computed * stack.layers * stack.block.activations for stack, run in pairs)
    moved = ACCESSES * FLOAT * kept
    elementwise = moved / machine.bytes_per_second + activations / machine.activations_per_second
    return Seconds(
        matrices=flops.matrices / rate,
        adapter=flops.adapter / machine.thin_rate(r),
        attention=calls * machine.attention_call + flops.attention / machine.attention_flops,
        head=flops.head / machine.product_rate(places) + places * shape.head.d / machine.logits_per_second,
        elementwise=passes * elementwise,
        starting=passes * sum(stack.layers for stack in shape.stacks) * OPERATIONS * machine.operation,
    )
