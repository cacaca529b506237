"""The layers that carry adapters beside a frozen base layer, by composition: they call it, and never look inside."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.errors import ConfigError, MergeError
from rankwise.lora.base_weight import (
    BaseLayer,
    as_matrix,
    as_stored,
    bias_name,
    device_of,
    dimensions,
    weight_name,
    working_dtype,
)
from rankwise.lora.config import LoraConfig
from rankwise.lora.update import Update
from rankwise.lora.variants import from_shape, from_weight
from rankwise.lora.wrapper import Wrapper


class LoraLayer(Wrapper):
    """A frozen base layer of d × k and the updates that adapters add to it. The kinds of layers derive from this one.

    What stands here is for y = W·x along the last dimension. Another kind says how large the factors are
    (`factor_shapes`), what B·A makes of an input (`product`), and where in the output the d numbers lie (`output_dim`).
    """

    output_dim = -1
    inside_attention = False
    """Whether this is the output projection of an nn.MultiheadAttention."""
    is_module = True
    """Whether this stands in the place of a module, and not of a bare parameter."""
    groups = 1
    """Parts of the matrix that share the rank among them (a convolution's groups)."""
    stacks = 1
    """Parts of the matrix whose updates are independent (a convolution's groups, a mixture's experts)."""

    def __init__(self, base: BaseLayer) -> None:
        super().__init__(base)
        self.merged: dict[str, float] = {}
        self.unmerged: dict[str, nn.Parameter | None] = {}
        """The base's own parameters, by name, while merged ones stand in their place."""

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B."""
        d, k = dimensions(self.base)
        return (r, k), (d, r)

    def product(self, update: Update, x: Tensor) -> Tensor:
        """scale·B·A·x, with the update's dropout on x, in the layout of the base's output."""
        A, B = update.factors(x.dtype)
        return F.linear(F.linear(update.drop(x), A) * update.scale, B)

    def add(
        self,
        adapter: str,
        config: LoraConfig,
        name: str,
        generator: torch.Generator | None = None,
        draw: bool = True,
    ) -> None:
        """Give an adapter its share; `name` is the layer's own in the model.

        Without `draw`, random start values are left out, for one that is about to be overwritten.
        """
        shapes = self.factor_shapes(config.rank_of(name))
        weight = self.own(self.weight_name)
        update = Update(config, name, *shapes, dtype=working_dtype(weight), device=device_of(self.base, weight))
        if draw or from_weight(config.init_lora_weights):
            self.start(update, config, generator)
        self.reset_magnitude(update)
        self.shares[adapter] = update if self.training else update.eval()

    def reset(self, adapter: str, config: LoraConfig, generator: torch.Generator | None) -> None:
        """Give an adapter's share the values of a new one."""
        update = self.update(adapter)
        if update.lora_bias is not None:
            nn.init.zeros_(update.lora_bias)
        self.start(update, config, generator)
        self.reset_magnitude(update)

    def reset_magnitude(self, update: Update) -> None:
        """Let DoRA's magnitudes be the lengths of the rows as they are."""
        if update.magnitude is not None:
            with torch.no_grad():
                update.magnitude.copy_(self.row_lengths(update))

    def start(self, update: Update, config: LoraConfig, generator: torch.Generator | None) -> None:
        """Set the start values of an update."""
        how, r = config.init_lora_weights, update.r // self.groups
        if taken := from_weight(how):
            matrices = self.needed_matrix(f"init_lora_weights {how!r}").chunk(self.groups)
            pairs = [taken(matrix, r, update.scale) for matrix in matrices]
        elif drawn := from_shape(how):
            d, k = len(update.lora_B) // self.groups, update.lora_A[0].numel()
            pairs = [drawn(d, k, r, generator) for _ in range(self.groups)]
        else:
            update.drop_start()
            self.draw(update, how, generator)
            return
        A, B = (torch.cat(factors) for factors in zip(*pairs, strict=True))
        begin = update.begin_at if taken else update.set
        begin(A.reshape(update.lora_A.shape), B.reshape(update.lora_B.shape))

    def draw(self, update: Update, how: bool | str, generator: torch.Generator | None) -> None:
        """A from U(±1/√k) and B zero; "gaussian": A from N(0, 1/r²); False: B random too."""
        if how == "gaussian":
            nn.init.normal_(update.lora_A, std=1 / update.r, generator=generator)
        else:
            nn.init.kaiming_uniform_(update.lora_A, a=math.sqrt(5), generator=generator)
        if how is False:
            nn.init.kaiming_uniform_(update.lora_B, a=math.sqrt(5), generator=generator)
        else:
            nn.init.zeros_(update.lora_B)

    def lora_layers(self) -> list[tuple[str, "LoraLayer"]]:
        return [("", self)]

    def update(self, adapter: str) -> Update:
        """An adapter's share."""
        found = self.shares[adapter]
        assert isinstance(found, Update)
        return found

    def forward(self, x: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """What the base makes of x, and the sum of the changes by the adapters at work; x may have the base's name."""
        if x is None:
            name = next(iter(signature(self.base.forward).parameters))
            return self.with_changes(kwargs[name], self.base(**kwargs))
        return self.with_changes(x, self.base(x, *args, **kwargs))

    def with_changes(self, x: Tensor, plain: Tensor) -> Tensor:
        """`plain`, the base's output for x, and the changes by the adapters at work."""
        if self.by_row is not None:
            return self._change_rows(x, plain)
        result = plain
        for adapter, weight in self.beside().items():
            result = result + self.change(self.update(adapter), x, plain, weight)
        return result

    @property
    def weight(self) -> Any:
        """The base's weight; with what the adapters at work add to it, where the model computes with it."""
        return self.effective_weight() if self.is_read_as_one() else self.base.weight

    @property
    def bias(self) -> Any:
        """The base's bias, in the same way."""
        return self.effective_bias(self.base.bias) if self.is_read_as_one() else self.base.bias

    def is_read_as_one(self) -> bool:
        """Whether the model computes with a weight that adapters change; ConfigError if inputs have several such."""
        dropped = any((own := self.update(name)).dropout and own.training for name in self.beside())
        if self.weight_is_read and (self.by_row is not None or dropped):
            raise ConfigError(
                "the model computes with the weight of an adapted layer without calling the layer, so lora_dropout and "
                "adapters by row cannot be; leave such layers out (exclude_modules), or use no dropout"
            )
        return self.weight_is_read and bool(self.beside())

    def effective_bias(self, bias: Any) -> Any:
        """`bias`, the base's own, and the sum of what the adapters at work add to it."""
        dtype = self.own(self.weight_name).dtype
        changes = [(self.bias_delta(adapter, dtype), weight) for adapter, weight in self.beside().items()]
        own = [change * weight for change, weight in changes if change is not None]
        return sum(own, 0.0 if bias is None else bias) if own else bias

    def effective_weight(self) -> Tensor:
        """The weight with the sum of the updates at work, in its stored form, as part of the gradient graph."""
        weight = self.base_matrix() if not self.merged else as_matrix(self.base, getattr(self.base, self.weight_name))
        for adapter, factor in self.beside().items():
            weight = weight + (self.delta(adapter, working_dtype(weight)) * factor).to(weight.dtype)
        return self.as_parameter(weight)

    def beside(self) -> dict[str, float]:
        """The adapters that work beside the base's weight, which no longer holds those that are merged."""
        return {name: weight for name, weight in self.active.items() if name not in self.merged}

    def change(self, update: Update, x: Tensor, plain: Tensor, weight: float = 1.0) -> Tensor:
        """What an update adds to `plain`, the base's output for x, times `weight`.

        DoRA's gain acts on all of the base's output: dropout is in the update's path alone (PEFT drops x in both).
        """
        change = self.product(update, x)
        if update.lora_bias is not None:
            change = change + self._along_output(update.lora_bias * update.scale)
        if update.magnitude is not None:
            gain = self._along_output(update.magnitude / self.row_lengths(update)).to(plain.dtype)
            bias = self.own(self.bias_name)
            change = (gain - 1) * (plain if bias is None else plain - self._along_output(bias)) + gain * change
        return (change if weight == 1 else change * weight).to(plain.dtype)

    def _change_rows(self, x: Tensor, result: Tensor) -> Tensor:
        assert self.by_row is not None
        for adapter, rows in self.by_row.among(x).items():
            if adapter in self.shares:
                change = self.change(self.update(adapter), x[rows], result[rows])
                result = result.index_add(0, rows, change)
        return result

    def _along_output(self, values: Tensor) -> Tensor:
        """[d] → a shape that lines up with the output."""
        return values if self.output_dim == -1 else values.view(-1, *[1] * (-self.output_dim - 1))

    @torch.no_grad()
    def row_lengths(self, update: Update) -> Tensor:
        """‖W0 + ΔW‖ of each row [d], by ‖W‖² + 2s·⟨W·Aᵀ, B⟩ + s²·B·(A·Aᵀ)·Bᵀ, so without a dense ΔW.

        A constant for the gradient (DoRA, section 4.3). The three terms may cancel, so all that is of the size of A
        and B is computed in fp64.
        """
        weight = self.needed_matrix("use_dora")
        A, B = self.row_factors(update)
        s = update.scale
        weight = weight.to(A.dtype)
        grouped = weight.view(*A.shape[:-2], -1, weight.shape[1])
        across = (grouped @ A.transpose(-2, -1)).double()
        A, B = A.double(), B.double()
        cross = (across * B).sum(-1)
        own = (B @ (A @ A.transpose(-2, -1)) * B).sum(-1)
        squared = weight.square().sum(1) + (2 * s * cross + s * s * own).flatten()
        return squared.clamp_min(torch.finfo(weight.dtype).tiny).sqrt().to(weight.dtype)

    def own(self, name: str) -> Any:
        """The base's own parameter of this name (or None), whatever is merged."""
        return self.unmerged[name] if name in self.unmerged else getattr(self.base, name, None)

    def base_matrix(self) -> Tensor:
        """The base's own weight as [d, k]; raises MergeError if it cannot be read as a dense matrix."""
        return as_matrix(self.base, self.own(self.weight_name))

    def needed_matrix(self, what: str) -> Tensor:
        """`base_matrix`, which `what` cannot do without; raises ConfigError that says so if it cannot be read."""
        try:
            return self.base_matrix()
        except MergeError as error:
            raise ConfigError(
                f"{what} needs the dense weight, and {error}; over a quantised layer go init_lora_weights True, False, "
                '"gaussian", "orthogonal" and "eva", and start_from_original_ (LoftQ), without use_dora'
            ) from None

    def as_parameter(self, matrix: Tensor) -> Tensor:
        """A [d, k] matrix in the form in which the base stores its weight."""
        return as_stored(self.base, matrix)

    @property
    def weight_name(self) -> str:
        """The name of the base's parameter that holds the matrix."""
        return weight_name(self.base)

    @property
    def bias_name(self) -> str:
        """The name of the base's bias, which it may not have."""
        return bias_name(self.base)

    def row_factors(self, update: Update) -> tuple[Tensor, Tensor]:
        """The factors as matrices of the rows of `base_matrix`."""
        low_rank = update.low_rank()
        return low_rank.A, low_rank.B

    @torch.no_grad()
    def set_row_factors(self, update: Update, A: Tensor, B: Tensor) -> None:
        """Take factors in the form that `row_factors` gives."""
        update.set(A.reshape(update.lora_A.shape), B.reshape(update.lora_B.shape))

    def stored_factors(self, update: Update) -> tuple[Tensor, Tensor]:
        """(A, B) as they go to a file."""
        return update.whole_factors()

    def delta(self, adapter: str, dtype: torch.dtype) -> Tensor:
        """What merging an adapter adds to `base_matrix`, [d, k] in `dtype`."""
        update = self.update(adapter)
        A, B = (factor.to(dtype) for factor in self.row_factors(update))
        change = (B @ A).flatten(0, -2).mul_(update.scale)
        if update.magnitude is not None:
            weight = self.base_matrix().to(dtype)
            changed = weight + change
            # As in row_lengths, so that a row of zeros stays one.
            lengths = changed.detach().norm(dim=1).clamp_min(torch.finfo(dtype).tiny ** 0.5)
            change = changed * (update.magnitude.to(dtype) / lengths)[:, None] - weight
        return change

    def bias_delta(self, adapter: str, dtype: torch.dtype) -> Tensor | None:
        """What merging an adapter adds to the base's bias, [d]."""
        update = self.update(adapter)
        return None if update.lora_bias is None else update.lora_bias.to(dtype) * update.scale

    def merge(self, matrix: Tensor, bias: Tensor | None, adapters: dict[str, float]) -> None:
        """Let the base compute with `matrix` [d, k] (and `bias`); its own parameters are kept for `unmerge`."""
        self._replace(self.weight_name, self.as_parameter(matrix))
        if bias is not None:
            self._replace(self.bias_name, bias)
        self.merged = dict(adapters)

    def _replace(self, name: str, values: Tensor) -> None:
        self.unmerged.setdefault(name, getattr(self.base, name))
        setattr(self.base, name, nn.Parameter(values, requires_grad=False))

    def unmerge(self) -> None:
        """Put back the very parameters that the base had before `merge`."""
        for name, parameter in self.unmerged.items():
            setattr(self.base, name, parameter)
        self.unmerged, self.merged = {}, {}

    def _apply(self, fn: Any, recurse: bool = True) -> "LoraLayer":
        """Move to a device or a type; what is kept for `unmerge` goes along."""
        kept = nn.ParameterDict(self.unmerged)._apply(fn)
        self.unmerged = {name: kept[name] for name in self.unmerged}
        return super()._apply(fn, recurse)

    @contextmanager
    def off(self) -> Iterator[None]:
        merged = {name: getattr(self.base, name) for name in self.unmerged}
        for name, parameter in self.unmerged.items():
            setattr(self.base, name, parameter)
        try:
            with super().off():
                yield
        finally:
            for name, parameter in merged.items():
                # Module.to has reached the base's own alone; it may lack a bias.
                own = self.unmerged[name] if self.unmerged[name] is not None else self.unmerged[self.weight_name]
                parameter.data = parameter.data.to(own)
                setattr(self.base, name, parameter)
