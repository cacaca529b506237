"""The model's list of blocks, and other modules in the place of some of them for one pass."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn


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


def inputs_of(blocks: Sequence[nn.Module], run: Callable[[], Any]) -> list[Tensor]:
    """The hidden states that enter each of these blocks; `run` runs the model, and is left at the last of them.

    Raises RuntimeError if the model does not call each of them once, in this order.
    """
    seen: list[tuple[nn.Module, Tensor]] = []

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((block, args[0] if args else kwargs["hidden_states"]))
        if block is blocks[-1]:
            raise _Reached

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
        with suppress(_Reached):
            run()
    if [block for block, _ in seen] != list(blocks):
        raise RuntimeError("the model does not call its blocks one after the other")
    return [hidden for _, hidden in seen]


class _Reached(Exception):
    """Leaves the model at a block."""
