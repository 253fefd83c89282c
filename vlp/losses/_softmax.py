"""−log p of a softmax over few entries without the difference of two large numbers.

The plain form log Σ_j e^{z_j} − z_t rounds to 0 where p is near 1, and its gradient p − 1 to the
rounding of p: in float32 100 % wrong at a loss of 1e-7. With the entry itself left out of the sum
nothing cancels (see `vlp.pairwise.reduction`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlp.pairwise import logsumexp, softplus


def margin(
    scores: Tensor,  # [..., n], −∞ where an entry takes no part
    target: Tensor | int,  # t of every row, [...] int64 or one number, where the score is finite
) -> Tensor:
    """The margin q = log Σ_{j≠t} e^{z_j} − z_t, [...]: −log p_t = softplus(q) and 1 − p_t = σ(q).

    −∞ with zero gradient where no other entry takes part.
    """
    # Filled on the device: sending it a number would make the host wait.
    if isinstance(target, int):
        place = torch.full_like(scores[..., :1], target, dtype=torch.int64)
    else:
        place = target.unsqueeze(-1)

    # The entry itself leaves the sum, where it would cancel.
    others = scores.scatter(-1, place, -torch.inf)
    return logsumexp(others, -1) - scores.gather(-1, place).squeeze(-1)


def negative_log_probability(scores: Tensor, target: Tensor | int) -> Tensor:
    """−log softmax(z)_t, [...]: the cross-entropy to one entry, arguments as of `margin`."""
    return softplus(margin(scores, target))


def cross_entropy(
    scores: Tensor,  # [..., n]
    target: Tensor,  # [..., n] y >= 0 whose sum is 1, without gradient
) -> Tensor:
    """Cross-entropy −Σ_j y_j log softmax(z)_j along the last dimension, [...].

    Centred on the entry t that the target prefers: softplus(q_t) − Σ_{j≠t} y_j (z_j − z_t).
    """
    preferred = target.argmax(-1, keepdim=True)
    gaps = scores - scores.gather(-1, preferred)

    # Not just a product: a score of −∞ times a weight of 0 would be NaN.
    others = target.scatter(-1, preferred, 0)
    linear = torch.where(others > 0, others * gaps, 0).sum(-1)
    return negative_log_probability(scores, preferred.squeeze(-1)) - linear
