"""Logits and losses of a batch of examples: packed where the model allows it, which is checked and not assumed."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic

import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.data.examples import E, LabelExample, TextExample
from rankwise.engine.attention import PACKED
from rankwise.engine.batch import Stream, pack, pack_texts, pad

# Packing changes the order of sums and nothing else; fp32 logits of real models then differ by less than this share.
_SAME = 1e-3


class Engine(ABC, Generic[E]):
    """Runs a transformers model on examples.

    The packed path (no padding; a beginning that causal examples share computed once; the output head at trained
    tokens only) gives the loss and the gradients of the plain padded path up to rounding. At construction both are
    compared on short pieces of `sample`; a model that packing cannot serve takes the padded path, and `padded_because`
    says why.
    """

    def __init__(self, model: Any, pad_id: int, sample: Sequence[E]) -> None:
        self.model = model
        self.pad_id = pad_id
        self.packs = True
        self.padded_because = self._why_not_packed(sample)
        self.packs = self.padded_because is None

    def logits(self, examples: Sequence[E]) -> tuple[Tensor, Tensor]:
        """([n, classes] logits, [n] targets) of all that the loss counts, example by example.

        n is the number of trained tokens and the classes are the vocabulary, or n is the number of texts to classify.
        """
        logits, targets = self._packed(examples) if self.packs else self._padded(examples)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), targets

    def loss(self, examples: Sequence[E]) -> Tensor:
        """The mean cross-entropy, in nats, over all that the batch's loss counts."""
        return F.cross_entropy(*self.logits(examples))

    def example_losses(self, examples: Sequence[E]) -> tuple[Tensor, Tensor]:
        """([B] cross-entropy in nats summed over all that is counted, [B] how much that is), example by example."""
        counts = [example.counted for example in examples]
        losses = F.cross_entropy(*self.logits(examples), reduction="none")
        return torch.stack([part.sum() for part in losses.split(counts)]), torch.tensor(counts, device=losses.device)

    @property
    def _device(self) -> torch.device:
        return self.model.device

    @abstractmethod
    def _packed(self, examples: Sequence[E]) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _padded(self, examples: Sequence[E]) -> tuple[Tensor, Tensor]: ...

    @contextmanager
    def _packed_attention(self) -> Iterator[None]:
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(PACKED)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    @torch.no_grad()
    def _why_not_packed(self, sample: Sequence[E]) -> str | None:
        if not getattr(self.model, "_supports_attention_backend", False):
            return "its attention cannot be exchanged in transformers"
        short: list[E] = [example.short() for example in sample[:3]]
        try:
            packed = self._packed(short)[0]
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            return f"packing failed: {str(error).splitlines()[0]}"
        padded = self._padded(short)[0]
        difference = (packed - padded).abs().max().item() / max(padded.abs().max().item(), 1.0)
        return None if difference < _SAME else f"packing would change its logits by {difference:.1e}"


class LanguageEngine(Engine[TextExample]):
    """For causal language models: the loss counts trained tokens."""

    def _packed(self, examples: Sequence[TextExample]) -> tuple[Tensor, Tensor]:
        stream = pack(examples, self._device)
        with self._packed_attention():
            output = self.model(**_inputs(stream), logits_to_keep=stream.predictors, use_cache=False)
        return output.logits[0], stream.targets

    def _padded(self, examples: Sequence[TextExample]) -> tuple[Tensor, Tensor]:
        ids, mask = pad([example.ids for example in examples], self.pad_id, self._device)
        trained = pad([example.trained for example in examples], False, self._device)[0][:, 1:].bool()
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits[:, :-1][trained], ids[:, 1:][trained]


class ClassifierEngine(Engine[LabelExample]):
    """For sequence classifiers: the loss counts texts."""

    def _packed(self, examples: Sequence[LabelExample]) -> tuple[Tensor, Tensor]:
        stream = pack_texts(examples, self._device)
        with self._packed_attention():
            hidden = self.model.base_model(**_inputs(stream)).last_hidden_state[0]
        return self._classify(hidden, stream), stream.targets

    def _padded(self, examples: Sequence[LabelExample]) -> tuple[Tensor, Tensor]:
        ids, mask = pad([example.ids for example in examples], self.pad_id, self._device)
        targets = torch.tensor([example.label for example in examples], device=self._device)
        return self.model(input_ids=ids, attention_mask=mask).logits, targets

    def _classify(self, hidden: Tensor, stream: Stream) -> Tensor:
        """The model's own head on the position it reads: BERT's pooler and RoBERTa's head the first token, `score` the
        last one."""
        if hasattr(self.model, "score"):
            lasts = stream.predictors + torch.tensor(stream.packing.lengths, device=hidden.device) - 1
            return self.model.score(hidden[lasts])
        firsts = hidden[stream.predictors, None]
        pooler = getattr(self.model.base_model, "pooler", None)
        return self.model.classifier(pooler(firsts) if pooler is not None else firsts)


def engine_for(task: str, model: Any, pad_id: int, sample: Sequence[Any]) -> Engine[Any]:
    """The engine for "causal_lm" or "seq_cls"."""
    return (ClassifierEngine if task == "seq_cls" else LanguageEngine)(model, pad_id, sample)


def _inputs(stream: Stream) -> dict[str, Any]:
    return {"input_ids": stream.ids, "position_ids": stream.positions, "packing": stream.packing}
