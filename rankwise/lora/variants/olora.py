"""OLoRA: start from the first columns of W0 = Q·R (Büyükakyüz 2024, arXiv 2406.01775)."""

import torch
from torch import Tensor


def olora(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A = the first r rows of R and B = the first r columns of Q, for weight [d, k]; `scale` plays no part."""
    Q, R = torch.linalg.qr(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    return R[:r], Q[:, :r]
