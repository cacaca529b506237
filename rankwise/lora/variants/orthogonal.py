"""Orthogonal start: neither factor is zero, their product is (as in PEFT: after datta0's "LoRA slow convergence")."""

import torch
from torch import Tensor

from rankwise.errors import ConfigError


def orthogonal(d: int, k: int, r: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """A [r, k] and B [d, r] whose rows and columns lie in two halves of an orthonormal basis of ℝʳ, so B·A = 0.

    Raises ConfigError if r is odd.
    """
    if r % 2:
        raise ConfigError(f'init_lora_weights "orthogonal" halves the rank: r must be even, found {r}')
    basis, _ = torch.linalg.qr(torch.randn(r, r, generator=generator))
    A = (torch.randn(k, r // 2, generator=generator) @ basis[0::2] / 10).T
    B = torch.randn(r // 2, d, generator=generator).T @ basis[1::2] / 10
    return A, B
