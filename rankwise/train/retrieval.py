"""How well embeddings find the text that belongs to another, among all of the held-out rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from rankwise.data.examples import Ids
from rankwise.data.pairs import PairExample
from rankwise.engine.contrast import Contrast
from rankwise.engine.embedding import EmbeddingEngine
from rankwise.lora.inject import set_adapter_training

TEXTS_AT_ONCE = 64
ROWS_AT_ONCE = 1024
"""Of the similarity matrix."""


@dataclass(frozen=True)
class Retrieval:
    """Results of n held-out rows, in their order."""

    losses: NDArray[Any]
    """[n] nats, among the candidates of the row's held-out batch"""
    ranks: NDArray[Any]
    """[n] place of the positive among all positives of all rows by similarity to the anchor, from 1"""
    nearest: tuple[Ids, ...]
    """[n] the positive that is most similar to the anchor"""

    @property
    def found_first(self) -> NDArray[Any]:
        """[n] 1 where the positive is the most similar one; its mean is recall@1."""
        return (self.ranks == 1).astype(float)

    @property
    def reciprocal_ranks(self) -> NDArray[Any]:
        """[n] 1 / rank, 0 beyond rank 10; their mean is MRR@10."""
        return np.where(self.ranks <= 10, 1 / self.ranks, 0.0)


@torch.no_grad()
def retrieve(
    engine: EmbeddingEngine, examples: Sequence[PairExample], on_progress: Callable[[str], None] = lambda text: None
) -> Retrieval:
    """Embed every text once and compare: in the fixed held-out batches for the losses, all with all for the ranks.

    Texts as similar as the positive count as more similar, so that a model that embeds all texts alike finds nothing.
    """
    set_adapter_training(engine.model, False)
    whole = Contrast.of([replace(example, negatives=()) for example in examples])
    texts = tuple(dict.fromkeys([*whole.texts, *(text for example in examples for text in example.texts)]))
    embeddings = _embed(engine, texts, on_progress)
    number = {text: place for place, text in enumerate(texts)}
    losses = np.empty(len(examples))
    for places in engine.evaluation_batches(examples):
        batch = Contrast.of([examples[place] for place in places])
        logits = batch.logits(embeddings[[number[text] for text in batch.texts]])
        targets = torch.tensor(batch.targets, device=logits.device)
        losses[places] = F.cross_entropy(logits, targets, reduction="none").double().cpu()
    ranks, best = _ranks(whole, embeddings[[number[text] for text in whole.texts]])
    return Retrieval(losses, ranks, tuple(whole.texts[whole.candidates[place]] for place in best.tolist()))


def _embed(engine: EmbeddingEngine, texts: Sequence[Ids], on_progress: Callable[[str], None]) -> Tensor:
    """[u, d], in the order of `texts`; texts of like length go together."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    parts = []
    for start in range(0, len(order), TEXTS_AT_ONCE):
        on_progress(f"embeddings {start}/{len(order)}")
        parts.append(engine.embed([texts[index] for index in order[start : start + TEXTS_AT_ONCE]]))
    return torch.cat(parts)[np.argsort(order)]


def _ranks(contrast: Contrast, embeddings: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """([n] ranks of the targets, [n] places of the best candidates)."""
    ranks, best = [], []
    for start in range(0, len(contrast.anchors), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        logits = contrast.logits(embeddings, rows)
        own = logits.gather(1, torch.tensor(contrast.targets[rows], device=logits.device)[:, None])
        ranks.append((logits >= own).sum(1))
        best.append(logits.argmax(1))
    return torch.cat(ranks).cpu().numpy(), torch.cat(best).cpu().numpy()
