"""Ways to start an adapter other than LoRA's own, one file each, with its paper."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rankwise.lora.variants.olora import olora
from rankwise.lora.variants.orthogonal import orthogonal
from rankwise.lora.variants.pissa import pissa

Factors = tuple[Tensor, Tensor]
"""A [r, k] and B [d, r]"""
FromWeight = Callable[[Tensor, int, float], Factors]
"""(W0 [d, k], r, scale) → factors that hold a part of W0"""


def from_weight(how: bool | str) -> FromWeight | None:
    """The initialiser that takes a part of the base weight into the factors, or None if `how` names none."""
    if how == "olora":
        return olora
    if isinstance(how, str) and how.startswith("pissa"):
        iterations = how.removeprefix("pissa").removeprefix("_niter_")
        return partial(pissa, iterations=int(iterations) if iterations else None)
    return None


def from_shape(how: bool | str) -> Callable[[int, int, int, torch.Generator | None], Factors] | None:
    """The initialiser that draws factors whose product is zero, from (d, k, r, generator), or None."""
    return orthogonal if how == "orthogonal" else None
