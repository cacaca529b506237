"""The total rank goes down, test by test, on the choice part; the confirmation part says what of it holds."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from rankwise.errors import DataError
from rankwise.rank.paired import PairedTest

PARTS = {"calibration": 0.2, "choice": 0.4, "confirmation": 0.4}
"""Of the held-out rows."""
_FINE = 2 ** (-1 / 8)
"""Ratio of the rungs once halving has gone too far."""
_ORDERS = 4
"""Times that the directions are put in order; each but the first costs two to five tests more if it finds nothing."""

Part = Literal["choice", "confirmation"]


@dataclass(frozen=True)
class Rung:
    """One test: the adapter cut to this total rank against the full one."""

    part: Part
    total_rank: int
    difference: float
    """Mean loss of the cut adapter minus that of the full one, nats for each trained token (or text)."""
    bound: float
    """One-sided upper 95 % bound of the difference."""
    passed: bool


@dataclass
class Ladder:
    """Walks the total rank down, test by test."""

    test: Callable[[Part, int], PairedTest]
    """Compares the adapter cut to a total rank with the full one, on one part of the held-out rows."""
    largest: int
    """The total rank from which nothing is cut."""
    least: int
    """The total rank below which nothing can be cut."""
    delta: float
    observe_again: Callable[[int], object] | None = None
    """Puts the directions of the adapter cut to a total rank into a new order, by which smaller ones are cut."""
    rungs: list[Rung] = field(default_factory=list)
    stopped_because: str = "it is as small as such an adapter can be"

    def descend(self) -> tuple[int, float, PairedTest]:
        """The smallest confirmed total rank, what it loses at most with 95 % confidence, and its comparison.

        Raises DataError if the rows for confirmation confirm none of the accepted ones.
        """
        candidates = _back_off(self._accepted())
        confirmed = None
        for total in candidates:
            comparison = self._test("confirmation", total)
            if not comparison.within(self.delta):
                break
            confirmed = total, comparison
        if confirmed is None:
            raise DataError("no smaller adapter can be shown to be good enough: " + self.stopped_because)
        total, comparison = confirmed
        # The bound of the rung that the choice part named holds by itself. If that rung failed, the data chose among
        # the others, and what is left is that they passed the test at delta.
        return total, comparison.bound if total == candidates[-1] else self.delta, comparison

    def _accepted(self) -> list[int]:
        """Total ranks that pass on the choice part, from the largest down."""
        accepted = [self.largest]
        for observed in range(_ORDERS):
            if observed:
                if self.observe_again is None:
                    break
                self.observe_again(accepted[-1])
            smaller = self._below(accepted[-1])
            accepted += smaller
            if not smaller or accepted[-1] <= self.least:
                break
        return accepted

    def _below(self, total: int) -> list[int]:
        """Those by one order of the directions: halves, then finer rungs by bisection."""
        accepted, above = [], total
        while above // 2 >= self.least and self._passes(above // 2):
            above //= 2
            accepted.append(above)
        rungs = {round(above * _FINE**step) for step in range(1, 8)}
        fine = sorted((rung for rung in rungs if max(self.least, above // 2 + 1) <= rung < above), reverse=True)
        while fine:
            middle = len(fine) // 2
            if self._passes(fine[middle]):
                accepted.append(fine[middle])
                fine = fine[middle + 1 :]
            else:
                fine = fine[:middle]
        return accepted

    def _passes(self, total: int) -> bool:
        return self._test("choice", total).within(self.delta)

    def _test(self, part: Part, total: int) -> PairedTest:
        comparison = self.test(part, total)
        passed = comparison.within(self.delta)
        self.rungs.append(Rung(part, total, comparison.difference, comparison.bound, passed))
        if not passed:
            self.stopped_because = _why(part, total, comparison, self.delta)
        return comparison


def _back_off(accepted: list[int]) -> list[int]:
    """Which accepted total ranks to confirm: the first of the falling row, and from its end the 1st, 2nd, 4th, 8th …"""
    places = [-(2**step) for step in range(len(accepted).bit_length()) if 2**step < len(accepted)]
    return [accepted[place] for place in (-len(accepted), *reversed(places))]


def _why(part: Part, total: int, comparison: PairedTest, delta: float) -> str:
    found = (
        f"at total rank {total} the loss on {comparison.rows} {part} rows differs by {comparison.difference:+.4f} "
        f"nats (95 % upper bound {comparison.bound:+.4f}, allowed {delta:.4f})"
    )
    needed = comparison.rows_needed(delta)
    if needed is None:
        return found
    everywhere = math.ceil(max(needed, comparison.rows + 1) / PARTS[part])
    return f"{found}; these rows can't tell, and about {everywhere:,} held-out rows in all would"
