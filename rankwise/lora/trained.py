"""What an adapter trains besides low-rank updates: whole modules, rows of an embedding, bias vectors.

Each is a copy; the base's own numbers stay as they were.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.errors import ConfigError
from rankwise.lora.base_weight import BaseLayer, working_dtype
from rankwise.lora.config import LoraConfig
from rankwise.lora.parts import Parts
from rankwise.lora.wrapper import Wrapper


class TrainedCopy(Wrapper):
    """A module that is trained in full (a classifier head): each adapter trains a copy, the original stays."""

    parts: Parts | None = None
    """Which adapter's copy computes which part of the input, while several work in one pass."""

    def add(self, adapter: str, config: LoraConfig) -> None:
        """Give an adapter its copy of the original."""
        self.shares[adapter] = deepcopy(self.base).requires_grad_(not config.inference_mode)

    def reset(self, adapter: str) -> None:
        """Let an adapter's copy hold what the original holds."""
        self.shares[adapter].load_state_dict(self.base.state_dict())

    def chosen(self) -> nn.Module:
        """The copy that is at work, or the original."""
        return next((self.shares[adapter] for adapter in self.active), self.base)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.parts is None and self.by_row is None:
            return self.chosen()(*args, **kwargs)
        if len(args) != 1 or kwargs:
            raise ConfigError("a module trained in full that is called with more than its input cannot share a pass")
        if self.parts is None:
            return self._each_row(args[0])
        inputs, dim = self.parts.split(args[0])
        copies: dict[str, Any] = dict(self.shares.items())
        own = [(copies.get(name, self.base), x) for name, x in zip(self.parts.adapters, inputs, strict=True)]
        return torch.cat(self._results(own, dim), dim)

    def _each_row(self, x: Tensor) -> Tensor:
        """x: [rows, …] → what each row's own copy makes of it, or else the original.

        No module sees rows of others: a BatchNorm would count them.
        """
        assert self.by_row is not None
        places = self.by_row.among(x)
        own: list[tuple[nn.Module, Tensor]] = [(self.shares[a], rows) for a, rows in places.items() if a in self.shares]
        if others := [rows for a, rows in places.items() if a not in self.shares]:
            own.append((self.base, torch.cat(others)))
        results = self._results([(module, x[rows]) for module, rows in own], 0)
        return torch.cat(results)[torch.cat([rows for _, rows in own]).argsort()]

    def _results(self, own: Sequence[tuple[nn.Module, Tensor]], dim: int) -> list[Tensor]:
        """What each module makes of its input. Raises ConfigError for more than a tensor of as many rows in `dim`."""
        results = [module(x) for module, x in own]
        for (_, x), result in zip(own, results, strict=True):
            if not isinstance(result, Tensor) or result.ndim <= dim or result.shape[dim] != x.shape[dim]:
                found = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise ConfigError(
                    f"adapters can only share a pass, or serve single rows, where a module trained in full returns a "
                    f"tensor with a row for each of its input; a {type(self.base).__name__} returned {found} for "
                    f"{list(x.shape)}"
                )
        return results


class Rows(nn.Module):
    """Copies of some rows of an embedding, or of an output head, [vocabulary, d]."""

    place: Tensor
    """[vocabulary], where in `values` a token's row stands, or -1"""

    def __init__(self, base: Any, tokens: Sequence[int], trains: bool) -> None:
        super().__init__()
        table = base.weight
        values = torch.empty(len(tokens), table.shape[1], dtype=working_dtype(table), device=table.device)
        self.values = nn.Parameter(values, requires_grad=trains)
        """[tokens, d]"""
        self.tokens = tuple(tokens)
        self.register_buffer("place", torch.empty(len(table), dtype=torch.long), persistent=False)
        self.reset(base)

    @torch.no_grad()
    def reset(self, base: Any) -> None:
        """Take the rows as they stand in the table."""
        table, tokens = base.weight, list(self.tokens)
        self.values.copy_(table[tokens])
        self.place = torch.full((len(table),), -1, device=table.device)
        self.place[tokens] = torch.arange(len(tokens), device=table.device)


class TokenRows(Wrapper):
    """An embedding of which some tokens' rows train. Only those rows are copied, never the table."""

    def add(self, adapter: str, config: LoraConfig, tokens: Sequence[int]) -> None:
        """Give an adapter its copy of the rows of `tokens`."""
        self.shares[adapter] = Rows(self.base, tokens, not config.inference_mode)

    def reset(self, adapter: str) -> None:
        """Let an adapter's rows hold what the table holds."""
        self.rows(adapter).reset(self.base)

    @property
    def owner(self) -> "TokenRows":
        """Where the rows lie that this module uses."""
        return self

    def rows(self, adapter: str) -> Rows:
        """An adapter's share."""
        found = self.shares[adapter]
        assert isinstance(found, Rows)
        return found

    def forward(self, input: Tensor) -> Tensor:
        """Token indices [...] → [..., d]; for an output head hidden states [..., k] → logits [..., vocabulary]"""
        x, result = input, self.base(input)
        for adapter in self.active:
            result = self.with_rows(self.rows(adapter), x, result)
        for adapter, places in self.by_row.among(x).items() if self.by_row else ():
            if adapter in self.adapters():
                own = self.with_rows(self.rows(adapter), x[places], result[places])
                result = result.index_copy(0, places, own)
        return result

    def with_rows(self, rows: Rows, x: Tensor, result: Tensor) -> Tensor:
        """`result`, the base's output for x, with what these rows make of it."""
        place = rows.place[x]
        # As in the base's own table, the row of padding gets no gradient.
        padding = getattr(self.base, "padding_idx", None)
        padding = rows.tokens.index(padding) if padding in rows.tokens else None
        # A token without a row (-1) reads one more row of zeros, so that none is counted too often.
        table = F.pad(rows.values.to(result.dtype), (0, 0, 0, 1))
        by_frequency = getattr(self.base, "scale_grad_by_freq", False)
        own = F.embedding(place % len(table), table, padding, scale_grad_by_freq=by_frequency)
        own = own * getattr(self.base, "embed_scale", 1.0)
        return torch.where((place >= 0)[..., None], own, result)

    @property
    def weight(self) -> Tensor:
        """The base's table; with the rows of the adapters at work in it, where the model computes with it."""
        return self.trained_table() if self.weight_is_read and self.active else self.base.weight

    def trained_table(self) -> Tensor:
        """[vocabulary, d], the whole table with the rows of the adapters at work in it."""
        table = self.base.weight
        for rows in map(self.rows, self.active):
            tokens = torch.tensor(rows.tokens, device=table.device)
            table = table.index_copy(0, tokens, rows.values.to(table.dtype))
        return table


