"""Putting an adapter into a model and taking it out again."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from rankwise.errors import ConfigError, listing
from rankwise.lora.base_weight import dimensions
from rankwise.lora.config import LoraConfig
from rankwise.lora.layers import LoraEmbedding, LoraLayer, LoraLinear, TrainedCopy
from rankwise.lora.targets import select_heads, select_targets


@dataclass(frozen=True)
class AdaptedMatrix:
    """One adapted d × k matrix and the rank of its update."""

    name: str
    d: int
    k: int
    r: int

    @property
    def full(self) -> int:
        """d·k, what full fine-tuning would train."""
        return self.d * self.k

    @property
    def trained(self) -> int:
        """r·(d + k), what the adapter trains."""
        return self.r * (self.d + self.k)


@dataclass(frozen=True)
class InjectReport:
    """What `inject_` did. Printing it gives a table."""

    matrices: tuple[AdaptedMatrix, ...]
    heads: dict[str, int]
    """Modules that are trained in full, with their number of parameters."""
    total_parameters: int
    """Parameters of the base model; a shared one counts once."""

    @property
    def trainable_parameters(self) -> int:
        return sum(m.trained for m in self.matrices) + sum(self.heads.values())

    @property
    def share(self) -> float:
        """Trained numbers as a share of the base model's."""
        return self.trainable_parameters / self.total_parameters

    @property
    def factor(self) -> float:
        """How many times fewer numbers the adapter trains than the matrices that it adapts hold."""
        return sum(m.full for m in self.matrices) / sum(m.trained for m in self.matrices)

    def __str__(self) -> str:
        width = max(len(m.name) for m in self.matrices)
        lines = [f"{'matrix':<{width}} {'d':>7} {'k':>7} {'r':>4} {'d·k':>13} → {'r·(d+k)':>11}"]
        lines += [
            f"{m.name:<{width}} {m.d:>7} {m.k:>7} {m.r:>4} {m.full:>13,} → {m.trained:>11,}" for m in self.matrices
        ]
        lines += [f"{name}: trained in full, {count:,} numbers" for name, count in self.heads.items()]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """The totals in one line."""
        full, adapter = sum(m.full for m in self.matrices), sum(m.trained for m in self.matrices)
        return (
            f"{len(self.matrices)} matrices: {full:,} → {adapter:,} numbers, {self.factor:,.1f} times fewer; "
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train ({self.share:.2%})"
        )


@dataclass
class Injection:
    """What is in a model now; kept on the model itself under `ATTRIBUTE`."""

    config: LoraConfig
    report: InjectReport
    requires_grad: dict[str, bool] = field(repr=False)
    """Whether each base parameter trained before."""


ATTRIBUTE = "_rankwise_injection"


def plan_injection(model: nn.Module, config: LoraConfig) -> InjectReport:
    """What `inject_` would do, without touching the model. Raises what `inject_` raises."""
    if getattr(model, ATTRIBUTE, None) is not None:
        raise ConfigError("this model already carries an adapter; take it out first: rankwise.eject_(model)")
    heads = select_heads(model, config)
    matrices = tuple(
        AdaptedMatrix(name, *dimensions(model.get_submodule(name)), config.r)
        for name in select_targets(model, config, heads)
    )
    too_small = [f"{m.name} is {m.d} × {m.k}" for m in matrices if config.r > min(m.d, m.k)]
    if too_small:
        raise ConfigError(
            f"r = {config.r} is larger than a matrix that it adapts; an update cannot have a higher rank than "
            f"min(d, k). Choose a smaller r, or leave these out of target_modules:\n{listing(too_small)}"
        )
    counts = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in heads}
    return InjectReport(matrices, counts, sum(p.numel() for p in model.parameters()))


def inject_(model: nn.Module, config: LoraConfig, generator: torch.Generator | None = None) -> InjectReport:
    """Freeze `model` and put an adapter beside each target module, in place. At first it computes what it did before.

    `generator` draws the adapter's start values; without it they come from torch's global generator.
    Returns the report of what is adapted. Raises TargetError for patterns that match nothing, ConfigError for an r
    larger than a matrix or a model that already carries an adapter; the model is then unchanged.
    """
    report = plan_injection(model, config)
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    for matrix in report.matrices:
        base = model.get_submodule(matrix.name)
        kind = LoraEmbedding if isinstance(base, nn.Embedding) else LoraLinear
        model.set_submodule(matrix.name, kind(base, config, generator), strict=True)
    for name in report.heads:
        model.set_submodule(name, TrainedCopy(model.get_submodule(name), config), strict=True)
    setattr(model, ATTRIBUTE, Injection(config, report, requires_grad))
    return report


def eject_(model: nn.Module) -> nn.Module:
    """Take the adapter out, in place: the very base modules return, every tensor bit for bit as it was.

    Returns the model. Raises ConfigError if there is no adapter.
    """
    injected = injection(model)
    for name, layer in named_wrappers(model):
        if isinstance(layer, LoraLayer):
            layer.unmerge()
        model.set_submodule(name, layer.base, strict=True)
    delattr(model, ATTRIBUTE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(injected.requires_grad[name])
    return model


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let the model compute as the base alone while the block lasts, merged or not, also if the block raises."""
    with ExitStack() as stack:
        for _, layer in named_wrappers(model):
            stack.enter_context(layer.off())
        yield


def injection(model: nn.Module) -> Injection:
    """What `inject_` noted on the model; raises ConfigError if it carries no adapter."""
    found = getattr(model, ATTRIBUTE, None)
    if found is None:
        raise ConfigError("this model carries no adapter; put one in first: rankwise.inject_(model, LoraConfig())")
    return found


def named_wrappers(model: nn.Module) -> list[tuple[str, LoraLayer | TrainedCopy]]:
    """All layers of the adapter with their names in the base model, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer | TrainedCopy)]


def named_lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """The layers that carry a low-rank update, with their names in the base model."""
    return [(name, layer) for name, layer in named_wrappers(model) if isinstance(layer, LoraLayer)]


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the adapter that train, told by the type of their layer and not by a name."""
    own = []
    for _, layer in named_wrappers(model):
        own += [layer.lora_A, layer.lora_B] if isinstance(layer, LoraLayer) else list(layer.trained.parameters())
    return [parameter for parameter in own if parameter.requires_grad]


def set_adapter_training(model: nn.Module, training: bool) -> None:
    """Switch the adapter's dropout on or off. The frozen base stays in evaluation mode: it is a fixed function."""
    model.eval()
    for _, layer in named_wrappers(model):
        layer.training = training
