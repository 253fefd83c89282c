"""Uniformity across modalities: how evenly images and foreign texts spread over one sphere.

    L = log mean_{i≠j} e^{−2‖x_i − t_j‖²}

x, t: [b, D] unit rows. As in `uniformity`, every rank of a group returns the group's value.

Relations:
- `uniformity` compares images with images and texts with texts

Papers:
- CUAXU (arXiv 2405.18570):
  `objective: {infonce: {}, uniformity: {}, alignment: {}, cross_uniformity: {}}`

Needs: image, text

Cost: one pass over the pairs; O(b·D) memory

Use: beside `uniformity` and `alignment`. In the paper's fine-tuning on COCO this keeps more of the
retrieval than CUA and closes a little less of the gap
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.losses.uniformity import log_mean_kernel
from vlp.pairwise import Pairs

NEEDS = frozenset({"image", "text"})
MIN_CANDIDATES = 2


@dataclass(frozen=True)
class Options:
    pass


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """L of the group, whole."""
    return log_mean_kernel(pairs, inputs.image, inputs.text)
