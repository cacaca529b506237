"""Embeddings of texts, packed or padded, and the contrastive loss of pairs of them."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.data.examples import Ids
from rankwise.data.pairs import PairExample
from rankwise.engine.batch import Stream, pack_whole
from rankwise.engine.contrast import Contrast
from rankwise.engine.engine import WholeTextEngine
from rankwise.models.pooling import pooling_of

ROWS_TOGETHER = 16
"""Rows that an evaluation contrasts with each other."""


class EmbeddingEngine(WholeTextEngine[PairExample]):
    """For models that embed texts: the loss counts rows, and depends on the rows that share a batch."""

    def __init__(self, model: Any, pad_id: int, sample: Sequence[PairExample]) -> None:
        """Raises ModelError if the model's files ask for a pooling that is not served."""
        self.pooling = pooling_of(model)
        super().__init__(model, pad_id, sample)

    def logits(self, examples: Sequence[PairExample]) -> tuple[Tensor, Tensor]:
        """([n, c] scaled cosines of the anchors with the batch's candidates, [n] targets); see engine/contrast.py."""
        contrast = Contrast.of(examples)
        return contrast.logits(self.embed(contrast.texts)), torch.tensor(contrast.targets, device=self._device)

    def embed(self, texts: Sequence[Ids]) -> Tensor:
        """[u, d] embeddings of length 1, in fp32 at least."""
        hidden = self._packed_texts(texts) if self.packs else self._padded_texts(texts)
        return F.normalize(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), dim=1)

    def evaluation_batches(self, examples: Sequence[PairExample]) -> list[list[int]]:
        """At least ROWS_TOGETHER rows each (where there are so many), drawn once and for all: an example's loss depends
        on the rows beside it, so the same ones stand beside it at every evaluation of the same rows."""
        order = random.Random(0).sample(range(len(examples)), len(examples))
        count = max(1, len(order) // ROWS_TOGETHER)
        return [order[start::count] for start in range(count)]

    def why_no_shared_pass(self) -> str | None:
        return "the loss of pairs is one of a whole batch, so adapters cannot share a pass"

    def _logits_in(self, stream: Stream) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("the loss of pairs needs their examples, not their stream")

    def _packed(self, examples: Sequence[PairExample]) -> tuple[Tensor, Tensor]:
        """Embeddings in the place of logits: a wrong one shows more clearly than in cosines that nearly agree."""
        contrast = Contrast.of(examples)
        return self._packed_texts(contrast.texts), torch.tensor(contrast.targets, device=self._device)

    def _padded(self, examples: Sequence[PairExample]) -> tuple[Tensor, Tensor]:
        contrast = Contrast.of(examples)
        return self._padded_texts(contrast.texts), torch.tensor(contrast.targets, device=self._device)

    def stream(self, examples: Sequence[PairExample]) -> Stream:
        """The different texts of a batch; predictors are the tokens that pooling reads, targets their texts."""
        return self._stream(Contrast.of(examples).texts)

    def _stream(self, texts: Sequence[Ids]) -> Stream:
        read = [self._read(len(text)) for text in texts]
        owners = [number for number, places in enumerate(read) for _ in places]
        return pack_whole(texts, read, owners, self._device)

    def _read(self, length: int) -> range:
        """The tokens that pooling reads of a text of so many tokens."""
        if self.pooling == "mean":
            return range(length)
        return range(1) if self.pooling == "first" else range(length - 1, length)

    def _packed_texts(self, texts: Sequence[Ids]) -> Tensor:
        """[u, d], of any length, as from `_padded_texts`."""
        stream = self._stream(texts)
        hidden = self._read_hidden(stream, stream.predictors)
        if self.pooling != "mean":
            return hidden
        sums = hidden.new_zeros(len(texts), hidden.shape[1]).index_add(0, stream.targets, hidden)
        return sums / torch.tensor([len(text) for text in texts], device=self._device)[:, None]

    def _padded_texts(self, texts: Sequence[Ids]) -> Tensor:
        ids, mask = self.pad(texts)
        with self._recomputing():
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        if self.pooling == "mean":
            return (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        read = torch.zeros_like(mask[:, 0]) if self.pooling == "first" else mask.sum(1) - 1
        return hidden[torch.arange(len(texts), device=self._device), read]
