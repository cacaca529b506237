"""LoRA-GA: start so that the first step of the adapter is near that of full fine-tuning
(Wang et al. 2024, arXiv 2407.05000)."""

import torch
from torch import Tensor

GAMMA = 16.0
"""The paper's gamma: how strong the start is."""


def lora_ga(gradient: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A = c·Vᵀ of the first r and B = c·U of the next r singular vectors of ∂L/∂W0 [d, k], c = d^¼ / √gamma.

    Vectors past min(d, k) do not exist; B then takes the last r that do.
    """
    U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
    first = min(r, U.shape[1] - r)
    scale = gradient.shape[0] ** 0.25 / GAMMA**0.5
    return Vh[:r] * scale, U[:, first : first + r] * scale
