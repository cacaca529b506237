"""A model as its matrices: what an adapter of it trains and what its forward pass leaves for the backward pass.

Symbols: d × k a matrix (d outputs), T tokens of a padded row, h heads of width w, g key/value heads, f inner width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from rankwise.errors import ConfigError, TargetError, listing, nearest
from rankwise.lora.config import ALL_LINEAR, LoraConfig, lies_in_head, matches_target
from rankwise.lora.report import AdaptedMatrix, InjectReport
from rankwise.plan.workload import Run

Attention = Literal["packed", "padded", "scores"]
"""How rankwise's engine runs it: packed; padded; or padded with an attention that writes its scores down."""
SOURCE = "source"
"""What the keys and values of a decoder's cross attention read: what the encoder puts out, at the encoder's tokens."""
_MAGNITUDES = "magnitudes"
"""What InjectReport.extra calls the lengths of rows that DoRA trains."""


@dataclass(frozen=True)
class Linear:
    """One linear layer."""

    name: str
    d: int
    k: int
    bias: bool
    reads: str
    """Which tensor it reads; two layers with the same entry read the same one."""

    @property
    def parameters(self) -> int:
        return self.d * self.k + self.d * self.bias

    def tokens(self, run: Run) -> int:
        """Tokens that it runs on."""
        return run.source if self.reads == SOURCE else run.computed


@dataclass(frozen=True)
class Block:
    """One of a model's equal layers."""

    linears: tuple[Linear, ...]
    """With names inside the block."""
    other: int
    """Parameters that lie in no linear layer: norms."""
    kept: Mapping[str, int]
    """Numbers a token that the backward pass needs whatever is adapted, by what they are."""
    from_input: tuple[str, ...]
    """Tensors that linear layers read and that come from the block's input through norms alone."""
    activations: int
    """Values a token that go through an activation function."""
    kept_by_pair: tuple[int, ...] = ()
    """For each attention of a padded batch, more numbers that are kept, for each pair of a query and a key: a mask, or
    the scores of an attention that writes them down."""
    kept_by_pair_of_a_row: int = 0
    """More such numbers for the pairs of the first attention, which all rows share: a bias by position."""
    kept_of_source: int = 0
    """Numbers that are kept for each token of the encoder: keys and values of cross attention."""

    def kept_by_attention(self, run: Run) -> int:
        """Numbers of a batch that no single token keeps."""
        pairs = [rows * queries * keys for rows, queries, keys in run.attention]
        by_pair = sum(number * count for number, count in zip(self.kept_by_pair, pairs, strict=False))
        return by_pair + self.kept_by_pair_of_a_row * pairs[0] // run.attention[0][0] + self.kept_of_source * run.source


@dataclass(frozen=True)
class Stack:
    """Equal blocks, one after the other."""

    path: str
    """Name of the list of blocks."""
    block: Block
    layers: int

    def linears(self) -> Iterator[Linear]:
        """With whole names."""
        for index in range(self.layers):
            for linear in self.block.linears:
                yield replace(linear, name=f"{self.path}.{index}.{linear.name}")

    @property
    def parameters(self) -> int:
        return self.layers * (self.block.other + sum(linear.parameters for linear in self.block.linears))

    def adapted(self, ranks: Mapping[str, int], index: int) -> list[tuple[Linear, int]]:
        """The adapted matrices of block `index`, each with its rank; `ranks` has them by whole name."""
        named = [(f"{self.path}.{index}.{linear.name}", linear) for linear in self.block.linears]
        return [(linear, ranks[name]) for name, linear in named if name in ranks]

    def kept_in_block(self, ranks: Mapping[str, int], index: int, run: Run, dora: bool = False) -> int:
        """Numbers that block `index` keeps for the backward pass of a batch, beside what the encoder puts out.

        `ranks`: of the adapted matrices, by whole name. `dora`: they train magnitudes too.
        """
        adapted = self.adapted(ranks, index)
        # A frozen matrix needs no input for its backward pass; an adapted one needs its input x, and A·x.
        inputs = {linear.reads: linear.k for linear, _ in adapted if linear.reads != SOURCE}
        # DoRA multiplies the base's output and the update's, and keeps both for the gradient of the magnitudes.
        beside = sum((r + 2 * linear.d * dora) * linear.tokens(run) for linear, r in adapted)
        by_token = sum({**inputs, **self.block.kept}.values())
        return by_token * run.computed + beside + self.block.kept_by_attention(run)


