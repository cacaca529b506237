"""LoftQ: start so that a quantised base and the adapter together are near the original weights
(Li et al. 2023, arXiv 2310.08659)."""

from torch import Tensor

from rankwise.lora.variants.pissa import pissa


def loftq(residual: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Factors with scale·B·A = the best approximation of residual [d, k] = W - W_quantised by a matrix of rank r.

    This is the first of the paper's alternating rounds, the one that leaves the quantised weight as it is.
    """
    return pissa(residual, r, scale)
