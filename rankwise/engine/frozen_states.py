"""Passes that begin at the lowest block that trains: what enters it is the same whenever an example is run.

What a model puts out below that block is exchanged for hidden states that were computed before. The model runs as its
code has it, its embedding included; the blocks below hand on what they get, and the last of them the known states.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankwise.data.examples import Ids
from rankwise.engine.batch import Stream
from rankwise.engine.blocks import Stand, replaced


class FrozenStates:
    """What enters the block with the index `depth`, which is at least 1, for some texts."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._known: dict[Ids, tuple[NDArray[Any], NDArray[Any]]] = {}

    def learn(self, stream: Stream, states: NDArray[Any]) -> None:
        """Take the states [T, d] of a stream; a mapped file stays one."""
        for index, text in enumerate(stream.texts):
            self._known[text] = states, stream.places(index).numpy()

    def cover(self, stream: Stream) -> bool:
        """Whether the states of all texts of a stream are known."""
        return all(text in self._known for text in stream.texts)

    @contextmanager
    def begin_at(self, blocks: nn.ModuleList, stream: Stream) -> Iterator[None]:
        """Let a pass over a stream begin at block `depth`."""
        stands = {index: _Skipped(blocks[index]) for index in range(self.depth)}
        stands[self.depth - 1].states = self._states_of(stream)
        with replaced(blocks, stands):
            yield

    def _states_of(self, stream: Stream) -> Tensor:
        """[1, T, d]; of what texts share, the states of the last one, and zeros where no text is."""
        first = self._known[stream.texts[0]][0]
        result = np.zeros((stream.tokens, first.shape[1]), first.dtype)
        for index, text in enumerate(stream.texts):
            states, places = self._known[text]
            result[stream.places(index).numpy()] = states[places]
        return torch.from_numpy(result)[None].to(stream.ids.device)


class _Skipped(Stand):
    """Hands on the hidden states that it is given, or known ones in their place."""

    states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states if self.states is None else self.states
