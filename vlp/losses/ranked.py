"""Generalised contrastive learning: InfoNCE whose pairs weigh by their relevance.

    L = mean_i w_i·½ [CE(z_i·, i) + CE(z_·i, i)],   w_i = score_i^power,   z_ij = scale·x_i·t_j

x, t: [b, D] images and texts, score: [b] >= 0. Power 1 is the score itself; `normalize` divides by
the mean weight of all ranks, for scores that are not near 1.

Relations:
- equivalent to `infonce` with power 0

Papers:
- GCL (arXiv 2404.08535), one field a side: `objective: {ranked: {}}`

Needs: image, text, scale, score

Cost: one pass over the pairs, 8·b·n·D FLOPs forward and backward; O(b·D) memory

Use: where each pair comes with a graded relevance (clicks, ratings), to order results by it
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
                f"power: found {self.power}, expected a number >= 0: a more relevant pair weighs "
                "more"
            )


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L. ValueError, on every rank, for a negative score."""
    # Counted over all ranks, so that every one of them raises.
    n_negative = pairs.sum_over_ranks((inputs.score < 0).sum().float())
    if n_negative:
        raise ValueError(
            f"score: found {inputs.score.min().item():g}, expected numbers >= 0; shift them in the "
            "data"
        )

    row_margins, column_margins = pairs.margin_logsumexp(inputs.image, inputs.text, inputs.scale)
    losses = softplus(row_margins) + softplus(column_margins)

    # `mean` with weights divides by their sum, without them by the number of rows.
    weight = inputs.score.to(losses.dtype) ** options.power
    if options.normalize:
        return pairs.mean(losses, weight) / 2
    return pairs.mean(weight * losses) / 2
