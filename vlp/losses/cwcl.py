"""Continuously weighted contrastive loss (CWCL, arXiv 2309.14580), for one frozen tower.

    L = ½ [ −(1/n) Σ_i (1/Σ_j w_ij) Σ_j w_ij log softmax_j z_ij   (anchored at the frozen modality; x, t: [b, D])
            + plain cross-entropy ]                               (anchored at the other)

w_ij = (½ + ½ u_i·u_j)^sharpening with u the frozen tower's embeddings, detached. Unrelated pairs have w near ½:
a sharpening above 1 (an addition of this project) lowers it.
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
    frozen: Literal["image", "text"] = (
        "image"  # the frozen tower, whose similarities are the weights
    )
    sharpening: float = 1.0  # exponent of the weights; above 1 lowers those of unrelated pairs

    def __post_init__(self) -> None:
        if self.sharpening <= 0:
            raise ValueError(f"sharpening: found {self.sharpening}, expected a number > 0")


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    frozen, other = (
        (inputs.image, inputs.text) if options.frozen == "image" else (inputs.text, inputs.image)
    )
    rows, columns, positive = pairs.logsumexp(frozen, other, inputs.scale)

    def weighted(tile: Tile) -> tuple[Tensor, ...]:
        w = ((1 + tile.scores[1]) / 2).clamp(min=0) ** options.sharpening
        gaps = (tile.scores[0] - tile.row_values[0].unsqueeze(1)).masked_fill(tile.positive, 0)
        return w * gaps, w

    u, wide = frozen.detach(), inputs.wide()
    own = (wide.image * wide.text).sum(1)
    gaps, weights = pairs.reduce(
        Reduction(weighted, rows=(SUM, SUM)), [frozen, u], [other, u], row_values=[own]
    )
    # Centred on the pair, where −log softmax_i = softplus(margin): −log softmax_j =
    # softplus(margin) − (z_ij − z_ii).
    soft = softplus(rows - positive) - torch.as_tensor(inputs.scale) * gaps / weights
    return pairs.mean((soft + softplus(columns - positive)) / 2)
