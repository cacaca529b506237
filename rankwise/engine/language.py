"""Logits and losses of causal language models, at trained tokens only."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rankwise.data.examples import TextExample
from rankwise.engine.batch import Stream, pack
from rankwise.engine.check import pieces
from rankwise.engine.engine import FAILURES, Engine
from rankwise.engine.head import OutputHead, head_that_gives, why_not_plain


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
        short = pieces(sample)
        try:
            hidden = self._hidden(short)[0]
            self.head = head_that_gives(self.logits(short)[0], hidden, self.model)
        except FAILURES as error:
            return f"the head cannot be taken apart from the model: {str(error).splitlines()[0]}"
        return None if self.head else "the model does more to its logits than scale or cap them"

    def _each_loss(self, examples: Sequence[TextExample], label_smoothing: float = 0.0) -> Tensor:
        if self.head is None or self.head_unchunked_because is not None:
            return super()._each_loss(examples, label_smoothing)
        return self.head.losses(*self._hidden(examples), label_smoothing)

    def _losses_of_stream(self, stream: Stream, label_smoothing: float) -> Tensor:
        if self.head is None or self.head_unchunked_because is not None:
            return super()._losses_of_stream(stream, label_smoothing)
        return self.head.losses(*self._hidden_in(stream), label_smoothing)

    def _hidden(self, examples: Sequence[TextExample]) -> tuple[Tensor, Tensor]:
        """([n, k] what the head makes logits of, [n] targets)."""
        if self.packs:
            return self._hidden_in(self.stream(examples))
        ids, mask, trained = self._pad(examples)
        with self._recomputing():
            hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden[:, :-1][trained], ids[:, 1:][trained]

    def _hidden_in(self, stream: Stream) -> tuple[Tensor, Tensor]:
        with self._packed_pass(stream, stream.predictors):
            hidden = self._body(stream)
        return hidden[0, stream.predictors], stream.targets

    def stream(self, examples: Sequence[TextExample]) -> Stream:
        return pack(examples, self._device)

    def _body(self, stream: Stream) -> Tensor:
        return self.model.base_model(**stream.inputs(), use_cache=False).last_hidden_state

    def _logits_in(self, stream: Stream) -> tuple[Tensor, Tensor]:
        with self._packed_pass(stream, stream.predictors):
            output = self.model(**stream.inputs(), logits_to_keep=stream.predictors, use_cache=False)
        return output.logits[0], stream.targets

    def _padded(self, examples: Sequence[TextExample]) -> tuple[Tensor, Tensor]:
        ids, mask, trained = self._pad(examples)
        with self._recomputing():
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits[:, :-1][trained], ids[:, 1:][trained]

    def _pad(self, examples: Sequence[TextExample]) -> tuple[Tensor, Tensor, Tensor]:
        """ids and attention mask [B, T]; [B, T - 1], which positions predict a trained token."""
        ids, mask = self.pad([example.ids for example in examples])
        trained = torch.zeros_like(mask, dtype=torch.bool)
        for row, example in zip(trained, examples, strict=True):
            row[: len(example.ids)] = torch.tensor(example.trained)
        return ids, mask, trained[:, 1:]
