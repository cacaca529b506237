"""What a run may trade: memory for time, precision of storage for memory."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """The settings of `rankwise train` that change what the same adapter on the same data costs."""

    base_dtype: str = "fp32"
    """How frozen weights are stored: fp32 or bf16."""
    recompute: bool = False
    """Whether the backward pass computes the blocks' activations again instead of finding them kept."""


DEFAULT_OPTIONS = MemoryOptions()
