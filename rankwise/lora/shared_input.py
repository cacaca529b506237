"""Layers that are called one after the other with the same input (q, k and v; gate and up) compute together."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from rankwise.lora.linear_function import Term, linear_with_update


class _Layer(Protocol):
    def terms(self, x: Tensor) -> list[Term] | None: ...

    def lengths(self, x: Tensor) -> tuple[int, ...] | None: ...


class SharedInput:
    """The call of the first layer computes the results of all; the others' calls take theirs.

    Calls with different inputs, or in another order, are each computed by themselves.
    """

    def __init__(self, layers: Sequence[_Layer]) -> None:
        self.layers = layers
        """In the order of their calls."""
        self._input: Tensor | None = None
        self._version = 0
        self._waiting: dict[_Layer, Tensor] = {}

    def result(self, layer: _Layer, x: Tensor) -> Tensor:
        """x [..., k] → what a layer that has terms for x makes of it [..., d]."""
        if self._input is x and self._version == x._version and layer in self._waiting:
            return self._take(layer)
        together = self.layers if layer is self.layers[0] else [layer]
        terms = {member: own for member in together if (own := member.terms(x)) is not None}
        self._input, self._version = x, x._version
        results = linear_with_update(x, [term for own in terms.values() for term in own], layer.lengths(x))
        self._waiting = dict(zip(terms, results, strict=True))
        return self._take(layer)

    def _take(self, layer: _Layer) -> Tensor:
        result = self._waiting.pop(layer)
        if not self._waiting:
            self._input = None
        return result
