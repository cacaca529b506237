"""What goes through the model in one batch, counted in tokens."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """The rows of one batch as the engine runs them."""

    rows: int
    useful: int
    """Tokens that are not padding."""
    computed: int
    """Tokens that run through the model: with padding, but what packed rows share only once."""
    counted: int
    """Places that the loss counts: trained tokens, or texts to classify."""
    attention: tuple[tuple[int, int, int], ...]
    """(rows, queries a row, keys a row) of each call of the attention."""
    padded_to: int
    """Tokens of a padded row; 0 for a packed batch."""

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key."""
        return sum(rows * queries * keys for rows, queries, keys in self.attention)


def packed_batch(
    useful: int, counted: int, lengths: tuple[int, ...], before: tuple[int | None, ...], rows: int
) -> Batch:
    """A packed stream: segments of these lengths, each behind the segment with the index `before` (or none)."""
    keys: list[int] = []
    for length, index in zip(lengths, before, strict=True):
        keys.append(length + (keys[index] if index is not None else 0))
    calls = tuple((1, length, total) for length, total in zip(lengths, keys, strict=True))
    return Batch(rows, useful, sum(lengths), counted, calls, 0)


def padded_batch(lengths: list[int], counted: int) -> Batch:
    """Rows of these lengths, padded to the longest."""
    rows, longest = len(lengths), max(lengths)
    return Batch(rows, sum(lengths), rows * longest, counted, ((rows, longest, longest),), longest)


def unshared_batch(lengths: list[int], counted: int, packs: bool) -> Batch:
    """Rows of these lengths that share nothing, packed or padded."""
    if packs:
        return packed_batch(sum(lengths), counted, tuple(lengths), (None,) * len(lengths), len(lengths))
    return padded_batch(lengths, counted)
