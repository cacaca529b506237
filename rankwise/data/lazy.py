"""The rows of a large file as examples, tokenised when a step needs them and looked through while the run goes on."""

import time
from collections.abc import Callable, Iterable, Sequence

from rankwise.data.examples import E
from rankwise.data.files import Row
from rankwise.data.stored import Chosen, Items
from rankwise.errors import DataError

_AT_ONCE = 256
"""Rows between two looks at the clock."""


class LazyExamples(Items[E]):
    """The examples of `rows`, made anew each time but for those that `keep` was asked to keep.

    Where one cannot be made, all are looked at, and the DataError names every row that cannot.
    """

    def __init__(self, rows: Sequence[Row], examples_of: Callable[[Sequence[Row]], list[E]]) -> None:
        """`examples_of` gives an example for each row, or raises DataError."""
        self._rows, self._examples_of = rows, examples_of
        self._kept: dict[int, E] = {}
        self._looked_at = 0
        """Rows from the first one on."""

    def __len__(self) -> int:
        return len(self._rows)

    def _item(self, index: int) -> E:
        if index in self._kept:
            return self._kept[index]
        [example] = self._made([self._rows[index]])
        return example

    def keep(self, places: Iterable[int]) -> list[E]:
        """Make the examples at these places now, and keep them."""
        chosen = list(places)
        examples = self._made(Chosen(self._rows, chosen))
        self._kept.update(zip(chosen, examples, strict=True))
        return examples

    def look_through(self, seconds: float) -> None:
        """Look at rows that were not looked at yet, for about so long."""
        end = time.perf_counter() + seconds
        while self._looked_at < len(self) and time.perf_counter() < end:
            self._looked_at += len(self._made(self._rows[self._looked_at : self._looked_at + _AT_ONCE]))

    def _made(self, rows: Sequence[Row]) -> list[E]:
        try:
            return self._examples_of(rows)
        except DataError:
            self._examples_of(self._rows)
            raise
