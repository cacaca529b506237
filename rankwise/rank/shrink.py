"""P2, after training: the smallest ranks whose held-out loss is shown to be at most δ worse than the full adapter's.

Held-out rows are cut into three parts. On the calibration part the layers' inputs are observed, which say how much each
direction of each ΔW does, and the gradients of their outputs, which say how much that matters. On the choice part the
total rank goes down a ladder, directions of all layers in one order (what they spare the loss, by the numbers that they
cost), and a paired test after each rung decides whether it goes on. A cut changes what the other directions are worth,
so the adapter is observed again where the ladder ends, and goes on down from there. What was found is tested once more
on the confirmation part, by which no rank was chosen; what is promised comes from there alone.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from rankwise.data.rows import Row, question_keys, split_rows
from rankwise.engine.engine import Engine
from rankwise.errors import ConfigError, DataError
from rankwise.lora.inject import DEFAULT_ADAPTER, adapters_off, injection, set_adapter_training
from rankwise.lora.layers import LoraLayer
from rankwise.lora.low_rank import LowRank
from rankwise.lora.places import named_wrappers
from rankwise.rank.compare import MARGIN_SHARE_OF_GAIN
from rankwise.rank.cut import Reader, cuttable_layers, put_back_on_error, set_updates_
from rankwise.rank.ladder import PARTS, Ladder, Part, Rung
from rankwise.rank.paired import ExampleLosses, PairedTest, measure, paired_test, units
from rankwise.rank.spectrum import Directions, directions, observe, spread

_LEAST_ROWS = 30
"""Different rows in each part that is tested: with fewer, a mean's distribution is too far from the assumed one."""
_HEAVY = 0.5
"""From which share on of a single row it is said that the bound rests on it."""
_OBSERVED_AT_ONCE = 4
"""Rows in one forward and backward pass on the calibration part."""


@dataclass(frozen=True)
class HeldOut:
    """The three parts of the held-out examples (or rows); no two share a row."""

    calibration: Sequence[Any]
    choice: Sequence[Any]
    confirmation: Sequence[Any]

    def map(self, read: Callable[[Sequence[Any]], Sequence[Any]]) -> "HeldOut":
        """The same parts, each as `read` gives it, such as the examples of rows."""
        return HeldOut(read(self.calibration), read(self.choice), read(self.confirmation))


@dataclass(frozen=True)
class ShrinkReport:
    """What was cut, and what is promised. Losses are nats for each trained token (or text)."""

    delta: float
    """The most that may be lost."""
    gain: float
    """Held-out loss without the low-rank updates minus that with them, on the choice part."""
    loss_full: float
    """Of the full adapter, on the confirmation part."""
    loss_shrunk: float
    """Of the smaller adapter, there too."""
    lost_at_most: float
    """Upper 95 % bound of what was lost, from the confirmation part alone."""
    ranks_before: dict[str, int]
    ranks_after: dict[str, int]
    """0: the module is no longer adapted."""
    parameters_before: int
    """Numbers in the low-rank updates; what else the adapter trains is carried over unchanged."""
    parameters_after: int
    rows: dict[str, int]
    """Of each part."""
    rungs: tuple[Rung, ...]
    stopped_because: str
    """Why the ladder was not walked further down."""
    heaviest: float = 0.0
    """The share of how much the confirmation rows differ that the one with the largest added loss makes up."""

    def __str__(self) -> str:
        width = max(map(len, self.ranks_before))
        lines = [f"{'matrix':<{width}}  rank before → after"]
        lines += [f"{name:<{width}}  {r:>11} → {self.ranks_after[name]}" for name, r in self.ranks_before.items()]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """All but the ranks of the single matrices."""
        before, after = sum(self.ranks_before.values()), sum(self.ranks_after.values())
        share = 1 - self.parameters_after / self.parameters_before
        lines = [
            f"total rank {before:,} → {after:,}; {self.parameters_before:,} → {self.parameters_after:,} numbers in "
            f"the updates ({share:.0%} fewer)",
            f"held-out loss {self.loss_full:.4f} → {self.loss_shrunk:.4f} on {self.rows['confirmation']} rows by "
            f"which no rank was chosen: with 95 % confidence at most {max(0.0, self.lost_at_most):.4f} nats are lost, "
            f"of {self.gain:.4f} that the updates gain (allowed: {self.delta:.4f})",
            f"not smaller, because {self.stopped_because}",
        ]
        if self.heaviest > _HEAVY:
            lines.append(
                f"a single row makes up {self.heaviest:.0%} of how much rows differ: rows that lose much are rare "
                "here, so the bound is passed more often than it says; more held-out rows make it surer"
            )
        return "\n".join(lines)


