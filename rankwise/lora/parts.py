"""Several adapters in one pass over the base: each computes a part of the tokens, the parts one after the other."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from rankwise.errors import ConfigError


@dataclass(frozen=True)
class Parts:
    """Which adapter computes which tokens of a pass."""

    adapters: tuple[str, ...]
    """In the order of their parts."""
    sizes: Mapping[int, tuple[int, ...]]
    """How many tokens each part has, by how many all have together: of all tokens, and of those that the loss reads."""

    def lengths(self, x: Tensor) -> tuple[int, ...]:
        """x [..., k] → how many of its rows belong to each adapter. Raises ConfigError for another number of rows."""
        return self._of(x.numel() // x.shape[-1])

    def split(self, x: Tensor) -> tuple[tuple[Tensor, ...], int]:
        """x [1, T, ...] or [n, ...] → each adapter's own, and the dimension along which they lie."""
        dim = 0 if x.shape[0] in self.sizes else 1
        return x.split(self._of(x.shape[dim]), dim), dim

    def _of(self, tokens: int) -> tuple[int, ...]:
        if tokens not in self.sizes:
            raise ConfigError(
                f"an adapted layer was called with {tokens} rows, which are neither all tokens of the pass nor those "
                f"that the loss reads ({' and '.join(map(str, self.sizes))}); adapters cannot share a pass here"
            )
        return self.sizes[tokens]
