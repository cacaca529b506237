"""EVA: start A from the directions in which a layer's inputs vary most, and give rank to the layers where that is most
(Paischer et al. 2024, arXiv 2410.07170)."""

import torch
from torch import Tensor


def eva(gram: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(A, share) for inputs with Σ x·xᵀ = gram [k, k]: r main directions [r, k] and the variance share of each [r].

    B starts at zero, so the base is not touched.
    """
    values, vectors = torch.linalg.eigh(gram)
    top = values.flip(0)[:r].clamp_min(0)
    return vectors.flip(1)[:, :r].T.contiguous(), top / values.sum().clamp_min(torch.finfo(gram.dtype).tiny)


def spread_ranks(shares: dict[str, Tensor], budget: int) -> dict[str, int]:
    """Give `budget` ranks to the directions, over all layers, that hold the largest shares; every layer keeps one."""
    ranked = sorted(
        ((share.item(), name) for name, own in shares.items() for share in own[1:]), key=lambda pair: -pair[0]
    )
    ranks = dict.fromkeys(shares, 1)
    for _, name in ranked[: max(0, budget - len(shares))]:
        ranks[name] += 1
    return ranks
