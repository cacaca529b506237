"""Losses and logits of a batch of examples: packed where the model allows it, which is checked and not assumed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.data.examples import LabelExample, TextExample
from rankwise.engine.attention import PACKED
from rankwise.engine.batch import Stream, pack, pack_texts, pad

Example = TextExample | LabelExample

# Packing changes the order of sums and nothing else; fp32 logits of real models then differ by less than this share.
_SAME = 1e-3


class Engine:
    """Runs a transformers model on examples.

    The packed path (no padding; a common prefix of causal examples computed once; the output head at trained tokens
    only) gives the loss and the gradients of the plain padded path up to rounding. At construction both are compared
    on short pieces of `sample`; a model that packing cannot serve takes the padded path, and `padded_because` says why.
    """

    def __init__(self, model: Any, pad_id: int, sample: Sequence[Example]) -> None:
        self.model = model
        self.pad_id = pad_id
        self.packs = True
        self.padded_because = self._why_not_packed(sample)
        self.packs = self.padded_because is None

    @property
    def device(self) -> torch.device:
        return self.model.device

    def token_losses(self, examples: Sequence[TextExample]) -> Tensor:
        """[n] cross-entropy, in nats, of each trained token, example by example."""
        logits, targets = self._token_logits(examples)
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def class_logits(self, examples: Sequence[LabelExample]) -> Tensor:
        """[B, number of labels]"""
        if not self.packs:
            ids, mask = pad([example.ids for example in examples], self.pad_id, self.device)
            return self.model(input_ids=ids, attention_mask=mask).logits
        stream = pack_texts(examples, self.device)
        with self._packed_attention():
            hidden = self._hidden(stream)
        return self._classify(hidden, stream)

    def example_losses(self, examples: Sequence[Example]) -> list[float]:
        """The mean loss, in nats a trained token (a text for classification), of each example; no gradient."""
        with torch.no_grad():
            if isinstance(examples[0], LabelExample):
                return F.cross_entropy(
                    self.class_logits(examples).float(), self._labels(examples), reduction="none"
                ).tolist()
            counts = [sum(example.trained[1:]) for example in examples]
            return [losses.mean().item() for losses in self.token_losses(examples).split(counts)]

    def loss(self, examples: Sequence[Example]) -> Tensor:
        """The mean over all trained tokens (texts for classification) of the batch, for the backward pass."""
        if isinstance(examples[0], LabelExample):
            return F.cross_entropy(self.class_logits(examples).float(), self._labels(examples))
        return self.token_losses(examples).mean()

    def _labels(self, examples: Sequence[Example]) -> Tensor:
        return torch.tensor([example.label for example in examples], device=self.device)

    def _token_logits(self, examples: Sequence[TextExample]) -> tuple[Tensor, Tensor]:
        if not self.packs:
            ids, mask = pad([example.ids for example in examples], self.pad_id, self.device)
            trained, _ = pad([example.trained for example in examples], False, self.device)
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return logits[:, :-1][trained[:, 1:].bool()], ids[:, 1:][trained[:, 1:].bool()]
        stream = pack(examples, share_prefix=True, device=self.device)
        with self._packed_attention():
            output = self.model(**self._inputs(stream), logits_to_keep=stream.predictors, use_cache=False)
        return output.logits[0], stream.targets

    def _inputs(self, stream: Stream) -> dict[str, Any]:
        return {"input_ids": stream.ids, "position_ids": stream.positions, "packing": stream.packing}

    def _hidden(self, stream: Stream) -> Tensor:
        return self.model.base_model(**self._inputs(stream)).last_hidden_state[0]

    def _classify(self, hidden: Tensor, stream: Stream) -> Tensor:
        """The model's own head on the position it reads: BERT's pooler and RoBERTa's head the first token, `score` the
        last one."""
        firsts = hidden[stream.predictors, None]
        if hasattr(self.model, "score"):
            lasts = stream.predictors + torch.tensor(stream.packing.lengths, device=hidden.device) - 1
            return self.model.score(hidden[lasts])
        pooler = getattr(self.model.base_model, "pooler", None)
        return self.model.classifier(pooler(firsts) if pooler is not None else firsts)

    @contextmanager
    def _packed_attention(self) -> Iterator[None]:
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(PACKED)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    @torch.no_grad()
    def _why_not_packed(self, sample: Sequence[Example]) -> str | None:
        if not getattr(self.model, "_supports_attention_backend", False):
            return "its attention cannot be exchanged in transformers"
        short = [_short(example) for example in sample[:3]]
        try:
            packed = self._compare(short)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            return f"packing failed: {str(error).splitlines()[0]}"
        self.packs = False
        padded = self._compare(short)
        difference = (packed - padded).abs().max().item() / max(padded.abs().max().item(), 1.0)
        return None if difference < _SAME else f"packing would change its logits by {difference:.1e}"

    def _compare(self, examples: list[Example]) -> Tensor:
        if isinstance(examples[0], LabelExample):
            return self.class_logits(examples)
        return self._token_logits(examples)[0]


def _short(example: Example) -> Example:
    """The first trained token of a conversation with the 24 tokens before it, or the first 24 tokens of a text."""
    if isinstance(example, LabelExample):
        return LabelExample(example.ids[:24], example.label, example.place)
    end = example.prompt_length + 1
    return TextExample(example.ids[:end][-25:], example.trained[:end][-25:], example.place)
