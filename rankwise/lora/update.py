"""One adapter's share of one layer: the factors A and B and what goes with them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.lora.config import LoraConfig
from rankwise.lora.low_rank import LowRank


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over processes."""
    # Told by its method: to import its class takes as long as half of torch.
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


class Update(nn.Module):
    """The trained numbers that one adapter adds to one d × k matrix: ΔW = scale·(B·A - start_B·start_A).

    The start is there only after an initialiser that takes A and B from the base weight: what they hold at first is
    subtracted for good, so that the base weight keeps its bits and the model begins as the base.
    """

    lora_A: nn.Parameter
    """[r, k], for a convolution [r, in_channels / groups, *kernel]"""
    lora_B: nn.Parameter
    """[d, r], for a convolution [d, r / groups, 1, …]"""
    lora_bias: nn.Parameter | None
    """[d]"""
    magnitude: nn.Parameter | None
    """[d], DoRA's length of each row of W"""
    has_start = False
    start_A: Tensor
    start_B: Tensor
    dropout_generator: torch.Generator | None = None
    """Draws the dropout masks; None: torch's global generator."""
    directions: Tensor | None = None
    """[≤ r] How much each of the first directions counts; the others do not work. None: all count once."""

    def __init__(
        self, config: LoraConfig, name: str, shape_A: tuple[int, ...], shape_B: tuple[int, ...], **kind: Any
    ) -> None:
        super().__init__()
        trains = not config.inference_mode
        self.scale = config.scale_of(name)
        self.dropout = float(config.lora_dropout)
        self.lora_A = nn.Parameter(torch.empty(shape_A, **kind), requires_grad=trains)
        self.lora_B = nn.Parameter(torch.empty(shape_B, **kind), requires_grad=trains)
        self.lora_bias = self.magnitude = None
        if config.lora_bias:
            self.lora_bias = nn.Parameter(torch.zeros(shape_B[0], **kind), requires_grad=trains)
        if config.use_dora:
            self.magnitude = nn.Parameter(torch.ones(shape_B[0], **kind), requires_grad=trains)
        self.is_plain = not (config.lora_bias or config.use_dora)
        """Whether the change is scale·B·A·x and nothing more."""

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    @torch.no_grad()
    def set(self, A: Tensor, B: Tensor) -> None:
        """Take these values, and subtract no start."""
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        self.drop_start()

    def drop_start(self) -> None:
        """Subtract nothing any more."""
        if self.has_start:
            del self.start_A, self.start_B, self.has_start

    def begin_at(self, A: Tensor, B: Tensor) -> None:
        """Start from these factors, and subtract them for good."""
        self.set(A, B)
        self.register_buffer("start_A", self.lora_A.detach().clone())
        self.register_buffer("start_B", self.lora_B.detach().clone())
        self.has_start = True

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """(A, B) of the whole ΔW / scale, with the start stacked below A and, negative, beside B."""
        # nn.Module's search for an attribute costs as much as a quarter of a token's product.
        parameters: Any = self._parameters
        A, B = parameters["lora_A"], parameters["lora_B"]
        if self.directions is not None:
            first = len(self.directions)
            A, B = A[:first], B[:, :first] * self.directions
        if self.has_start:
            A, B = self._with_start(A, B)
        return (A, B) if dtype is None or A.dtype == dtype else (A.to(dtype), B.to(dtype))

    def whole_factors(self) -> tuple[Tensor, Tensor]:
        """`factors`, gathered where they are spread over processes; all of them must call this."""
        A, B = whole(self.lora_A), whole(self.lora_B)
        return self._with_start(A, B) if self.has_start else (A, B)

    def _with_start(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([A, self.start_A]), torch.cat([B, -self.start_B], dim=1)

    def drop(self, x: Tensor) -> Tensor:
        """x with the dropout of training."""
        if not (self.dropout and self.training):
            return x
        if self.dropout_generator is None:
            return F.dropout(x, self.dropout)
        kept = 1 - self.dropout
        return x * torch.empty_like(x).bernoulli_(kept, generator=self.dropout_generator).div_(kept)

    def low_rank(self) -> LowRank:
        """The update as a d × k matrix; a convolution's kernel is flattened into k."""
        A, B = self.factors()
        return LowRank(A.flatten(1), B.flatten(1), self.scale)
