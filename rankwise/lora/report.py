"""What an adapter adapts, each matrix and the totals, and what became of each."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class AdaptedMatrix:
    """One adapted d × k matrix and the rank of its update."""

    name: str
    d: int
    k: int
    r: int
    count: int = 1
    """How many such matrices lie in one stack (a mixture's experts), each with an update of its own."""

    @property
    def full(self) -> int:
        """d·k, what full fine-tuning would train."""
        return self.count * self.d * self.k

    @property
    def trained(self) -> int:
        """r·(d + k), what the adapter trains."""
        return self.count * self.r * (self.d + self.k)


@dataclass(frozen=True)
class InjectReport:
    """What `inject_` did. Printing it gives a table."""

    matrices: tuple[AdaptedMatrix, ...]
    heads: dict[str, int]
    """Modules that are trained in full, with their number of parameters."""
    total_parameters: int
    """Parameters of the base model; a shared one counts once."""
    extra: dict[str, int] = field(default_factory=dict)
    """Other numbers that train, by what they are: biases, DoRA's magnitudes, rows of an embedding."""

    @property
    def trainable_parameters(self) -> int:
        return sum(m.trained for m in self.matrices) + sum(self.heads.values()) + sum(self.extra.values())

    @property
    def share(self) -> float:
        """Trained numbers as a share of the base model's."""
        return self.trainable_parameters / self.total_parameters

    @property
    def factor(self) -> float:
        """How many times fewer numbers the adapter trains than the matrices that it adapts hold."""
        return sum(m.full for m in self.matrices) / max(sum(m.trained for m in self.matrices), 1)

    def __str__(self) -> str:
        width = max((len(m.name) for m in self.matrices), default=6)
        lines = [f"{'matrix':<{width}} {'d':>7} {'k':>7} {'r':>4} {'d·k':>13} → {'r·(d+k)':>11}"]
        lines += [
            f"{m.name:<{width}} {m.d:>7} {m.k:>7} {m.r:>4} {m.full:>13,} → {m.trained:>11,}" for m in self.matrices
        ]
        lines += [f"{name}: trained in full, {count:,} numbers" for name, count in self.heads.items()]
        lines += [f"{what}: {count:,} numbers" for what, count in self.extra.items()]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """The totals in one line."""
        full, adapter = sum(m.full for m in self.matrices), sum(m.trained for m in self.matrices)
        return (
            f"{len(self.matrices)} matrices: {full:,} → {adapter:,} numbers, {self.factor:,.1f} times fewer; "
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train ({self.share:.2%})"
        )


@dataclass(frozen=True)
class TrainedUpdate:
    """One update ΔW = scale·B·A, as training left it."""

    name: str
    d: int
    k: int
    rank: int
    scale: float
    numbers: int
    sigma: tuple[float, ...]
    """Its singular values, the largest first; empty where the file holds no single B·A (a convolution's groups)."""
    effective_rank: float
    """exp of the entropy of the singular values' shares."""
    stable_rank: float
    """‖ΔW‖_F² / ‖ΔW‖₂²."""
    strength: float | None = None
    """‖ΔW‖_F / ‖W0‖_F, beside a model; here ΔW is the whole change, with DoRA's magnitudes too."""
    intruders: int | None = None
    """Intruder dimensions among the first 10, beside a model (Shuttleworth et al. 2024, arXiv 2410.21228)."""

    @property
    def kind(self) -> str:
        """The last part of the name, which modules of a kind share."""
        return self.name.rpartition(".")[2]
