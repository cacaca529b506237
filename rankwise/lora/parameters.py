"""Adapters on bare parameters of a module, such as the fused weights of a mixture's experts.

A matrix [d, k] gets one update; a stack [experts, d, k] gets one for each expert. In the file all experts' A lie one
below the other, [experts·r, k], and B's columns go rank by rank, [d, r·experts] (PEFT's format).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rankwise.errors import ConfigError
from rankwise.lora.config import LoraConfig
from rankwise.lora.layers import LoraLayer
from rankwise.lora.update import Update
from rankwise.lora.wrapper import Wrapper


class LoraParameter(LoraLayer):
    """One parameter of `base` and the updates that adapters add to it."""

    is_module = False

    def __init__(self, base: nn.Module, parameter: str) -> None:
        super().__init__(base)
        # The module is already a child of the wrapper around it; here it is known without being one.
        del self._modules["base"]
        self.__dict__["base"] = base
        self.parameter = parameter
        self.dims = parameter_dimensions(base, parameter)
        self.stacks = self.dims[0]

    @property
    def weight_name(self) -> str:
        return self.parameter

    @property
    def bias_name(self) -> str:
        return ""

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        experts, d, k = self.dims
        return (experts * r, k), (d, r * experts)

    def add(
        self,
        adapter: str,
        config: LoraConfig,
        name: str,
        generator: torch.Generator | None = None,
        draw: bool = True,
    ) -> None:
        if config.lora_dropout or config.lora_bias or config.use_dora or isinstance(config.init_lora_weights, str):
            raise ConfigError(
                f"{name} is a bare parameter: its input is out of reach; lora_dropout, lora_bias, use_dora and other "
                "starts than init_lora_weights True or False cannot be"
            )
        super().add(adapter, config, name, generator, draw)

    def factors(self, update: Update, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [experts, r, k] and B [experts, d, r]"""
        A, B = update.factors(dtype)
        experts, d, k = self.dims
        return A.view(experts, -1, k), B.view(d, -1, experts).permute(2, 0, 1)

    def effective_weight(self) -> Tensor:
        weight = getattr(self.base, self.parameter)
        for adapter, factor in self.beside().items():
            update = self.update(adapter)
            A, B = self.factors(update, weight.dtype)
            stored = self._as_stored(weight)
            stored = torch.baddbmm(stored, B, A, alpha=update.scale * factor)
            weight = self._from_stored(stored, weight)
        return weight

    def base_matrix(self) -> Tensor:
        """[experts·d, k]"""
        return self._as_stored(self.own(self.parameter).detach()).flatten(0, 1)

    def row_factors(self, update: Update) -> tuple[Tensor, Tensor]:
        A, B = self.factors(update, update.lora_A.dtype)
        return (A, B) if self.stacks > 1 else (A[0], B[0])

    @torch.no_grad()
    def set_row_factors(self, update: Update, A: Tensor, B: Tensor) -> None:
        experts, d, _ = self.dims
        update.set(A.reshape(update.lora_A.shape), B.reshape(experts, d, -1).permute(1, 2, 0).flatten(1))

    def as_parameter(self, matrix: Tensor) -> Tensor:
        experts, d, k = self.dims
        return self._from_stored(matrix.view(experts, d, k), self.own(self.parameter)).contiguous()

    def _as_stored(self, weight: Tensor) -> Tensor:
        """[experts, d, k]"""
        if weight.ndim == 2:
            return weight[None]
        return weight.transpose(1, 2) if getattr(self.base, "is_transposed", False) else weight

    def _from_stored(self, stored: Tensor, like: Tensor) -> Tensor:
        if like.ndim == 2:
            return stored[0]
        return stored.transpose(1, 2) if getattr(self.base, "is_transposed", False) else stored


class ParametersWrapper(Wrapper):
    """A module of which some bare parameters are adapted. Its forward reads W0 + ΔW in their place."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.parts = nn.ModuleDict()

    def __getattr__(self, name: str) -> Any:
        # A module above may compute with an adapted parameter itself, past this one's forward.
        parts = self.__dict__.get("_modules", {}).get("parts", ())
        if name in parts and (part := self.part(name)).beside():
            return part.effective_weight()
        return super().__getattr__(name)

    def part(self, parameter: str) -> LoraParameter:
        """The adapted parameter of this name; it becomes one if it was none."""
        if parameter not in self.parts:
            self.parts[parameter] = LoraParameter(self.base, parameter)
        found = self.parts[parameter]
        assert isinstance(found, LoraParameter)
        return found

    def named_parts(self) -> list[tuple[str, LoraParameter]]:
        """The adapted parameters, in the order in which the module registered them."""
        order = list(dict(self.base.named_parameters(recurse=False)))
        return [(name, self.part(name)) for name in sorted(self.parts, key=order.index)]

    def lora_layers(self) -> list[tuple[str, LoraLayer]]:
        return [(f".{name}", part) for name, part in self.named_parts()]

    def activate(self, adapters: Mapping[str, float]) -> None:
        super().activate(adapters)
        for _, part in self.named_parts():
            part.activate(adapters)

    def adapters(self) -> set[str]:
        return {adapter for _, part in self.named_parts() for adapter in part.adapters()}

    def remove(self, adapter: str) -> None:
        for name, part in self.named_parts():
            part.remove(adapter)
            if not part.adapters():
                del self.parts[name]

    def parameters_of(self, adapter: str) -> list[nn.Parameter]:
        return [p for _, part in self.named_parts() for p in part.parameters_of(adapter)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        changed = {name: part.effective_weight() for name, part in self.named_parts() if part.beside()}
        return functional_call(self.base, changed, args, kwargs) if changed else self.base(*args, **kwargs)

    @contextmanager
    def off(self) -> Iterator[None]:
        with ExitStack() as stack:
            for _, part in self.named_parts():
                stack.enter_context(part.off())
            yield


def parameter_dimensions(module: nn.Module, parameter: str) -> tuple[int, int, int]:
    """(experts, d, k) of a parameter. Raises ConfigError for one of another form."""
    weight = getattr(module, parameter)
    if weight.ndim not in (2, 3) or not weight.is_floating_point():
        raise ConfigError(f"parameter {parameter} must be a matrix or a stack of them, found {tuple(weight.shape)}")
    if weight.ndim == 2:
        return 1, *weight.shape
    experts, d, k = weight.shape
    return (experts, k, d) if getattr(module, "is_transposed", False) else (experts, d, k)
