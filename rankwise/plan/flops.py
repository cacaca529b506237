"""Floating-point operations of a batch. A multiplication and an addition count as two.

A frozen d × k matrix costs 2·d·k a token forward and as much backward (the gradient of its input); full fine-tuning
adds 2·d·k for the gradient of the matrix. The update beside it costs 2·r·(d + k) forward and 4·r·(d + k) backward.
Recomputing activations adds one more forward pass of the blocks from the lowest adapted one to the last but one.
A decoder that reads an adapted encoder is reached by the backward pass whole.
"""

from dataclasses import dataclass

from rankwise.lora.report import InjectReport
from rankwise.plan.memory_options import DEFAULT_OPTIONS, MemoryOptions
from rankwise.plan.shape import SOURCE, Linear, ModelShape, Stack
from rankwise.plan.workload import Batch, Run

ATTENTION = 3.5
"""All passes of attention, in forward passes: 2 products forward; 4 backward and the scores once more."""


@dataclass(frozen=True)
class Flops:
    """Of one batch, forward and backward together."""

    matrices: float
    """The frozen matrices of all blocks; with full fine-tuning the gradients of the matrices too."""
    adapter: float
    attention: float
    head: float
    """At the places that the loss counts, with what lies between the blocks and the head."""

    @property
    def total(self) -> float:
        return self.matrices + self.adapter + self.attention + self.head


def lora_flops(
    shape: ModelShape, report: InjectReport, batch: Batch, options: MemoryOptions = DEFAULT_OPTIONS
) -> Flops:
    """What a batch with the adapter of `report` computes.

    The backward pass ends at the lowest adapted block, and there it leaves out the gradient of the block's input.
    """
    ranks = {matrix.name: matrix.r for matrix in report.matrices}
    matrices = adapter = attention = 0.0
    reached = False
    for stack, run in zip(shape.stacks, batch.runs, strict=True):
        found = _of_stack(stack, ranks, run, reached, options.recompute)
        matrices, adapter = matrices + found.matrices, adapter + found.adapter
        attention += 4 * shape.attended * found.attention_passes * run.pairs
        reached = found.reached
    ends = [shape.head, *shape.outside]
    head = _head_flops(ends, ranks, reached) + sum(2 * m.d * m.k for m in ends if m.name in report.heads)
    return Flops(matrices, adapter, attention, head * places_of_head(shape, batch))


@dataclass(frozen=True)
class _OfStack:
    """What a stack computes of a batch."""

    matrices: int
    adapter: int
    attention_passes: float
    """How often attention runs, all blocks together, in forward passes."""
    reached: bool
    """Whether what it puts out depends on the adapter."""


def _of_stack(stack: Stack, ranks: dict[str, int], run: Run, source_reached: bool, recompute: bool) -> _OfStack:
    """`source_reached`: whether what it reads of the encoder depends on the adapter."""
    matrices = adapter = 0
    attention = 0.0
    reached = False
    for index in range(stack.layers):
        updates = {linear.name: r for linear, r in stack.adapted(ranks, index)}
        adapted_here = False
        for linear in stack.block.linears:
            r, tokens = updates.get(linear.name), linear.tokens(run)
            needs_input_gradient = reached or (adapted_here and linear.reads not in stack.block.from_input)
            if linear.reads == SOURCE:
                needs_input_gradient = source_reached
            matrices += 2 * linear.d * linear.k * (1 + needs_input_gradient) * tokens
            if r is not None:
                adapter += 2 * r * (2 * linear.d + 2 * linear.k + linear.d + linear.k * needs_input_gradient) * tokens
            adapted_here = adapted_here or r is not None or (linear.reads == SOURCE and source_reached)
        reached = reached or adapted_here
        again = recompute and reached and index < stack.layers - 1
        if again:
            matrices += sum(2 * linear.d * linear.k * linear.tokens(run) for linear in stack.block.linears)
            adapter += sum(2 * r * (m.d + m.k) * m.tokens(run) for m, r in stack.adapted(ranks, index))
        attention += again + (ATTENTION if reached else 1)
    return _OfStack(matrices, adapter, attention, reached)


def full_flops(shape: ModelShape, batch: Batch) -> Flops:
    """What a batch that trains every parameter computes: 3 times the forward products."""
    pairs = list(zip(shape.stacks, batch.runs, strict=True))
    matrices = 6 * sum(m.d * m.k * m.tokens(run) * stack.layers for stack, run in pairs for m in stack.block.linears)
    head = 6 * sum(linear.d * linear.k for linear in (shape.head, *shape.outside))
    attention = sum(4 * shape.attended * ATTENTION * stack.layers * run.pairs for stack, run in pairs)
    return Flops(matrices, 0.0, attention, head * places_of_head(shape, batch))


def places_of_head(shape: ModelShape, batch: Batch) -> int:
    """How often the head runs: at every token of a padded batch, unless it is for texts or in a decoder that reads an
    encoder, else where the loss counts."""
    run = batch.runs[-1]
    return run.computed if run.padded_to and not run.source and not shape.of_texts else batch.counted


def _head_flops(linears: list[Linear], ranks: dict[str, int], reached: bool) -> float:
    total = 0.0
    for linear in linears:
        total += 2 * linear.d * linear.k * (1 + reached)
        total += 6 * ranks.get(linear.name, 0) * (linear.d + linear.k)
    return total
