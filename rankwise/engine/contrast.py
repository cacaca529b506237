"""The contrastive loss of pairs: of all texts that a batch offers, each anchor is to find its own positive.

For anchor a with positive p and the other candidates c of the batch (positives of other rows, negatives of all rows)
    loss = -log(exp(s·cos(a, p)) / (exp(s·cos(a, p)) + Σ_c exp(s·cos(a, c))))          s = 20
(Henderson et al. 2017, arXiv 1705.00652; sentence-transformers' MultipleNegativesRankingLoss has this scale). What the
batch itself says is no negative is not among an anchor's candidates: its own text, and other positives of the same
anchor. A text that stands in several rows is one candidate, so it is nobody's negative where it is the positive.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.data.examples import Ids
from rankwise.data.pairs import PairExample

SCALE = 20.0


@dataclass(frozen=True)
class Contrast:
    """Which text of a batch is to be found by which. n rows, u different texts, c candidates."""

    texts: tuple[Ids, ...]
    """[u]"""
    anchors: tuple[int, ...]
    """[n], places in `texts`"""
    candidates: tuple[int, ...]
    """[c], places in `texts`"""
    targets: tuple[int, ...]
    """[n], each anchor's positive, as a place in `candidates`"""
    left_out: tuple[tuple[int, ...], ...]
    """[n], the places in `candidates` that are no negatives of an anchor"""

    @classmethod
    def of(cls, examples: Sequence[PairExample]) -> "Contrast":
        """Of the rows of one batch."""
        offered = [text for example in examples for text in (example.positive, *example.negatives)]
        place = {text: number for number, text in enumerate(dict.fromkeys(offered))}
        number = {text: number for number, text in enumerate(dict.fromkeys([*place, *(e.anchor for e in examples)]))}
        known: dict[Ids, set[int]] = {}
        for example in examples:
            own = {place[text] for text in (example.positive, example.anchor) if text in place}
            known.setdefault(example.anchor, set()).update(own)
        targets = [place[example.positive] for example in examples]
        return cls(
            tuple(number),
            tuple(number[example.anchor] for example in examples),
            tuple(number[text] for text in place),
            tuple(targets),
            tuple(
                tuple(sorted(known[example.anchor] - {target}))
                for example, target in zip(examples, targets, strict=True)
            ),
        )

    def logits(self, embeddings: Tensor, rows: slice = slice(None)) -> Tensor:
        """[n, c] scaled cosines from the texts' embeddings [u, d] of length 1; of some `rows` only, if given.

        What is left out gets the lowest number that there is, so that it has no share in the loss.
        """
        logits = SCALE * embeddings[list(self.anchors[rows])] @ embeddings[list(self.candidates)].T
        places = [(row, column) for row, columns in enumerate(self.left_out[rows]) for column in columns]
        if places:
            index = torch.tensor(places, device=logits.device).T
            left_out = torch.zeros_like(logits, dtype=torch.bool).index_put((index[0], index[1]), torch.tensor(True))
            logits = logits.masked_fill(left_out, torch.finfo(logits.dtype).min)
        return logits
