"""KoLeo: every row keeps its distance from the nearest other row of its modality.

    L = −½ Σ_modalities mean_i log(min_{j≠i} ‖x_i − x_j‖ + ε)

x, t: [b, D] images and texts. By Kozachenko and Leonenko the mean logarithm of that distance
estimates, up to constants, the entropy of the rows. The choice of the neighbour has no gradient,
and rows that are equal have none either: their distance is 0.

Relations:
- `uniformity` weighs all other rows, this one the nearest alone

Papers:
- Spreading vectors for similarity search (arXiv 1806.03198), within one modality; DINOv2 (arXiv
  2304.07193) gives it weight .1: `objective: {infonce: {}, koleo: {weight: 0.1}}`

Needs: image, text

Cost: a search for the nearest row in each modality, 2·b·n·D FLOPs each, over tiles; O(n·D) memory

Use: beside a contrastive term, where rows gather in few directions; cheaper than `uniformity`, and
few rows that are far from the others do not count
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs, widened

NEEDS = frozenset({"image", "text"})
MIN_CANDIDATES = 2


@dataclass(frozen=True)
class Options:
    epsilon: float = 1e-8  # ε, added to the distance

    def __post_init__(self) -> None:
        if self.epsilon <= 0:
            raise ValueError(f"epsilon: found {self.epsilon}, expected a number > 0")


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    distances = torch.stack([_nearest(rows, pairs) for rows in (inputs.image, inputs.text)])
    return -pairs.mean((distances + options.epsilon).log())


def _nearest(rows: Tensor, pairs: Pairs) -> Tensor:
    """min_{j≠i} ‖x_i − x_j‖, [b]."""
    _, neighbours, _ = pairs.top_k(rows, rows, 1)

    # From the difference itself: √(2 − 2s) has no digits left where two rows are close.
    return torch.linalg.vector_norm(widened(rows) - neighbours.squeeze(1), dim=1)
