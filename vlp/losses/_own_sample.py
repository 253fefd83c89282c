"""The loss of a sample against its own hard captions, from scores (FSC-CLIP, arXiv 2410.05210).

Σ_k y_k (1−p_k)^γ (−log p_k),  p = softmax of z,  y = (1−ε)δ + ε/(1 + #valid) on the text, which
comes first, and on every valid caption
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlp.losses._softmax import margin
from vlp.pairwise import softplus


def focal_loss(
    z: Tensor,  # [b, 1 + K], −∞ where a caption is not valid
    valid: Tensor,  # [b, K] bool
    γ: float,
    ε: float,
) -> Tensor:
    """The loss of each sample, [b]; γ = ε = 0 is the cross-entropy to the text."""
    losses = _focal(margin(z, 0), γ)
    if not ε:
        return losses

    # The smoothed target gives a share to the text and to every valid caption.
    share = ε / (1 + valid.sum(1)).to(z.dtype)
    losses = (1 - ε + share) * losses
    for k in range(valid.shape[1]):
        takes_part = valid[:, k]
        # The margin of what takes no part would be infinite, and its gradient NaN.
        finite = z.masked_fill(~takes_part.unsqueeze(1), 0)
        caption_losses = _focal(margin(finite, k + 1), γ)
        losses = losses + share * torch.where(takes_part, caption_losses, 0)
    return losses


def _focal(q: Tensor, γ: float) -> Tensor:
    """(1 − p)^γ (−log p) of a probability p = σ(−q), by the logarithm of 1 − p = σ(q)."""
    # 1 − p itself would round to 0 where p is near 1.
    loss = softplus(q)
    return loss * (-γ * softplus(-q)).exp() if γ else loss
