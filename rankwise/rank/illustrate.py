"""What the adapters that a sweep kept look like: ranks by layer, and what two seeds or two ranks have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import CheckpointError
from rankwise.lora.checkpoint import read_adapter
from rankwise.lora.low_rank import LowRank
from rankwise.rank.runs import Key
from rankwise.rank.similarity import LayerMap, Similarity, compare_adapters, layer_map
from rankwise.rank.spectrum import effective_rank, singular_values
from rankwise.rank.sweep import Sweep


@dataclass(frozen=True)
class Illustrations:
    """None of it decides anything."""

    maps: tuple[LayerMap, ...] = ()
    similarities: tuple[Similarity, ...] = ()


def adapter_name(sweep: Sweep, rank: int, seed: int) -> str:
    """The folder of the adapter of a run."""
    return Key(rank, seed, sweep.factors[rank]).name


def kept_runs(sweep: Sweep, seeds: int) -> list[Key]:
    """The runs whose adapters are kept: of every rank the first `seeds` seeds, at the learning rate that was chosen."""
    return [Key(rank, seed, sweep.factors[rank]) for rank in sweep.losses if rank > 0 for seed in sweep.seeds[:seeds]]


def illustrate(
    sweep: Sweep,
    folder: Path,
    cut_to: Mapping[str, int] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Illustrations:
    """Of the adapters in `folder`, where those of the largest rank and the first seed were kept.

    `cut_to`: the ranks to which `rankwise shrink` cut that one, by module. `say` is told of a damaged adapter, of which
    nothing is shown.
    """

    def updates(rank: int, seed: int) -> Mapping[str, LowRank]:
        path = folder / adapter_name(sweep, rank, seed)
        try:
            return read_adapter(path).low_rank if path.is_dir() else {}
        except CheckpointError as error:
            say(f"{error}\nso the page leaves it out; remove {path} and give the command again to train it anew")
            return {}

    largest = sweep.comparisons.reference
    one, other = sweep.seeds[:2]
    first = updates(largest, one)
    if not first:
        return Illustrations()
    spectra = {name: effective_rank(singular_values(update)) for name, update in first.items()}
    maps = [layer_map(f"Effective rank of each update at r = {largest} (an illustration, no measure of need)", spectra)]
    if cut_to is not None:
        title = (
            f"Ranks to which the adapter of r = {largest} was cut within δ (rankwise shrink, tested on held-out rows)"
        )
        maps.insert(0, layer_map(title, cut_to))
    sizes = [2**n for n in range(largest.bit_length())]
    second = updates(largest, other)
    smaller = smaller_rank(sweep)
    pairs = [
        (f"Two seeds at r = {largest}", first, second),
        # A run shares its start with those of the same seed, so another seed shows what training found.
        (f"r = {smaller} and r = {largest}, with different seeds", updates(smaller, one), second),
    ]
    return Illustrations(tuple(maps), tuple(compare_adapters(title, a, b, sizes) for title, a, b in pairs if a and b))


def smaller_rank(sweep: Sweep) -> int:
    """The sufficient rank, or where that is the largest, the one below it."""
    c = sweep.comparisons
    return c.sufficient if c.sufficient != c.reference else c.ranks[-1].rank
