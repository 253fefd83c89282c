"""Decoupled contrastive learning, DCL and DCLW (arXiv 2110.06848).

    L = ½ Σ_directions mean_i [ −w_i z_ii + log Σ_{j≠i} e^{z_ij} ],      z_ij = scale·x_i·t_j

the softmax without the positive in its denominator. w_i = 1 (DCL), or weighted w_i = 2 −
n·softmax_i(s_ii/σ), detached, over the group (DCLW): pairs that already agree weigh less. x, t: [b,
D].
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs

NEEDS = frozenset({"image", "text", "scale"})
MIN_CANDIDATES = 2


@dataclass(frozen=True)
class Options:
    weighted: bool = False  # DCLW
    sigma: float = 0.5  # σ of its weights

    def __post_init__(self) -> None:
        if self.sigma <= 0:
            raise ValueError(f"sigma: found {self.sigma}, expected a number > 0")


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    rows, columns, positive = pairs.logsumexp(inputs.image, inputs.text, inputs.scale)
    if not options.weighted:
        return pairs.mean((rows + columns) / 2 - positive)
    cosine = (positive / inputs.scale).detach() / options.sigma
    weight = 2 - pairs.candidates(len(rows)) * (cosine - pairs.log_sum(cosine)).exp()
    return pairs.mean((rows + columns) / 2 - weight * positive)
