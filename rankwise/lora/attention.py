"""Adapters on nn.MultiheadAttention, whose projections of queries, keys and values are one joint matrix."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.lora.layers import LoraLayer
from rankwise.lora.linear import does_more_than_its_class, nested_like


class LoraAttention(LoraLayer):
    """The joint input projection [3·E, E]; the output projection is a linear layer of its own, adapted beside it.

    The base's forward reads its weights without calling a layer, so attention is computed here from the projections,
    with the meaning of torch.nn.functional.multi_head_attention_forward.
    Symbols: L query and S key positions, N sequences, E width, H heads.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """nn.TransformerEncoderLayer asks this before it reads the weights past this layer in inference."""
        return False

    @property
    def in_proj_weight(self) -> Any:
        """The joint weight; with what the adapters at work add to it, where the model computes with it."""
        return self.effective_weight() if self.is_read_as_one() else self.base.in_proj_weight

    @property
    def in_proj_bias(self) -> Any:
        """The joint bias, in the same way.

        Where rows or dropout give no one weight, the read of the weight says so: of the bias a model may only ask
        whether it is there, as nn.TransformerEncoderLayer does.
        """
        bias = self.base.in_proj_bias
        return self.effective_bias(bias) if self.weight_is_read and self.by_row is None else bias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.MultiheadAttention.forward."""
        if "forward" in self.base.__dict__ or not does_more_than_its_class(self.base):
            return self._attend(*args, **kwargs)
        # A call of the base calls its hooks; what it computes comes from here meanwhile.
        self.base.forward = self._attend
        try:
            return self.base(*args, **kwargs)
        finally:
            del self.base.forward

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query: [L, N, E] ([N, L, E] if batch_first, [L, E] for one sequence)"""
        if query.is_nested and query is key is value and attn_mask is None and not need_weights:
            return self._attend_nested(query)
        batched, base = query.dim() == 3, self.base
        inputs: Any = (query, key, value)
        if not batched:
            inputs = [x[None] for x in inputs]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not base.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        q, k, v = self._project(*inputs, same=query is key and key is value)
        k, v, extra = self._append(k, v)
        q, k, v = (x.unflatten(-1, (base.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, q, extra, is_causal and attn_mask is None)
        dropout = base.dropout if base.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            attended = weights @ v
        else:
            # As the base does: a query that may see no key gets zeros here, and NaN above.
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = base.out_proj(attended.transpose(1, 2).flatten(-2))
        if not batched:
            output = output[0]
        elif not base.batch_first:
            output = output.transpose(0, 1)
        if weights is None:
            return output, None
        weights = weights.mean(1) if average_attn_weights else weights
        return output, weights if batched else weights[0]

    def _attend_nested(self, x: Tensor) -> tuple[Tensor, None]:
        """Sequences of different lengths, which nn.TransformerEncoder makes of padded ones in inference."""
        padded = x.to_padded_tensor(0.0)
        lengths = torch.tensor([len(sequence) for sequence in x.unbind()])
        padding = (torch.arange(padded.shape[1]) >= lengths[:, None]).to(x.device)
        output, _ = self._attend(padded, padded, padded, padding, need_weights=False)
        return nested_like(x, output), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor, same: bool) -> tuple[Tensor, ...]:
        """[N, L or S, E] each; one product for all three where they are the same."""
        if same:
            return self._joint(query).chunk(3, dim=-1)
        return tuple(self._joint(x).chunk(3, dim=-1)[index] for index, x in enumerate((query, key, value)))

    def _joint(self, x: Tensor) -> Tensor:
        """x: [..., E] → [..., 3·E]"""
        return self.with_changes(x, F.linear(x, self.base.in_proj_weight, self.base.in_proj_bias))

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """The learnt and the zero positions that the base appends to keys and values, and their number."""
        base, extra = self.base, 0
        if base.bias_k is not None:
            k = torch.cat([k, base.bias_k.expand(len(k), 1, -1)], dim=1)
            v = torch.cat([v, base.bias_v.expand(len(v), 1, -1)], dim=1)
            extra += 1
        if base.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(len(x), 1, x.shape[2])], dim=1) for x in (k, v))
            extra += 1
        return k, v, extra

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, extra: int, causal: bool
    ) -> Tensor | None:
        """What to add to the scores [N, H, L, S + extra]."""
        if causal:
            raise ValueError("is_causal is a hint about attn_mask, which must be given too")
        total = None
        if attn_mask is not None:
            attn_mask = _additive(attn_mask, q.dtype)
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (q.shape[0], q.shape[1]))
            total = attn_mask
        if padding is not None:
            padding = _additive(padding, q.dtype)[:, None, None, :]
            total = padding if total is None else total + padding
        return total if total is None or not extra else F.pad(total, (0, extra))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
