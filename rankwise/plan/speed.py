"""Seconds of a training step: its arithmetic and its memory traffic, each at the rate that this machine reached."""

from dataclasses import dataclass

from rankwise.lora.report import InjectReport
from rankwise.plan.choices import DEFAULT, Choices
from rankwise.plan.flops import Flops, full_flops, lora_flops, places_of_head
from rankwise.plan.machine import Machine
from rankwise.plan.memory import FLOAT, kept_numbers
from rankwise.plan.shape import ModelShape
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
    """Of one or more steps, by what they are spent on."""

    matrices: float
    adapter: float
    attention: float
    head: float
    """The output head and the cross-entropy."""
    elementwise: float
    """Norms, rotations, activations, sums: limited by memory."""
    starting: float
    """Starting operations, which weighs most in small batches."""
    optimiser: float
    copying: float = 0.0
    """Preparing copies of the weights, once a run."""

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def lora_seconds(
    shape: ModelShape, report: InjectReport, batch: Batch, machine: Machine, choices: Choices = DEFAULT
) -> Seconds:
    """Of one step with the adapter of `report`."""
    ranks = {matrix.name: matrix.r for matrix in report.matrices}
    flops = lora_flops(shape, report, batch, choices)
    return _seconds(shape, ranks, flops, batch, machine, report.trainable_parameters, AGAIN if choices.recompute else 1)


def full_seconds(shape: ModelShape, batch: Batch, machine: Machine) -> Seconds:
    """Of one step of full fine-tuning."""
    every = {linear.name: 0 for linear in shape.linears()}
    return _seconds(shape, every, full_flops(shape, batch), batch, machine, shape.total_parameters, 1)


def _seconds(
    shape: ModelShape, ranks: dict[str, int], flops: Flops, batch: Batch, machine: Machine, trained: int, passes: float
) -> Seconds:
    """`passes`: how often forward and backward passes of the blocks' small operations run."""
    rate = machine.product_rate(batch.computed)
    places = places_of_head(shape, batch)
    calls = len(batch.attention) * shape.layers
    kept = batch.computed * kept_numbers(shape, ranks, batch.padded_to)
    activations = batch.computed * shape.layers * shape.block.activations
    elementwise = ACCESSES * FLOAT * kept / machine.bytes_per_second + activations / machine.activations_per_second
    return Seconds(
        matrices=flops.matrices / rate,
        adapter=flops.adapter / machine.thin_rate(max(ranks.values(), default=1)),
        attention=calls * machine.attention_call + flops.attention / machine.attention_flops,
        head=flops.head / machine.product_rate(places) + places * shape.head.d / machine.logits_per_second,
        elementwise=passes * elementwise,
        starting=passes * shape.layers * OPERATIONS * machine.operation,
        optimiser=OPTIMISER * trained / machine.bytes_per_second,
    )
