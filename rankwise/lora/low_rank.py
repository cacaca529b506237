"""The value that merging, spectra, shrinking, export and serving share: one low-rank update."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The update ΔW = scale·B·A of one matrix W0 (d × k)."""

    A: Tensor
    """[r, k]"""
    B: Tensor
    """[d, r]"""
    scale: float
    """lora_alpha / r"""

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k)"""
        return self.B.shape[0], self.A.shape[1]

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """ΔW as a dense [d, k] matrix, computed in `dtype`."""
        return (self.B.to(dtype) @ self.A.to(dtype)).mul_(self.scale)
