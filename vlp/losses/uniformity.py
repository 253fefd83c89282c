"""Uniformity: how evenly images, and texts, spread over the sphere.

    L = ½ log mean_{i<j} e^{−2‖x_i − x_j‖²} + ½ log mean_{i<j} e^{−2‖t_i − t_j‖²}

x, t: [b, D] images and texts. Unit rows are assumed: −2‖x_i − x_j‖² = 4x_i·x_j − 4, whose gradient
differs from the written one only along x_i, where normalisation removes it. A logarithm of a mean
is no mean over rows: every rank of a group returns the group's value.

Relations:
- `cross_uniformity` compares images with texts instead

Papers:
- CUA (arXiv 2405.18570):
  `objective: {infonce: {}, uniformity: {}, alignment: {}}`
- alignment and uniformity on the sphere (Wang and Isola, arXiv 2005.10242):
  `objective: {alignment: {}, uniformity: {}}`

Needs: image, text

Cost: two passes over pairs, images with images and texts with texts; O(b·D) memory

Use: with `alignment`, to close the gap between images and texts. In the paper's fine-tuning on COCO
CUA brings the distance of the centroids from .661 to .082, and retrieval does not improve
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs

NEEDS = frozenset({"image", "text"})
MIN_CANDIDATES = 2


@dataclass(frozen=True)
class Options:
    pass


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """L of the group, whole."""
    images = log_mean_kernel(pairs, inputs.image, inputs.image)
    texts = log_mean_kernel(pairs, inputs.text, inputs.text)
    return (images + texts) / 2


def log_mean_kernel(
    pairs: Pairs,
    left: Tensor,  # [b, D] unit rows
    right: Tensor,  # [b, D] unit rows
) -> Tensor:
    """log mean_{i≠j} e^{−2‖l_i − r_j‖²} over the group.

    For l = r the mean over i < j is the same.
    """
    # −2‖l − r‖² = 4·l·r − 4 on the sphere: the scale is 4, and the constant leaves the sum.
    n = pairs.candidates(len(left))
    rows = pairs.row_logsumexp(left, right, 4.0, paired=True)
    return pairs.log_sum(rows) - math.log(n * (n - 1)) - 4