def split_held_out(rows: Sequence[Row], seed: int, most: int | None = None) -> HeldOut:
    """Cut rows into a fifth for calibration and two fifths each for choice and confirmation, drawn by `seed`.

    Rows that ask the same stay in one part. `most`: so many of the rows are drawn first, to spare time.
    Raises DataError if a tested part would have fewer than 30 rows that ask different things.
    """
    least = math.ceil(_LEAST_ROWS / PARTS["choice"])
    if most is not None and len(rows) > most:
        rows = random.Random(seed).sample(rows, most)
    if len(rows) >= least:
        rest, confirmation = split_rows(list(rows), PARTS["confirmation"], seed)
        calibration, choice = split_rows(rest, PARTS["choice"] / (1 - PARTS["confirmation"]), seed)
        if min(map(how_many_differ, (choice, confirmation))) >= _LEAST_ROWS:
            return HeldOut(calibration, choice, confirmation)
    different = how_many_differ(rows)
    found = f"{len(rows)} held-out rows" + (f", {different} of them different," if different < len(rows) else "")
    raise DataError(
        f"{found} are too few to tell what is lost: at least {least} different ones are needed "
        f"(a fifth to observe the layers' inputs, and two parts of at least {_LEAST_ROWS} to choose the ranks and to "
        "confirm them)"
    )


def how_many_differ(rows: Sequence[Row]) -> int:
    """How many different things the rows ask."""
    return len({question_keys(row)[-1] for row in rows})


def different_left(rows: Sequence[Row], examples: Sequence[Any]) -> int:
    """How many of the rows that became these examples ask different things."""
    return how_many_differ(_left(rows, examples))


def split_examples(rows: Sequence[Row], examples: Sequence[Any], seed: int, most: int | None = None) -> HeldOut:
    """The examples of rows, cut as `split_held_out` cuts those rows that became one: too long ones may be left out.

    Raises DataError as `split_held_out` does.
    """
    of_row = {example.place: example for example in examples}
    parts = split_held_out(_left(rows, examples), seed, most)
    return parts.map(lambda part: [of_row[row.place] for row in part])


def _left(rows: Sequence[Row], examples: Sequence[Any]) -> list[Row]:
    kept = {example.place for example in examples}
    return [row for row in rows if row.place in kept]


