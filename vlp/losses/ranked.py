"""Generalised contrastive learning for ranking (GCL, arXiv 2404.08535): pairs weighted by their
relevance.

    L = mean_i w_i·½ [CE(z_i·, i) + CE(z_·i, i)],   w_i = score_i^power,   z_ij = scale·x_i·t_j

x, t: [b, D], score: [b] >= 0. Power 1 is the score itself, 0 is `infonce`; `normalize` divides by
the mean weight of all ranks, for scores that are not near 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs, softplus

NEEDS = frozenset({"image", "text", "scale", "score"})


@dataclass(frozen=True)
class Options:
    power: float = 1.0  # exponent of the score; 0: every pair weighs the same
    normalize: bool = False  # weighted mean instead of mean of weighted losses

    def __post_init__(self) -> None:
        if self.power < 0:
            raise ValueError(
                f"power: found {self.power}, expected a number >= 0: a more relevant pair weighs more"
            )


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    if pairs.sum_over_ranks((inputs.score < 0).sum().float()):  # so that every rank raises
        raise ValueError(
            f"score: found {inputs.score.min().item():g}, expected numbers >= 0; shift them in the data"
        )
    rows, columns = (
        softplus(q) for q in pairs.margin_logsumexp(inputs.image, inputs.text, inputs.scale)
    )
    weight = inputs.score.to(rows.dtype) ** options.power
    if options.normalize:
        return pairs.mean(rows + columns, weight) / 2
    return pairs.mean(weight * (rows + columns)) / 2
