"""The pairwise sigmoid loss of SigLIP (arXiv 2303.15343).

    L = −(1/n) Σ_ij log σ(y_ij·(scale·x_i·t_j + bias)),      y_ii = 1, y_ij = −1 for j ≠ i.

x, t: [b, D]. Each pair is a decision of its own, so scale and bias are both learned (paper: 10 and
−10 at the start).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs, softplus

NEEDS = frozenset({"image", "text", "scale", "bias"})


@dataclass(frozen=True)
class Options:
    pass


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """Share of L: the mean over this rank's images of their row of decisions."""
    others, positive = pairs.softplus_sum(inputs.image, inputs.text, inputs.scale, inputs.bias)
    return pairs.mean(others + softplus(-positive))
