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

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp import log

# By the names in open_clip's CustomTextCLIP.
POSITIONS = "text.positional_embedding"  # [L, D]; with a class token [L + 1, D]
CLASS_TOKEN = "text.cls_emb"  # [D] (CoCa)


def fitted(
    weights: dict[str, Tensor], model: Mapping[str, Tensor], keep: int | None, name: str
) -> dict[str, Tensor]:
    """The weights with as many positions of the text tower as `model` has.

    Behind the first `keep` they are stretched, where that is given. Otherwise a longer context is
    interpolated as a whole, as open_clip does, and a shorter one takes the first positions, so that
    texts that fit in it keep their embeddings. `name`: of the weights, for what is said.
    """
    if POSITIONS not in weights or POSITIONS not in model:
        return weights
    positions, length = weights[POSITIONS], len(model[POSITIONS])

    # A class token stands behind the longest text, and is no place of it.
    n_behind = 1 if CLASS_TOKEN in weights and CLASS_TOKEN in model else 0
    of_text = positions[: len(positions) - n_behind]
    fitted_positions = _fitted(of_text, length - n_behind, keep, name)
    if fitted_positions is of_text:
        return weights
    behind = positions[len(of_text) :]
    return weights | {POSITIONS: torch.cat([fitted_positions, behind])}


def _fitted(positions: Tensor, length: int, keep: int | None, name: str) -> Tensor:
    """The positions [old, D] of a text as `length` ones; the same where nothing changes."""
    old = len(positions)
    if keep is not None:
        return stretched(positions, length, keep)
    if old == length:
        return positions

    if length < old:
        log.say(f"{name}: the first {length} of {old} positions of the text tower are taken")
        return positions[:length]
    log.warn(
        f"{name}: {old} positions of the text tower are interpolated to {length}, which moves "
        "those of all captions; context: {length, keep} leaves the first ones in their places"
    )
    longer = F.interpolate(
        positions.T.unsqueeze(0), size=length, mode="linear", align_corners=False
    )
    return longer[0].T


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
