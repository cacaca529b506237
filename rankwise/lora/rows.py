"""Several adapters in one batch: which of its rows use which of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.errors import ConfigError


class ByRow(NamedTuple):
    """Which rows of a batch use which adapter."""

    of: int
    """Rows of the batch."""
    places: dict[str, Tensor]
    """For each adapter, the rows that use it; those of the base under ""."""

    def among(self, x: Tensor) -> dict[str, Tensor]:
        """`places` in x [rows, ...]; where x has a multiple of the rows, each comes so often in succession.

        So do the beams of a search lie. Raises ConfigError for another number, and for a multiple that may be one of
        tokens.
        """
        times, rest = divmod(len(x), self.of)
        if rest or not times or (times > 1 and self._may_lie_otherwise(x)):
            raise ConfigError(
                f"adapters were named for {self.of} rows, and a layer received {list(x.shape)}: give one for each row "
                "(of a beam search, for each beam); a model that joins its rows or puts time first, as OPT and XLNet "
                "do, cannot use adapters by row"
            )
        if times == 1:
            return self.places
        beams = torch.arange(times, device=x.device)
        return {name: (rows[:, None] * times + beams).flatten() for name, rows in self.places.items()}

    def _may_lie_otherwise(self, x: Tensor) -> bool:
        """Whether x may be the tokens of all rows joined, or have time first and the rows after it."""
        between = x.shape[1:-1] if x.is_floating_point() else x.shape[1:]
        return self.of > 1 and (not between or between[0] == self.of)
