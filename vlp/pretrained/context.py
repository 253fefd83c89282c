"""A longer context for a trained text tower: its first positions stay, the others are stretched
(Long-CLIP, arXiv 2403.15378).

With r = (length − keep) / (old − keep), new position keep + r·i + k stands at keep + i + k/r of the
old ones:

    p'_j = p_j                                             j < keep
    p'_{keep + r·i + k} = (1 − k/r)·p_{keep+i} + (k/r)·p_{keep+i+1}
    the last r positions continue the line through p_{old−2} and p_{old−1}

Interpolating all positions, as open_clip does, would move the first ones too, in which nearly all
captions of the pretraining lie. The same length gives the same positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

POSITIONS = "text.positional_embedding"  # [L, D], by the name in open_clip's CustomTextCLIP


def stretched(positions: Tensor, length: int, keep: int) -> Tensor:
    """The positions [old, D] as `length` ones, the first `keep` unchanged; ValueError where there
    is nothing to stretch.
    """
    old = len(positions)
    if length == old:
        return positions
    if length < old or keep > old - 2:
        raise ValueError(
            f"context has length {length} and keep {keep}, and the weights have {old} positions; "
            f"expected a length of at least {old}, and keep at most {old - 2}"
        )

    # Where the new positions stand among the old ones, in float64: thirds must not round to a
    # neighbour.
    ratio = (length - keep) / (old - keep)
    places = keep + torch.arange(length - keep, dtype=torch.float64) / ratio
    left = places.floor().long().clamp(max=old - 2)  # beyond the last one the last line goes on
    share = (places - left).unsqueeze(1).to(positions.dtype)

    longer = positions[left] + share * (positions[left + 1] - positions[left])
    return torch.cat([positions[:keep], longer])
