"""Blocks that keep their input alone: the backward pass computes their activations again, one block after the other.

The same operations on the same numbers give the same bits, so neither loss nor gradients change. The last block is left
as it is: its activations are needed first, when nothing else is there yet.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from rankwise.engine.blocks import Stand, is_watched, replaced


class _Recomputed(Stand):
    def __init__(self, block: nn.Module, again: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__(block)
        self.again = again

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        contexts = lambda: (nullcontext(), self.again())  # noqa: E731
        return checkpoint(self.block, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextmanager
def recomputing(
    blocks: nn.ModuleList, again: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Iterator[None]:
    """In forward passes while this lasts, blocks keep their input alone; `again` is entered to compute one once more.

    A block with hooks in it runs once.
    """
    chosen = {index: block for index, block in enumerate(blocks) if index < len(blocks) - 1 and not is_watched(block)}
    with replaced(blocks, {index: _Recomputed(block, again) for index, block in chosen.items()}):
        yield
