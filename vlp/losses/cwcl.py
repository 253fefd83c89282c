"""Continuously weighted contrastive loss, for one frozen tower: similar samples are half positives.

    L = ½ [ −(1/n) Σ_i (1/Σ_j w_ij) Σ_j w_ij log softmax_j z_ij   (anchored at the frozen modality)
            + plain cross-entropy ]                               (anchored at the other)
    w_ij = (½ + ½ u_i·u_j)^sharpening

x, t: [b, D] images and texts, u the frozen tower's embeddings of either, detached, z_ij =
scale·x_i·t_j. Unrelated pairs have w near ½: a sharpening above 1 (an addition of this project)
lowers it.

Relations:
- approaches `infonce` as the sharpening grows: only the pair itself keeps its weight

Papers:
- CWCL (arXiv 2309.14580), with a locked image tower: `objective: {cwcl: {frozen: image}}`; which
  direction is weighted could not be confirmed

Needs: image, text, scale

Cost: two passes over the pairs, three score matrices; O(b·D) memory

Use: to align a new tower with a strong frozen one (LiT), whose similarities are worth keeping
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import SUM, Pairs, Reduction, Tile, softplus

NEEDS = frozenset({"image", "text", "scale"})


@dataclass(frozen=True)
class Options:
    # the frozen tower, whose similarities are the weights
    frozen: Literal["image", "text"] = "image"
    sharpening: float = 1.0  # exponent of the weights; above 1 lowers those of unrelated pairs

    def __post_init__(self) -> None:
        if self.sharpening <= 0:
            raise ValueError(f"sharpening: found {self.sharpening}, expected a number > 0")


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    frozen, other = inputs.image, inputs.text
    if options.frozen == "text":
        frozen, other = other, frozen
    rows, columns, positive = pairs.logsumexp(frozen, other, inputs.scale)

    # Σ_j w_ij (s_ij − s_ii) and Σ_j w_ij of each row. Rounding may take a cosine below −1, where
    # the power of a negative number would be NaN.
    def weighted(tile: Tile) -> tuple[Tensor, ...]:
        w = ((1 + tile.scores[1]) / 2).clamp(min=0) ** options.sharpening
        gaps = (tile.scores[0] - tile.row_values[0].unsqueeze(1)).masked_fill(tile.positive, 0)
        return w * gaps, w

    u, wide = frozen.detach(), inputs.wide()
    cosine = (wide.image * wide.text).sum(1)
    gaps, weights = pairs.reduce(
        Reduction(weighted, rows=(SUM, SUM)), [frozen, u], [other, u], row_values=[cosine]
    )

    # Centred on the pair, where −log softmax_i = softplus(margin):
    # −log softmax_j = softplus(margin) − (z_ij − z_ii).
    soft = softplus(rows - positive) - torch.as_tensor(inputs.scale) * gaps / weights
    return pairs.mean((soft + softplus(columns - positive)) / 2)
