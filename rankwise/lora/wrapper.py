"""What stands in a model in the place of an adapted module, whatever kind of share the adapters have in it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from rankwise.errors import ConfigError
from rankwise.lora.base_weight import BaseLayer
from rankwise.lora.rows import ByRow

if TYPE_CHECKING:
    from rankwise.lora.layers import LoraLayer

READ = ("weight", "bias", "in_proj_weight", "in_proj_bias")
"""The parameters that a model may compute with itself."""


class Wrapper(nn.Module):
    """A module in the place of another one, `base`, whose attributes (in_features, weight, …) it passes on."""

    base: BaseLayer
    weight_is_read = False
    """Whether the model computes with the weight itself, past this layer."""
    reading: frozenset[str] = frozenset()
    """The base's methods and properties, beside forward, that compute with its weight (`members_reading`)."""
    by_row: ByRow | None = None
    """Given while every row of the batch uses an adapter of its own."""
    injection: object | None = None
    """The note on the model into which this was put (`Injection`); a model that shares the module has another."""

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.base = base
        self._modules["shares"] = nn.ModuleDict()
        self.active: dict[str, float] = {}
        """The adapters at work that have a share here, and the weight of each in the sum."""
        if not base.training:
            self.training = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "shares", "active"):
                raise
            return getattr(self._as_one() if name in self.reading else self.chosen(), name)

    def _as_one(self) -> nn.Module:
        """The module that this one stands for, with the weight and bias of this one. All else in it is shared."""
        result: Any = copy(self.chosen())
        own = result._parameters
        result._parameters = {name: getattr(self, name) if name in READ else own[name] for name in own}
        return result

    def _replicate_for_data_parallel(self) -> "Wrapper":
        raise ConfigError(
            "nn.DataParallel copies a model for each call, and its copies lose their adapters; take one device "
            "(CUDA_VISIBLE_DEVICES=0) or DistributedDataParallel (torchrun)"
        )

    @property
    def shares(self) -> nn.ModuleDict:
        """What each adapter trains here."""
        # Past nn.Module's search for attributes, which costs as much as a quarter of a token's product.
        modules: Any = self._modules
        return modules["shares"]

    def chosen(self) -> nn.Module:
        """The module that this one stands for."""
        return self.base

    def adapters(self) -> set[str]:
        """The adapters that have a share in this layer."""
        return set(self.shares)

    def remove(self, adapter: str) -> None:
        """Forget an adapter's share, if it has one."""
        if adapter in self.shares:
            del self.shares[adapter]
        self._let_work({name: weight for name, weight in self.active.items() if name != adapter})

    def parameters_of(self, adapter: str) -> list[nn.Parameter]:
        """What an adapter trains here."""
        return list(self.shares[adapter].parameters()) if adapter in self.shares else []

    def lora_layers(self) -> list[tuple[str, "LoraLayer"]]:
        """The low-rank updates in this place, each with what to add to the place's name."""
        return []

    def activate(self, adapters: Mapping[str, float]) -> None:
        """Let those of the adapters that have a share here work."""
        own = self.adapters()
        self._let_work({name: weight for name, weight in adapters.items() if name in own})

    def _let_work(self, adapters: dict[str, float]) -> None:
        """Let these work; all that changes `active` goes through here."""
        self.active = adapters

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute as the base alone while the block lasts."""
        active, by_row = self.active, self.by_row
        self._let_work({})
        self.by_row = None
        try:
            yield
        finally:
            self._let_work(active)
            self.by_row = by_row
