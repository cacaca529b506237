"""Orthogonal start: neither factor is zero, their product is (as in PEFT: after datta0's "LoRA slow convergence")."""

from typing import Any

import torch
from torch import Tensor

from rankwise.errors import ConfigError


def orthogonal(d: int, k: int, r: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """A [r, k] and B [d, r] whose rows and columns lie in two halves of an orthonormal basis of ℝʳ, so B·A = 0.

    Raises ConfigError if r is odd; `r` is that of one group in a convolution.
    """
    if r % 2:
        raise ConfigError(
            'init_lora_weights "orthogonal" halves the rank: r must be even, and for a convolution with groups '
            f"r / groups, found {r}"
        )
    kind: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    basis, _ = torch.linalg.qr(torch.randn(r, r, **kind))
    A = (torch.randn(k, r // 2, **kind) @ basis[0::2] / 10).T
    B = torch.randn(r // 2, d, **kind).T @ basis[1::2] / 10
    return A, B