def shrink_(
    engine: Engine[Any],
    held_out: HeldOut,
    delta: float | None = None,
    reader: Reader = "vllm",
    adapter: str = DEFAULT_ADAPTER,
    on_progress: Callable[[str], None] = lambda text: None,
    share: float = MARGIN_SHARE_OF_GAIN,
) -> ShrinkReport:
    """Cut an adapter of the engine's model to the smallest ranks that the held-out examples allow, in place.

    The cut adapter's held-out loss is at most `delta` nats worse, with 95 % confidence; without `delta`, the
    `share` of what the low-rank updates gain. Examples that ask the same count as one. PEFT reads what is saved
    afterwards, whatever the `reader`.

    Several rungs are tested at 5 % each without a correction, because they are tested in a fixed order, from the
    largest down, and the first failure ends it (fixed-sequence testing: Maurer, Hothorn and Lehmacher 1995; Westfall
    and Krishen 2001).

    Raises ConfigError for an adapter with parts that cannot be cut, DataError if the adapter gains nothing, or no more
    than may be lost, or if nothing smaller can be shown to be good enough; the model is then as it was.
    """
    if delta is not None and not 0 < delta < math.inf:
        raise ConfigError(f"delta must be a finite number of nats above 0, found {delta}")
    measured = _measuring(engine, held_out, on_progress)
    cuts = _Cuts(lambda: _cutter(engine, adapter, reader, held_out.calibration, on_progress))
    first = cuts.first
    full = {part: measured(part, "the full adapter") for part in ("choice", "confirmation")}
    gain = _gain(first, full["choice"], lambda: measured("choice", "without its updates"))
    allowed = delta if delta is not None else share * -gain.difference
    _check_allowed(allowed, gain)

    def test(part: Part, total: int) -> PairedTest:
        cuts.cut(total)
        return paired_test(measured(part, f"total rank {total}, {part}"), full[part])

    ladder = Ladder(test, first.largest, first.smallest, allowed, cuts.observe_again)
    before = first.updates()
    with put_back_on_error(first.model, first.layers, adapter):
        total, lost_at_most, confirmed = ladder.descend()
        if total >= sum(update.rank for update in before.values()):
            raise DataError("no smaller adapter can be shown to be good enough: " + ladder.stopped_because)
        ranks = dict.fromkeys(before, 0) | cuts.cut(total)
    return ShrinkReport(
        delta=allowed,
        gain=-gain.difference,
        loss_full=full["confirmation"].mean,
        loss_shrunk=full["confirmation"].mean + confirmed.difference,
        lost_at_most=lost_at_most,
        ranks_before={name: update.rank for name, update in before.items()},
        ranks_after=ranks,
        parameters_before=_numbers(before),
        parameters_after=_numbers(first.updates()),
        rows={part: len(getattr(held_out, part)) for part in PARTS},
        rungs=tuple(ladder.rungs),
        stopped_because=ladder.stopped_because,
        heaviest=confirmed.heaviest,
    )


def _measuring(
    engine: Engine[Any], held_out: HeldOut, on_progress: Callable[[str], None]
) -> Callable[[str, str], ExampleLosses]:
    """measured(part, what): the losses now on a part of the held-out examples, those that ask the same as one."""
    same = {part: units(getattr(held_out, part)) for part in ("choice", "confirmation")}

    def measured(part: str, what: str) -> ExampleLosses:
        losses = measure(engine, getattr(held_out, part), lambda done: on_progress(f"{what}: {done}"))
        return losses.by_unit(same[part])

    return measured


class _Cuts:
    """The orders in which the directions stand, each found with the adapter as it was cut by the one before."""

    def __init__(self, observe: Callable[[], "_Cutter"]) -> None:
        self._observe, self.first = observe, observe()
        self._orders = [self.first]

    def cut(self, total: int) -> dict[str, int]:
        """Cut the adapter to a total rank, by the last order that reaches so far up."""
        return next(own for own in reversed(self._orders) if own.largest >= total).cut(total)

    def observe_again(self, total: int) -> None:
        """Find the order of what is left at this total rank."""
        self.cut(total)
        # It has to take the adapter off the layers too that another cut leaves it on.
        self._orders.append(replace(self._observe(), layers=self.first.layers))


def _check_allowed(allowed: float, gain: PairedTest) -> None:
    if allowed >= -gain.bound:
        raise DataError(
            f"{allowed:.4f} nats may be lost, and all that {gain.rows} held-out rows show with 95 % confidence is that "
            f"the adapter gains {-gain.bound:.4f} nats or more ({-gain.difference:.4f} as measured): the smaller one "
            "could be no better than none. Give a lower delta, or more rows"
        )


