"""PiSSA: start from the largest singular values of W0 and their vectors (Meng et al. 2024, arXiv 2404.02948)."""

import torch
from torch import Tensor


def pissa(weight: Tensor, r: int, scale: float, iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """A = √S·Vᵀ and B = U·√S of the r largest singular values of weight [d, k], so that scale·B·A is W0 at rank r.

    `iterations`: that many rounds of randomised subspace iteration instead of a full decomposition, drawn from torch's
    global generator.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if iterations is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(weight, r, niter=iterations)
        Vh = V.T
    root = (S[:r] / scale).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root