class TokenHead(TokenRows):
    """An output head of which some tokens' rows train."""

    def with_rows(self, rows: Rows, x: Tensor, result: Tensor) -> Tensor:
        tokens = torch.tensor(rows.tokens, device=x.device)
        bias = None if self.base.bias is None else self.base.bias[tokens]
        own = F.linear(x, rows.values.to(x.dtype), bias)
        return result.index_copy(-1, tokens, own.to(result.dtype))


class TiedTokenRows(TokenRows):
    """Another embedding on the table of one with trained rows (T5 has two such): it uses them too."""

    def __init__(self, base: nn.Module, owner: TokenRows) -> None:
        super().__init__(base)
        self._owner = [owner]
        """In a list, so that it is not a child of this module too."""

    @property
    def owner(self) -> TokenRows:
        return self._owner[0]

    def adapters(self) -> set[str]:
        return self.owner.adapters()

    def rows(self, adapter: str) -> Rows:
        return self.owner.rows(adapter)


class TiedTokenHead(TiedTokenRows, TokenHead):
    """An output head on the table of an embedding with trained rows: those tokens' logits use the rows too."""


def tied_to(
    embedding: str, modules: Mapping[str, nn.Module], weights: Mapping[str, Any]
) -> dict[str, type[TiedTokenRows]]:
    """The other modules that use an embedding's very table, by name, and the kind of wrapper for each.

    `weights`: the base's own, by the name of the module.
    """
    kinds = {nn.Embedding: TiedTokenRows, nn.Linear: TiedTokenHead}
    return {
        name: kind
        for name, module in modules.items()
        for base, kind in kinds.items()
        if isinstance(module, base) and name != embedding and weights[name] is weights[embedding]
    }


class TrainedBias:
    """The bias of one module, of which one adapter trains a copy."""

    def __init__(self, module: BaseLayer, adapter: str, config: LoraConfig) -> None:
        self.module = module
        self.adapter = adapter
        self.original: nn.Parameter = module.bias
        self._trained = nn.Parameter(self.original.detach().clone(), requires_grad=not config.inference_mode)
        self.shown = False
        """Whether the module uses the copy."""

    @property
    def trained(self) -> nn.Parameter:
        """The copy."""
        # FSDP2 puts a parameter of its own in the place of each; no merge can then have replaced it.
        if self.shown and hasattr(self.module.bias, "full_tensor"):
            self._trained = self.module.bias
        return self._trained

    @torch.no_grad()
    def reset(self) -> None:
        """Let the copy hold what the original holds."""
        if self.original.is_meta:  # Module.to_empty has put a new parameter in place, which then got the base's values.
            self.original = self.module.bias.requires_grad_(False)
            self._trained = nn.Parameter(self.original.clone(), self.trained.requires_grad)
            self.module.bias = self.trained if self.shown else self.original
        self.trained.copy_(self.original)

    def show(self, adapters: Container[str]) -> None:
        """Let the module use the copy if its adapter is among `adapters`, or else the original."""
        if self.shown != (self.adapter in adapters):  # A merge may have replaced either, and stays.
            bias, other = self.original if self.shown else self.trained, self.module.bias
            self.shown = not self.shown
            bias.data = bias.data.to(other.device, other.dtype)  # Module.to has reached the other one alone.
            self.module.bias = bias

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let the module use the original while the block lasts."""
        adapters = (self.adapter,) if self.shown else ()
        self.show(())
        try:
            yield
        finally:
            self.show(adapters)


def show_biases(model: nn.Module, biases: Iterable[TrainedBias], adapters: Container[str]) -> None:
    """Let the model use the copies of these adapters, and elsewhere its own biases.

    Raises ConfigError for a change under FSDP2, which puts back what it has sharded.
    """
    changed = [bias for bias in biases if bias.shown != (bias.adapter in adapters)]
    if changed and any(hasattr(module, "_get_fsdp_state") for module in model.modules()):
        raise ConfigError(
            f"the adapter {changed[0].adapter!r} trains biases, and under FSDP2 those cannot be switched on or off; "
            'take an adapter without (bias="none"), or load its file into a model that is not sharded'
        )
    for bias in changed:
        bias.show(adapters)


@contextmanager
def biases_off_in(module: nn.Module, biases: Iterable[TrainedBias]) -> Iterator[None]:
    """Let a module hold the base's own biases while the block lasts, also where an adapter trains copies of them."""
    inside = set(module.modules())
    with ExitStack() as stack:
        for bias in biases:
            if bias.module in inside:
                stack.enter_context(bias.off())
        yield
