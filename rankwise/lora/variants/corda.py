"""CorDA: start from the part of W0 that matters most for the inputs of the task
(Yang et al. 2024, arXiv 2406.05223)."""

import torch
from torch import Tensor


def corda(weight: Tensor, gram: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Factors with scale·B·A = the part of weight [d, k] along the r main singular vectors of W0·C, C = Σ x·xᵀ [k, k].

    This is the paper's instruction-previewed mode: what the task's inputs use most is trained.
    """
    weight, gram = weight.to(gram.dtype), gram / gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    # C is made invertible with the least that its rounding needs.
    gram = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * 1e-6
    U, S, Vh = torch.linalg.svd(weight @ gram, full_matrices=False)
    # W0 = (U·S·Vᵀ)·C⁻¹, so the right factor is Vᵀ·C⁻¹.
    right = torch.linalg.solve(gram, Vh[:r], left=False)
    root = (S[:r] / scale).sqrt()
    return root[:, None] * right, U[:, :r] * root
