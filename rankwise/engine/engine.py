"""Logits and losses of a batch of examples: packed where the model allows it, which is checked and not assumed."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Generic

import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.data.examples import E, LabelExample, TextExample
from rankwise.engine.attention import PACKED, Packing
from rankwise.engine.batch import Stream, pack, pack_texts, pad
from rankwise.engine.head import OutputHead, head_that_gives, why_not_plain
from rankwise.engine.last_block import PAYS_UP_TO, is_watched, last_block, only_at

HELD_OUT_BATCH = 16
"""Rows in one forward pass of an evaluation."""
# Packing changes the order of sums and nothing else; fp32 logits of real models then differ by less than this share.
_SAME = 1e-3
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
        self._last_block = last_block(model)
        self._cuts_up_to = 0.0
        self.padded_because = self._why_not_packed(sample)
        self.packs = self.padded_because is None
        self.whole_last_block_because = self._why_not_cut(sample)
        self._cuts_up_to = PAYS_UP_TO if self.whole_last_block_because is None else 0.0

    def logits(self, examples: Sequence[E]) -> tuple[Tensor, Tensor]:
        """([n, classes] logits, [n] targets) of all that the loss counts, example by example.

        n is the number of trained tokens and the classes are the vocabulary, or n is the number of texts to classify.
        """
        logits, targets = self._packed(examples) if self.packs else self._padded(examples)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), targets

    def loss(self, examples: Sequence[E], label_smoothing: float = 0.0) -> Tensor:
        """The mean cross-entropy, in nats, over all that the batch's loss counts."""
        return self._losses(examples, label_smoothing).mean()

    def example_losses(self, examples: Sequence[E]) -> tuple[Tensor, Tensor]:
        """([B] cross-entropy in nats summed over all that is counted, [B] how much that is), example by example."""
        counts = [example.counted for example in examples]
        losses = self._losses(examples)
        return torch.stack([part.sum() for part in losses.split(counts)]), torch.tensor(counts, device=losses.device)

    def _losses(self, examples: Sequence[E], label_smoothing: float = 0.0) -> Tensor:
        """[n] cross-entropies in nats, in the order of `logits`."""
        return F.cross_entropy(*self.logits(examples), reduction="none", label_smoothing=label_smoothing)

    @property
    def _device(self) -> torch.device:
        return self.model.device

    @abstractmethod
    def _packed(self, examples: Sequence[E]) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _padded(self, examples: Sequence[E]) -> tuple[Tensor, Tensor]: ...

    def cuts_last_block(self, read: int, tokens: int) -> bool:
        """Whether the last block runs only on the tokens that the loss reads, `read` of a stream of `tokens`."""
        block = self._last_block
        return block is not None and read <= self._cuts_up_to * tokens and not is_watched(block)

    def held_out_batches(self, examples: Sequence[E]) -> list[list[int]]:
        """The places of the rows of each forward pass of an evaluation."""
        # Packed rows share what they begin with; padded ones should be equally long.
        order = sorted(range(len(examples)), key=lambda i: examples[i].ids if self.packs else (len(examples[i].ids),))
        return [order[start : start + HELD_OUT_BATCH] for start in range(0, len(order), HELD_OUT_BATCH)]

    @contextmanager
    def _packed_attention(self, packing: Packing, read: Tensor) -> Iterator[None]:
        """Let the model attend within `packing`; of what it puts out, only the tokens at `read` [n] may be used."""
        block = self._last_block if self.cuts_last_block(len(read), sum(packing.lengths)) else None
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(PACKED)
        try:
            with only_at(read, block, packing) if block else nullcontext():
                yield
        finally:
            self.model.set_attn_implementation(before)

    @torch.no_grad()
    def _why_not_packed(self, sample: Sequence[E]) -> str | None:
        if not getattr(self.model, "_supports_attention_backend", False):
            return "its attention cannot be exchanged in transformers"
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            return "it computes its activations again in the backward pass, where the exchanged attention is gone"
        short: list[E] = [example.short() for example in sample[:3]]
        return self._why_not("packing", short, self._padded(short)[0])

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
        short: list[E] = [example.short() for example in sample[:3]]
        whole = self._packed(short)[0]
        self._cuts_up_to = 1.0
        return self._why_not("cutting it", short, whole)

    def _why_not(self, technique: str, examples: Sequence[E], expected: Tensor) -> str | None:
        """Why the packed path, as it is set, does not give the `expected` logits; None if it does."""
        try:
            logits = self._packed(examples)[0]
        except FAILURES as error:
            return f"{technique} failed: {str(error).splitlines()[0]}"
        if logits.shape != expected.shape:
            return f"{technique} would give logits of shape {[*logits.shape]} in place of {[*expected.shape]}"
        difference = (logits - expected).abs().max().item() / max(expected.abs().max().item(), 1.0)
        return None if difference < _SAME else f"{technique} would change its logits by {difference:.1e}"


