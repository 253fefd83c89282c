"""Self-attention whose projections are linear layers, in the place of torch's, which reads its
weights without calling a layer: an adapter around them would have no effect.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from open_clip.transformer import AttentionalPooler
from torch import Tensor, nn


class LinearAttention(nn.Module):
    """What `nn.MultiheadAttention` computes of one sequence, by the weights of `attention`.

    `in_proj` makes query, key and value of [b, L, width], `out_proj` the output. Called as torch's
    module is; returns (output, None).
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        width = attention.embed_dim
        self.num_heads, self.dropout = attention.num_heads, attention.dropout
        self.in_proj = nn.Linear(width, 3 * width, device="meta")
        self.in_proj.weight = attention.in_proj_weight
        self.in_proj.bias = attention.in_proj_bias

        # Of torch's own kind of linear layer an adapter would be told apart.
        self.out_proj = nn.Linear(width, width, device="meta")
        self.out_proj.weight, self.out_proj.bias = (
            attention.out_proj.weight,
            attention.out_proj.bias,
        )

    def forward(
        self,
        query: Tensor,  # [b, L, width]; key and value are the same
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,  # added to the scores: [L, L] or [b · heads, L, L]
        **_: Any,
    ) -> tuple[Tensor, None]:
        dropout = self.dropout if self.training else 0.0
        mixed = attended(self.in_proj(query), self.num_heads, attn_mask, dropout)
        return self.out_proj(mixed), None


def attended(
    joint: Tensor,  # [b, L, 3 · width]: query, key and value
    n_heads: int,
    mask: Tensor | None,  # added to the scores: [L, L] or [b · heads, L, L]
    dropout: float,
) -> Tensor:  # [b, L, width]
    """What every place takes from all places, before the output's projection."""
    n_rows, length, _ = joint.shape
    q, k, v = joint.view(n_rows, length, 3, n_heads, -1).permute(2, 0, 3, 1, 4)

    if mask is not None:
        mask = mask.to(q.dtype)
        if mask.ndim == 3:
            mask = mask.view(n_rows, n_heads, length, length)
    mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout)
    return mixed.transpose(1, 2).reshape(n_rows, length, -1)


def self_attentions(tower: nn.Module) -> list[Any]:
    """The blocks of the tower whose `attn` is a self-attention of torch's. Pools, which attend to
    something else, are none.
    """
    blocks = []
    for block in tower.modules():
        attention = getattr(block, "attn", None)
        attends_to_others = isinstance(block, AttentionalPooler) or hasattr(block, "ln_1_kv")
        if not isinstance(attention, nn.MultiheadAttention) or attends_to_others:
            continue
        if attention.in_proj_weight is not None and attention.batch_first:
            blocks.append(block)
    return blocks


def use_linear_layers(tower: nn.Module) -> None:
    """Put `LinearAttention` in the place of every self-attention of torch's in the tower's
    blocks.
    """
    for block in self_attentions(tower):
        block.attn = LinearAttention(block.attn)
