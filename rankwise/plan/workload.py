"""What goes through the model in one batch, counted in tokens."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """What goes through one stack of blocks."""

    computed: int
    """Tokens that run through it: with padding, but what packed rows share only once."""
    attention: tuple[tuple[int, int, int], ...]
    """(rows, queries a row, keys a row) of each call of the attention in a block."""
    padded_to: int
    """Tokens of a padded row; 0 for a packed batch."""
    source: int = 0
    """Tokens of the encoder, padding included, that a decoder's cross attention reads."""

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key."""
        return sum(rows * queries * keys for rows, queries, keys in self.attention)


@dataclass(frozen=True)
class Batch:
    """The rows of one batch as the engine runs them."""

    rows: int
    useful: int
    """Tokens that are not padding."""
    counted: int
    """Places that the loss counts: trained tokens, or texts to classify."""
    runs: tuple[Run, ...]
    """One for each of the model's stacks."""

    @property
    def computed(self) -> int:
        """Tokens that run through the model."""
        return sum(run.computed for run in self.runs)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key."""
        return sum(run.pairs for run in self.runs)


def packed_batch(
    useful: int, counted: int, lengths: tuple[int, ...], before: tuple[int | None, ...], rows: int
) -> Batch:
    """A packed stream: segments of these lengths, each behind the segment with the index `before` (or none)."""
    keys: list[int] = []
    for length, index in zip(lengths, before, strict=True):
        keys.append(length + (keys[index] if index is not None else 0))
    calls = tuple((1, length, total) for length, total in zip(lengths, keys, strict=True))
    return Batch(rows, useful, counted, (Run(sum(lengths), calls, 0),))


def padded_batch(lengths: list[int], counted: int) -> Batch:
    """Rows of these lengths, padded to the longest."""
    rows, longest = len(lengths), max(lengths)
    return Batch(rows, sum(lengths), counted, (Run(rows * longest, ((rows, longest, longest),), longest),))


def unshared_batch(lengths: list[int], counted: int, packs: bool) -> Batch:
    """Rows of these lengths that share nothing, packed or padded."""
    if packs:
        return packed_batch(sum(lengths), counted, tuple(lengths), (None,) * len(lengths), len(lengths))
    return padded_batch(lengths, counted)


def seq2seq_batch(sources: list[int], targets: list[int]) -> Batch:
    """Rows of so many source and target tokens, both padded to their longest; the loss counts every target token."""
    rows, source, target = len(sources), max(sources), max(targets)
    encoder = Run(rows * source, ((rows, source, source),), source)
    decoder = Run(rows * target, ((rows, target, target), (rows, target, source)), target, rows * source)
    return Batch(rows, sum(sources) + sum(targets), sum(targets), (encoder, decoder))