class LanguageEngine(Engine[TextExample]):
    """For causal language models: the loss counts trained tokens.

    The loss goes from the model's last hidden states through its head in chunks (engine/head.py), if that gives the
    model's own logits, which is checked on the sample too; if not, `head_unchunked_because` says why.
    """

    def __init__(self, model: Any, pad_id: int, sample: Sequence[TextExample]) -> None:
        super().__init__(model, pad_id, sample)
        self.head: OutputHead | None = None
        self._no_head_because = self._find_head(sample)

    @property
    def head_unchunked_because(self) -> str | None:
        """Asked at every loss, as a head may be adapted or set to train after the engine was made."""
        return self._no_head_because or why_not_plain(self.model)

    @torch.no_grad()
    def _find_head(self, sample: Sequence[TextExample]) -> str | None:
        reason = why_not_plain(self.model)
        if reason is not None:
            return reason
        short = [example.short() for example in sample[:3]]
        try:
            hidden = self._hidden(short)[0]
            self.head = head_that_gives(self.logits(short)[0], hidden, self.model)
        except FAILURES as error:
            return f"the head cannot be taken apart from the model: {str(error).splitlines()[0]}"
        return None if self.head else "the model does more to its logits than scale or cap them"

    def _losses(self, examples: Sequence[TextExample], label_smoothing: float = 0.0) -> Tensor:
        if self.head is None or self.head_unchunked_because is not None:
            return super()._losses(examples, label_smoothing)
        return self.head.losses(*self._hidden(examples), label_smoothing)

    def _hidden(self, examples: Sequence[TextExample]) -> tuple[Tensor, Tensor]:
        """([n, k] what the head makes logits of, [n] targets)."""
        if not self.packs:
            ids, mask, trained = self._pad(examples)
            hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            return hidden[:, :-1][trained], ids[:, 1:][trained]
        stream = pack(examples, self._device)
        with self._packed_attention(stream.packing, stream.predictors):
            hidden = self.model.base_model(**_inputs(stream), use_cache=False).last_hidden_state
        return hidden[0, stream.predictors], stream.targets

    def _packed(self, examples: Sequence[TextExample]) -> tuple[Tensor, Tensor]:
        stream = pack(examples, self._device)
        with self._packed_attention(stream.packing, stream.predictors):
            output = self.model(**_inputs(stream), logits_to_keep=stream.predictors, use_cache=False)
        return output.logits[0], stream.targets

    def _padded(self, examples: Sequence[TextExample]) -> tuple[Tensor, Tensor]:
        ids, mask, trained = self._pad(examples)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits[:, :-1][trained], ids[:, 1:][trained]

    def _pad(self, examples: Sequence[TextExample]) -> tuple[Tensor, Tensor, Tensor]:
        """ids and attention mask [B, T]; [B, T - 1], which positions predict a trained token."""
        ids, mask = pad([example.ids for example in examples], self.pad_id, self._device)
        trained = pad([example.trained for example in examples], False, self._device)[0][:, 1:].bool()
        return ids, mask, trained


class WholeTextEngine(Engine[E]):
    """For models that make one result of a whole text."""

    _first_position = 0

    def _why_not_packed(self, sample: Sequence[E]) -> str | None:
        reason = super()._why_not_packed(sample)
        if reason is None:
            return None
        # RoBERTa and its kin count positions from the one after that of padding.
        self._first_position = self.pad_id + 1
        return None if super()._why_not_packed(sample) is None else reason

    def _hidden(self, stream: Stream, read: Tensor) -> Tensor:
        """The last hidden states [n, d] of the tokens at `read` [n] of a packed stream."""
        inputs = _inputs(stream)
        inputs["position_ids"] = stream.positions + self._first_position
        if getattr(self.model.config, "use_cache", False):
            inputs["use_cache"] = False
        with self._packed_attention(stream.packing, read):
            return self.model.base_model(**inputs).last_hidden_state[0, read]


class ClassifierEngine(WholeTextEngine[LabelExample]):
    """For sequence classifiers: the loss counts texts."""

    def _packed(self, examples: Sequence[LabelExample]) -> tuple[Tensor, Tensor]:
        stream = pack_texts(examples, self._device)
        read = stream.predictors
        if self._reads_last:
            read = read + torch.tensor(stream.packing.lengths, device=read.device) - 1
        return self._classify(self._hidden(stream, read)), stream.targets

    def _padded(self, examples: Sequence[LabelExample]) -> tuple[Tensor, Tensor]:
        ids, mask = pad([example.ids for example in examples], self.pad_id, self._device)
        targets = torch.tensor([example.label for example in examples], device=self._device)
        return self.model(input_ids=ids, attention_mask=mask).logits, targets

    @property
    def _reads_last(self) -> bool:
        """Whether the model's head reads the last token of a text, as decoders' `score` does, or the first one."""
        return hasattr(self.model, "score")

    def _classify(self, hidden: Tensor) -> Tensor:
        """The model's own head, BERT's pooler included, on the tokens that it reads: hidden [B, d] → [B, classes]."""
        if self._reads_last:
            return self.model.score(hidden)
        pooler = getattr(self.model.base_model, "pooler", None)
        return self.model.classifier(hidden[:, None] if pooler is None else pooler(hidden[:, None]))


def _inputs(stream: Stream) -> dict[str, Any]:
    return {"input_ids": stream.ids, "position_ids": stream.positions, "packing": stream.packing}
