"""Logits and losses of a batch of examples: packed where the model allows it, which is checked and not assumed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from rankwise.data.examples import E, longest_text
from rankwise.engine.attention import PACKED
from rankwise.engine.batch import Stream, join, pad
from rankwise.engine.blocks import blocks_of, inputs_of, is_watched
from rankwise.engine.check import BESIDE, difference, narrowest_window, pieces, put_out, rounding, token_difference
from rankwise.engine.frozen_states import FrozenStates
from rankwise.engine.last_block import PAYS_UP_TO, only_at
from rankwise.engine.recompute import recomputing
from rankwise.errors import ConfigError
from rankwise.lora.adapters import adapters_by_part

EVALUATED_AT_ONCE = 1024
"""Tokens in one forward pass of an evaluation, padding included; a single longer example is one too."""
# What a model raises whose parts do not work as the engine expects.
FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, IndexError)


class Engine(ABC, Generic[E]):
    """Runs a transformers model on examples.

    The packed path (no padding; a beginning that causal examples share computed once; the last block and the output
    head at trained tokens only) gives the loss and the gradients of the plain padded path up to rounding. At
    construction both are compared on short pieces of `sample`; a model that packing cannot serve takes the padded path,
    and `padded_because` says why; one whose last block cannot be cut runs it whole, and `whole_last_block_because` says
    why.
    """

    def __init__(self, model: Any, pad_id: int, sample: Sequence[E]) -> None:
        self.model = model
        self.pad_id = pad_id
        self.packs = True
        self.recomputes = False
        """Whether the backward pass computes the blocks' activations again; may be set at any time."""
        self.states: FrozenStates | None = None
        """What enters the lowest block that trains, as far as it is known."""
        self.blocks = blocks_of(model)
        """None if they were not found."""
        parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        self._configs = list({id(part.config): part.config for part in parts}.values())
        self._may_recompute = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self._last_block = self.blocks[-1] if self.blocks else None
        self._cuts_up_to = 0.0
        self._least_padded = 0
        self.padded_because = self._why_not_packed(sample)
        self.packs = self.padded_because is None
        if self.padded_because is not None and self._depends_on_padding(sample):
            self.padded_because += "; what it computes of a text depends on the padding beside it, so on other rows too"
        self.whole_last_block_because = self._why_not_cut(sample)
        self._cuts_up_to = PAYS_UP_TO if self.whole_last_block_because is None else 0.0

    def logits(self, examples: Sequence[E]) -> tuple[Tensor, Tensor]:
        """([n, classes] logits, [n] targets) of all that the loss counts, example by example.

        n is the number of trained tokens and the classes are the vocabulary, or n is the number of texts to classify or
        of words to tag. Where a text may have several labels, its targets are [n, classes] of 0 and 1.
        """
        return _at_least_fp32(*(self._packed(examples) if self.packs else self._padded(examples)))

    def begin_step(self) -> None:
        """What the training loop calls before the batches of each step."""

    def loss(self, examples: Sequence[E], label_smoothing: float = 0.0) -> Tensor:
        """The mean cross-entropy, in nats, over all that the batch's loss counts."""
        return self._each_loss(examples, label_smoothing).mean()

    def losses_by_adapter(self, batches: Mapping[str, Sequence[E]], label_smoothing: float = 0.0) -> list[Tensor]:
        """For each adapter the mean cross-entropy, in nats, over all that its own batch's loss counts, in one pass.

        Raises ConfigError if the adapters, or this model's, cannot share a pass.
        """
        reason = self.why_no_shared_pass()
        if reason is not None:
            raise ConfigError(reason)
        streams = [self.stream(batch) for batch in batches.values()]
        tokens, counts = ([x.tokens for x in streams], [len(x.targets) for x in streams])
        cut = [len(x.predictors) + len(x.spare) for x in streams]
        sizes = {sum(parts): tuple(parts) for parts in (tokens, cut, counts)}
        with adapters_by_part(self.model, list(batches), sizes):
            losses = self._losses_of_stream(join(streams), label_smoothing)
        return [part.mean() for part in losses.split(counts)]

    def why_no_shared_pass(self) -> str | None:
        """Why adapters of this model can share no pass, whatever they are; None if nothing is known against it."""
        if not self.packs:
            return f"adapters share a pass only in packed streams; this model is padded: {self.padded_because}"
        if self.recomputes or self._recomputed_by_transformers():
            return "adapters share no pass whose activations are computed again: by then each would compute for all"
        if self.why_depends_on_longest is not None:
            return f"adapters share no pass: {self.why_depends_on_longest}"
        return None

    def example_losses(self, examples: Sequence[E]) -> tuple[Tensor, Tensor]:
        """([B] cross-entropy in nats summed over all that is counted, [B] how much that is), example by example."""
        counts = [example.counted for example in examples]
        losses = self._each_loss(examples)
        return torch.stack([part.sum() for part in losses.split(counts)]), torch.tensor(counts, device=losses.device)

    def evaluation_batches(self, examples: Sequence[E]) -> list[list[int]]:
        """The places of the examples of each forward pass of an evaluation."""
        # Packed rows share what they begin with; padded ones should be equally long.
        order = sorted(range(len(examples)), key=lambda i: examples[i].ids if self.packs else (len(examples[i].ids),))
        batches: list[list[int]] = []
        lengths: list[int] = []
        for place in order:
            lengths.append(len(examples[place].ids))
            tokens = sum(lengths) if self.packs else max(lengths) * len(lengths)
            if not batches or tokens > EVALUATED_AT_ONCE:
                batches.append([])
                del lengths[:-1]
            batches[-1].append(place)
        return batches

    def _each_loss(self, examples: Sequence[E], label_smoothing: float = 0.0) -> Tensor:
        """[n] cross-entropies in nats, in the order of `logits`."""
        return self.losses_from_logits(*self.logits(examples), label_smoothing)

    def losses_from_logits(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """[n] cross-entropies in nats of what `logits` gives."""
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)

    def answers(self, logits: Tensor) -> Tensor:
        """What the model finds: [n] the most likely class, as the examples' `answer` has it."""
        return logits.argmax(-1)

    @property
    def stacks(self) -> list[nn.ModuleList]:
        """All lists of blocks, whose activations may be computed again."""
        return [self.blocks] if self.blocks else []

    @property
    def inner(self) -> "Engine[E]":
        """The engine that runs the passes: this one. What stands around an engine (rank/nested.py) names that."""
        return self

    @property
    def why_depends_on_longest(self) -> str | None:
        """Why the hidden states of a text are others beside a longer one; None if they are the same."""
        kinds = {kind for config in self._configs for kind in _rope_types(getattr(config, "rope_parameters", None))}
        found = sorted(kind for kind in kinds if "dynamic" in kind or kind == "longrope")
        return f"its {found[0]} rotary positions depend on the longest text of a batch" if found else None

    @property
    def _device(self) -> torch.device:
        return self.model.device

    def _packed(self, examples: Sequence[E]) -> tuple[Tensor, Tensor]:
        return self._logits_in(self.stream(examples))

    def _losses_of_stream(self, stream: Stream, label_smoothing: float) -> Tensor:
        """[n] cross-entropies in nats of a stream of examples."""
        return self.losses_from_logits(*_at_least_fp32(*self._logits_in(stream)), label_smoothing)

    @abstractmethod
    def stream(self, examples: Sequence[E]) -> Stream:
        """The examples one after the other, as the packed path runs them."""

    @abstractmethod
    def _body(self, stream: Stream) -> Tensor:
        """[1, T, k] the last hidden states of a stream, in whatever attention is set."""

    @abstractmethod
    def _logits_in(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """The logits and targets of a stream of examples."""

    @abstractmethod
    def _padded(self, examples: Sequence[E]) -> tuple[Tensor, Tensor]: ...

    def cuts_last_block(self, read: int, tokens: int) -> bool:
        """Whether the last block runs only on the tokens that the loss reads, `read` of a stream of `tokens`."""
        block = self._last_block
        return block is not None and read <= self._cuts_up_to * tokens and not is_watched(block)

    @contextmanager
    def _packed_pass(self, stream: Stream, read: Tensor) -> Iterator[None]:
        """Let the model run a stream; of what it puts out, only the tokens at `read` [n] may be used."""
        block = self._last_block if self.cuts_last_block(len(read), stream.tokens) else None
        flagged = self._recomputed_by_transformers()
        with (
            self._exchanged(flagged),
            # Sorted, so that in a pass that adapters share each one's rows stand together.
            only_at(torch.cat([read, stream.spare]).sort().values, block, stream.packing) if block else nullcontext(),
            self._from_states(stream),
            self._recomputing(lambda: self._exchanged(flagged), also=bool(flagged)),
        ):
            yield

    @contextmanager
    def _from_states(self, stream: Stream) -> Iterator[None]:
        """Let the model begin at the lowest block that trains, if what enters it is known for all texts."""
        states, blocks = self.states, self.blocks
        with states.begin_at(blocks, stream) if blocks and states and states.cover(stream) else nullcontext():
            yield

    def entering(self, examples: Sequence[E], blocks: Sequence[nn.Module]) -> list[Tensor]:
        """[1, T, d] what enters each of these blocks when a stream of `examples` runs, as far as the last of them.

        Raises RuntimeError if the model does not call each of them once, in this order.
        """
        stream = self.stream(examples)
        with self._exchanged(self._recomputed_by_transformers()):
            return inputs_of(blocks, lambda: self._body(stream))

    @contextmanager
    def _exchanged(self, flagged: Sequence[Any]) -> Iterator[None]:
        """Let the model use packed attention, and no recomputation of its own in the modules that are `flagged`."""
        before = [config._attn_implementation for config in self._configs]
        # What set_attn_implementation does, which searches the whole model each time.
        for config in self._configs:
            config._attn_implementation = PACKED
        for module in flagged:
            module.gradient_checkpointing = False
        try:
            yield
        finally:
            for config, implementation in zip(self._configs, before, strict=True):
                config._attn_implementation = implementation
            for module in flagged:
                module.gradient_checkpointing = True

    @contextmanager
    def _recomputing(
        self, again: Callable[[], AbstractContextManager[None]] = nullcontext, also: bool = False
    ) -> Iterator[None]:
        """Let the model's blocks keep their input alone, if the engine (or `also`) wants it and there are gradients."""
        with ExitStack() as stacks:
            if (self.recomputes or also) and torch.is_grad_enabled():
                for blocks in self.stacks:
                    stacks.enter_context(recomputing(blocks, again))
            yield

    def _recomputed_by_transformers(self) -> list[Any]:
        """Modules that activation_checkpointing_enable() has told to compute their activations again.

        Their recomputation would meet the model's own attention in the backward pass, so the engine takes it over.
        """
        return [module for module in self._may_recompute if module.gradient_checkpointing]

    @torch.no_grad()
    def _why_not_packed(self, sample: Sequence[E]) -> str | None:
        if not getattr(self.model, "_supports_attention_backend", False):
            return "its attention cannot be exchanged in transformers"
        if self.blocks is None and self._recomputed_by_transformers():
            return "it computes its activations again in the backward pass, and no list of blocks was found in it"
        short = pieces(sample, narrowest_window(self._configs))
        parts = [self.model.base_model, *([self._last_block] if self._last_block is not None else [])]
        with put_out(parts) as padded:
            expected = self._padded(short)[0]
        with put_out(parts) as packed:
            reason = self.why_not("packing", short, expected)
        if reason is not None:
            return reason
        changed = token_difference(self.stream(short), packed, padded)
        if changed < rounding(expected.dtype):
            return None
        return f"packing would change its hidden states by {changed:.1e}"

    @torch.no_grad()
    def _depends_on_padding(self, sample: Sequence[E]) -> bool:
        """Whether more padding changes what the model computes of an example, at all of its tokens."""
        short = pieces(sample)[:1]
        found = []
        try:
            for least in (0, longest_text(short[0]) + BESIDE):
                self._least_padded = least
                with put_out([self.model.base_model]) as hidden:
                    logits = self._padded(short)[0]
                found.append((logits, *hidden.values()))
        except FAILURES:  # It has no more positions.
            return False
        finally:
            self._least_padded = 0
        (alone, *states), (beside, *others) = found
        tokens = min([len(short[0].texts[0]), *(x.shape[1] for x in states)])
        changed = [difference(beside, alone)]
        changed += [difference(y[0, :tokens], x[0, :tokens]) for x, y in zip(states, others, strict=True)]
        return max(changed) >= rounding(alone.dtype)

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(ids, attention mask) of a padded batch, both [B, longest]."""
        return pad(rows, self.pad_id, self._device, least=self._least_padded)

    @torch.no_grad()
    def _why_not_cut(self, sample: Sequence[E]) -> str | None:
        if not self.packs:
            return "it needs packed streams"
        if self._last_block is None:
            return "no list of blocks was found in the model"
        if is_watched(self._last_block):
            return "there are hooks in it"
        if getattr(self.model.config, "layerdrop", 0):
            return "the model leaves out blocks at random"
        short = pieces(sample)
        whole = self.packed(short)
        self._cuts_up_to = 1.0
        return self.why_not("cutting it", short, whole)

    def packed(self, examples: Sequence[E]) -> Tensor:
        """What the packed path gives, as `why_not` compares it."""
        return self._packed(examples)[0]

    def why_not(self, technique: str, examples: Sequence[E], expected: Tensor) -> str | None:
        """Why the packed path, as it is set, does not give what is `expected`; None if it does."""
        try:
            logits = self.packed(examples)
        except FAILURES as error:
            return f"{technique} failed: {str(error).splitlines()[0]}"
        if logits.shape != expected.shape:
            return f"{technique} would give logits of shape {[*logits.shape]} in place of {[*expected.shape]}"
        changed = difference(logits, expected)
        return None if changed < rounding(logits.dtype) else f"{technique} would change its logits by {changed:.1e}"


class WholeTextEngine(Engine[E]):
    """For models that read each text as a whole, so that no two texts share anything in a stream."""

    _first_position = 0

    def _why_not_packed(self, sample: Sequence[E]) -> str | None:
        reasons = []
        # RoBERTa and its kin count positions from the one after that of padding.
        for first in (0, self.pad_id + 1):
            self._first_position = first
            reasons.append(super()._why_not_packed(sample))
            if reasons[-1] is None:
                return None
        return reasons[0]

    def _body(self, stream: Stream) -> Tensor:
        inputs = stream.inputs()
        inputs["position_ids"] = stream.positions + self._first_position
        if getattr(self.model.config, "use_cache", None) is not None:
            inputs["use_cache"] = False
        with _without_pooler(self.model.base_model):
            return self.model.base_model(**inputs).last_hidden_state

    def _read_hidden(self, stream: Stream, read: Tensor) -> Tensor:
        """[n, k] the last hidden states of the tokens at `read` [n] of a stream."""
        with self._packed_pass(stream, read):
            return self._body(stream)[0, read]


def _rope_types(parameters: Any) -> Iterator[str]:
    """The kinds of rotary positions that a configuration names, once or for each kind of layer."""
    for key, value in (parameters or {}).items():
        if key == "rope_type":
            yield value
        elif isinstance(value, dict):
            yield from _rope_types(value)


def _at_least_fp32(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), targets


@contextmanager
def _without_pooler(body: Any) -> Iterator[None]:
    """BERT's body pools the first token of what it is given, which says nothing about a stream."""
    pooler = getattr(body, "pooler", None)
    if pooler is not None:
        body.pooler = None
    try:
        yield
    finally:
        if pooler is not None:
            body.pooler = pooler
