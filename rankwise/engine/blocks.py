"""The model's list of blocks, and other modules in the place of some of them for one pass."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


def blocks_of(model: Any) -> nn.ModuleList | None:
    """The model's blocks, in their order; None if no list in it is as long as its config says."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    # A list inside a block (experts) comes after that of the blocks.
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((found for found in lists if len(found) == depth), None) if depth else None


def is_watched(block: nn.Module) -> bool:
    """Whether there are hooks in a block: who watches its layers means to see each of them run once, on all tokens."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


class Stand(nn.Module):
    """Stands in the place of a block, and has the block's attributes, which models ask for (its kind of attention)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "block":
                raise
            return getattr(self.block, name)


@contextmanager
def replaced(blocks: nn.ModuleList, stands: Mapping[int, Stand]) -> Iterator[None]:
    """Let these stand in the places of the blocks with these indices while this lasts."""
    for index, stand in stands.items():
        blocks[index] = stand
    try:
        yield
    finally:
        for index, stand in stands.items():
            blocks[index] = stand.block
