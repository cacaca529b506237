"""Passes that begin at the lowest block that trains: what enters it is the same whenever an example is run.

What a model puts out below that block is exchanged for hidden states that were computed before. The model runs as its
code has it, its embedding included; the blocks below hand on what they get, and the last of them the known states.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankwise.engine.batch import Stream
from rankwise.engine.blocks import Stand, replaced


class FrozenStates:
    """What enters the block with the index `depth`, which is at least 1, for some examples."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._known: dict[tuple[int, ...], tuple[NDArray[Any], NDArray[Any]]] = {}

    def learn(self, examples: Sequence[Any], stream: Stream, states: NDArray[Any]) -> None:
        """Take the states [T, d] of a stream of these examples; a mapped file stays one."""
        for index, example in enumerate(examples):
            self._known[example.ids] = states, stream.places(index).numpy()

    def cover(self, examples: Sequence[Any]) -> bool:
        """Whether the states of all these examples are known."""
        return all(example.ids in self._known for example in examples)

    @contextmanager
    def begin_at(self, blocks: nn.ModuleList, stream: Stream, examples: Sequence[Any]) -> Iterator[None]:
        """Let a pass over the stream of these examples begin at block `depth`."""
        stands = {index: _Skipped(blocks[index]) for index in range(self.depth)}
        stands[self.depth - 1].states = self._states_of(stream, examples)
        with replaced(blocks, stands):
            yield

    def _states_of(self, stream: Stream, examples: Sequence[Any]) -> Tensor:
        """[1, T, d]; of what examples share, the states of the last one."""
        first = self._known[examples[0].ids][0]
        result = np.empty((stream.ids.shape[1], first.shape[1]), first.dtype)
        for index, example in enumerate(examples):
            states, places = self._known[example.ids]
            result[stream.places(index).numpy()] = states[places]
        return torch.from_numpy(result)[None].to(stream.ids.device)


class _Skipped(Stand):
    """Hands on the hidden states that it is given, or known ones in their place."""

    states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states if self.states is None else self.states
