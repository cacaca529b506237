"""Sequences whose length costs no memory: items in a temporary file, and a choice of another sequence's items."""

import pickle
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import SpooledTemporaryFile, gettempdir
from typing import Generic, TypeVar, overload
from weakref import finalize

from rankwise import atomic

T = TypeVar("T")
IN_MEMORY = 2**24
"""Bytes up to which no file is made."""
_TOGETHER = 32
"""Items that are written and read at once; one by one would take several times as long."""


class Items(Sequence[T], Generic[T]):
    """A sequence that is compared item by item, and of which a slice is a choice."""

    def _item(self, index: int) -> T:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return Chosen(self, range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"no item {index} of {len(self)}")
        return self._item(index % len(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(_equal, self, other))

    __hash__ = None  # type: ignore[assignment]


def _equal(one: object, other: object) -> bool:
    return one == other


class Stored(Items[T]):
    """Items in a temporary file of this process, which no other program reads and which ends with it."""

    def __init__(self, items: Iterable[T]) -> None:
        """Raises StorageError if the folder for temporary files is full."""
        self._file = SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115 - it lives as long as the sequence
        finalize(self, self._file.close)
        self._starts = array("q")
        self._read: tuple[int, list[T]] = (-1, [])
        self._count = 0
        waiting: list[T] = []
        for item in items:
            waiting.append(item)
            if len(waiting) == _TOGETHER:
                self._write(waiting)
                waiting = []
        if waiting:
            self._write(waiting)

    def _write(self, items: list[T]) -> None:
        try:
            self._starts.append(self._file.tell())
            pickle.dump(items, self._file, pickle.HIGHEST_PROTOCOL)
        except OSError as error:
            raise atomic.storage_error(Path(gettempdir()), error) or error from None
        self._count += len(items)

    def __len__(self) -> int:
        return self._count

    def _item(self, index: int) -> T:
        return self._block(index // _TOGETHER)[index % _TOGETHER]

    def __iter__(self) -> Iterator[T]:
        for number in range(len(self._starts)):
            yield from self._block(number)

    def _block(self, number: int) -> list[T]:
        if self._read[0] != number:
            self._file.seek(self._starts[number])
            self._read = number, pickle.load(self._file)
        return self._read[1]


class Chosen(Items[T]):
    """Some items of another sequence, in any order, each as often as its place is named."""

    def __init__(self, items: Sequence[T], places: Iterable[int]) -> None:
        self._items, self._places = items, array("q", places)

    def __len__(self) -> int:
        return len(self._places)

    def _item(self, index: int) -> T:
        return self._items[self._places[index]]
