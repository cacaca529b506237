"""Floating-point operations of a batch. A multiplication and an addition count as two.

A frozen d × k matrix costs 2·d·k a token forward and as much backward (the gradient of its input); full fine-tuning
adds 2·d·k for the gradient of the matrix. The update beside it costs 2·r·(d + k) forward and 4·r·(d + k) backward.
Recomputing activations adds one more forward pass of the blocks from the lowest adapted one to the last but one.
"""

from dataclasses import dataclass

from rankwise.lora.report import InjectReport
from rankwise.plan.memory_options import DEFAULT_OPTIONS, MemoryOptions
from rankwise.plan.shape import Linear, ModelShape
from rankwise.plan.workload import Batch

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
    for index in range(shape.layers):
        adapted_here = False
        for linear in shape.block.linears:
            r = ranks.get(f"{shape.path}.{index}.{linear.name}")
            needs_input_gradient = reached or (adapted_here and linear.reads not in shape.block.from_input)
            matrices += 2 * linear.d * linear.k * (1 + needs_input_gradient)
            if r is not None:
                adapted_here = True
                adapter += 2 * r * (2 * linear.d + 2 * linear.k + linear.d + linear.k * needs_input_gradient)
        reached = reached or adapted_here
        if options.recompute and reached and index < shape.layers - 1:
            matrices += sum(2 * linear.d * linear.k for linear in shape.block.linears)
            adapter += sum(2 * r * (linear.d + linear.k) for linear, r in _updates(shape, ranks, index))
            attention += 4 * shape.attended
        attention += 4 * shape.attended * (ATTENTION if reached else 1)
    ends = [shape.head, *shape.outside]
    head = _head_flops(ends, ranks, reached) + sum(2 * m.d * m.k for m in ends if m.name in report.heads)
    return Flops(
        matrices * batch.computed,
        adapter * batch.computed,
        attention * batch.pairs,
        head * places_of_head(shape, batch),
    )


def _updates(shape: ModelShape, ranks: dict[str, int], index: int) -> list[tuple[Linear, int]]:
    """The adapted matrices of a block, each with its rank."""
    named = [(f"{shape.path}.{index}.{linear.name}", linear) for linear in shape.block.linears]
    return [(linear, ranks[name]) for name, linear in named if name in ranks]


def full_flops(shape: ModelShape, batch: Batch) -> Flops:
    """What a batch that trains every parameter computes: 3 times the forward products."""
    matrices = 6 * shape.layers * sum(linear.d * linear.k for linear in shape.block.linears)
    head = 6 * sum(linear.d * linear.k for linear in (shape.head, *shape.outside))
    attention = 4 * shape.attended * ATTENTION * shape.layers
    return Flops(matrices * batch.computed, 0.0, attention * batch.pairs, head * places_of_head(shape, batch))


def places_of_head(shape: ModelShape, batch: Batch) -> int:
    """How often the head runs: at every token of a padded batch, unless it is for texts, else where the loss counts."""
    return batch.computed if batch.padded_to and not shape.of_texts else batch.counted


def _head_flops(linears: list[Linear], ranks: dict[str, int], reached: bool) -> float:
    total = 0.0
    for linear in linears:
        total += 2 * linear.d * linear.k * (1 + reached)
        total += 6 * ranks.get(linear.name, 0) * (linear.d + linear.k)
    return total