@dataclass(frozen=True)
class ModelShape:
    """All that a plan needs to know of a model."""

    model_type: str
    stacks: tuple[Stack, ...]
    """A single one, or an encoder's and a decoder's."""
    heads: int
    head_width: int
    causal: bool
    attention: Attention
    vocabulary: int
    width: int
    """Of the stream of hidden states."""
    other: int
    """Parameters outside of blocks that lie in no linear layer: embeddings, norms."""
    positions: int
    """Most tokens of a row."""
    head: Linear
    """The output head of a language model, or the last layer of a classifier; without outputs for embeddings."""
    head_is_tied: bool
    outside: tuple[Linear, ...] = ()
    """Linear layers outside of the blocks and before the head, with whole names; they run once a text, not a token."""
    of_texts: bool = False
    """Whether the head, or the loss, takes a text as a whole."""

    def linears(self) -> Iterator[Linear]:
        """Every linear layer but the head, with whole names."""
        for stack in self.stacks:
            yield from stack.linears()
        yield from self.outside

    @property
    def total_parameters(self) -> int:
        """A shared one counts once."""
        blocks = sum(stack.parameters for stack in self.stacks)
        outside = sum(linear.parameters for linear in self.outside)
        return self.other + blocks + outside + (0 if self.head_is_tied else self.head.parameters)

    @property
    def keeps_linears_wide(self) -> bool:
        """Whether the blocks' linear layers are of their own kind, which is not stored in bf16 (lora/narrow.py)."""
        return self.model_type in ("gpt2", "falcon")

    @property
    def attended(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_width

    def largest_ranks(self, lora: LoraConfig) -> dict[str, int]:
        """min(d, k) of each matrix that would be adapted, by name: no update can have a higher rank."""
        return {m.name: min(m.d, m.k) for m in self.adapted(replace(lora, r=1, rank_pattern={})).matrices}

    def adapted(self, lora: LoraConfig) -> InjectReport:
        """What `rankwise.inject_` would report of this model.

        Raises TargetError if no linear layer is there, or none that a pattern names; ConfigError for a rank above
        min(d, k).
        """
        in_full = [linear for linear in (*self.outside, self.head) if lies_in_head(linear.name, lora.heads)]
        free = [linear for linear in self.linears() if linear not in in_full]
        if lora.target_modules == ALL_LINEAR:
            chosen = [linear for linear in free if min(linear.d, linear.k) > 1]
            if not chosen:
                raise TargetError(f"this {self.model_type} model has no linear layer to adapt; see its widths")
        else:
            chosen = _matching(
                lora, free if self.head in in_full or not self.head.d else [*free, self.head], self.model_type
            )
        chosen = self._in_layers(chosen, lora)
        matrices = tuple(AdaptedMatrix(m.name, m.d, m.k, lora.rank_of(m.name)) for m in chosen)
        too_high = [f"{m.name} is {m.d} × {m.k}, and r = {m.r} is larger" for m in matrices if m.r > min(m.d, m.k)]
        if too_high:
            raise ConfigError("an update cannot have a higher rank than min(d, k):\n" + listing(too_high))
        extra = {_MAGNITUDES: sum(m.d for m in matrices)} if lora.use_dora else {}
        return InjectReport(matrices, {m.name: m.parameters for m in in_full}, self.total_parameters, extra)

    def _in_layers(self, linears: list[Linear], lora: LoraConfig) -> list[Linear]:
        """Those that lie in the blocks of layers_to_transform, if it is set."""
        wanted = lora.layers_to_transform
        if wanted is None:
            return linears
        indices = {wanted} if isinstance(wanted, int) else set(wanted)
        blocks = tuple(f"{stack.path}.{index}." for stack in self.stacks for index in indices)
        deepest = max(stack.layers for stack in self.stacks)
        if missing := sorted(index for index in indices if index >= deepest):
            raise TargetError(f"layers_to_transform: there are {deepest} blocks from 0 on, and none of index {missing}")
        return [linear for linear in linears if linear.name.startswith(blocks)]


def is_dora(report: InjectReport) -> bool:
    """Whether each adapted d × k matrix has d magnitudes that train."""
    return _MAGNITUDES in report.extra


def _matching(lora: LoraConfig, linears: list[Linear], model_type: str) -> list[Linear]:
    """The layers that target_modules name; every entry must match one."""
    names = [linear.name for linear in linears]
    wanted = lora.target_modules
    hits = {
        pattern: {name for name in names if matches_target(name, pattern, isinstance(wanted, str))}
        for pattern in ([wanted] if isinstance(wanted, str) else wanted)
    }
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    problems = [
        f"{pattern!r} matches no linear layer" + (nearest(pattern, endings) or f" (there are: {', '.join(endings)})")
        for pattern, found in hits.items()
        if not found
    ]
    if problems:
        raise TargetError(f"target_modules do not fit a {model_type} model:\n" + listing(problems))
    return [linear for linear in linears if any(linear.name in found for found in hits.values())]
