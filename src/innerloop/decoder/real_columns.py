"""Attention that counts real columns, in families whose own code counts padding too: GPT-Neo's windows, MPT's ALiBi.

What a query sees is known from its mask, so how far back a key lies is the number of seen columns from it on. Without
padding the numbers are the family's own.

Shapes: `B` rows, `H` heads, `Q` queries, `K` keys, `D` width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor


def mend(lm: PreTrainedModel) -> None:
    """Let a model's attention count real columns alone, where it is of a family that counts all."""
    for module in lm.modules():
        if type(module) is MptAttention:
            module.__class__ = AlibiAttention
        elif type(module) is GPTNeoSelfAttention and module.attention_type == "local":
            module.__class__ = LocalAttention
            module.window = lm.config.window_size
            module.bias.copy_(torch.ones_like(module.bias).tril())


def n_from(seen_BQK: Tensor) -> Tensor:
    """Return how many of the keys that a query sees lie at or behind each key (..., Q, K)."""
    return seen_BQK.flip(-1).cumsum(-1).flip(-1)


class LocalAttention(GPTNeoSelfAttention):
    """GPT-Neo's local attention, whose window is so many real columns long."""

    counts_columns = True
    window: int

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Return what attention adds to the states (B, Q, D), and its weights; the mask (B, 1, Q, K) is additive."""
        is_past = n_from(attention_mask == 0) > self.window
        mask = attention_mask.masked_fill(is_past, torch.finfo(attention_mask.dtype).min)
        return super().forward(hidden_states, attention_mask=mask, **options)


class AlibiAttention(MptAttention):
    """MPT's attention, biased by the number of real columns between a query and a key."""

    counts_columns = True

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, past_key_values: Any = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Return what attention adds to the states (B, Q, D), and its weights; the mask (B, 1, Q, K) hides."""
        fused = self.Wqkv(hidden_states)
        if self.clip_qkv:
            fused = fused.clamp(-self.clip_qkv, self.clip_qkv)
        queries, keys, values = (
            part.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2) for part in fused.chunk(3, dim=-1)
        )
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        slopes_H11 = build_mpt_alibi_tensor(self.n_heads, 2, device=keys.device)[:, :, :1].abs()
        scores = queries @ keys.transpose(-1, -2) * self.softmax_scale - slopes_H11 * n_from(~attention_mask)
        scores = scores.masked_fill(attention_mask, torch.finfo(scores.dtype).min)
        weights = scores.float().softmax(-1).to(values.dtype)
        dropped = nn.functional.dropout(weights, p=self.attn_dropout_p, training=self.training)
        return self.out_proj((dropped @ values).transpose(1, 2).flatten(2)), weights