@dataclass(frozen=True)
class _Cutter:
    """Gives a model its adapter cut to a total rank."""

    model: nn.Module
    adapter: str
    layers: Mapping[str, LoraLayer]
    parts: Mapping[str, Directions]
    worth: Mapping[str, Tensor]
    """What each direction spares the loss, by how many numbers it costs."""
    reader: Reader
    least: int
    """The least rank of each layer."""

    @property
    def largest(self) -> int:
        """The total rank from which nothing is cut."""
        return sum(int((own > 0).sum()) for own in self.worth.values())

    @property
    def smallest(self) -> int:
        return max(1, self.least * len(self.layers))

    def updates(self) -> dict[str, LowRank]:
        """What the adapter adds now."""
        there = {name: layer for name, layer in self.layers.items() if self.adapter in layer.shares}
        return {name: layer.update(self.adapter).low_rank() for name, layer in there.items()}

    def cut(self, total: int) -> dict[str, int]:
        """Returns the rank of each layer."""
        ranks = spread(self.worth, total, self.least)
        updates = {name: self.parts[name].truncated(rank) for name, rank in ranks.items() if rank}
        set_updates_(self.model, self.layers, updates, self.adapter, self.reader)
        return ranks


def _cutter(
    engine: Engine[Any], adapter: str, reader: Reader, examples: Sequence[Any], on_progress: Callable[[str], None]
) -> _Cutter:
    """Splits the updates by what they do on `examples`."""
    model = engine.model
    layers = cuttable_layers(model, adapter)
    set_adapter_training(model, False)
    seen = observe(layers, adapter, _losses(engine, examples, on_progress))
    updates = {name: layer.update(adapter).low_rank() for name, layer in layers.items()}
    parts = {name: directions(update, seen[name].hidden) for name, update in updates.items()}
    worth = {
        name: parts[name].sizes.square() * seen[name].sensitivity / sum(update.shape)
        for name, update in updates.items()
    }
    # A bias that trains with the adapted layers has no place in the file without the layer.
    least = int(injection(model).configs[adapter].bias == "lora_only")
    return _Cutter(model, adapter, layers, parts, worth, reader, least)


def _losses(engine: Engine[Any], examples: Sequence[Any], on_progress: Callable[[str], None]) -> Iterator[Tensor]:
    """The summed loss of one small batch after the other; a backward pass follows, so activations are kept."""
    for start in range(0, len(examples), _OBSERVED_AT_ONCE):
        on_progress(f"what the layers do: {start}/{len(examples)}")
        yield engine.example_losses(examples[start : start + _OBSERVED_AT_ONCE])[0].sum()


def _numbers(updates: Mapping[str, LowRank]) -> int:
    return sum(update.A.numel() + update.B.numel() for update in updates.values())


def _gain(cutter: _Cutter, full: ExampleLosses, measured: Callable[[], ExampleLosses]) -> PairedTest:
    """The adapter against itself without the low-rank updates. Raises DataError if they cannot be told from nothing.

    Where the adapter also trains a head or the like, it is compared with itself without the updates too, if that is
    better than the base: beside a head that was never trained any update would look good.
    """
    model, layers = cutter.model, cutter.layers
    with adapters_off(model):
        without = measured()
    if len(named_wrappers(model)) > len(layers) or injection(model).biases:
        with ExitStack() as stack:
            for layer in layers.values():
                stack.enter_context(layer.off())
            rest = measured()
        without = min(without, rest, key=lambda losses: losses.mean)
    comparison = paired_test(full, without)
    if comparison.bound >= 0:
        raise DataError(
            f"there is no gain to keep: on {comparison.rows} held-out rows the loss is {without.mean:.4f} nats without "
            f"the adapter's updates and {full.mean:.4f} with them, which is no improvement that these rows can show "
            f"(95 % bound of the change: {comparison.bound:+.4f}). Use the base model, or more rows of the kind that "
            "the adapter was trained for"
        )
    return comparison
