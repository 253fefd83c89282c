"""Hard-negative noise contrastive estimation: InfoNCE whose negatives weigh by their hardness.

    L = ½ Σ_directions mean_i −log [ e^{z_ii} / (α e^{z_ii} + Σ_{j≠i} w_ij e^{z_ij}) ]
    w_ij = (n−1) e^{β z_ij} / Σ_{k≠i} e^{β z_ik},      z_ij = scale·x_i·t_j

x, t: [b, D] images and texts; each direction with its own normaliser; gradients flow through w.

`positives`, `form`, `ignore`, `hardest` and `within` are those of `infonce`: the weighted sum is
over the negatives of the row, n − 1 their number, and α weighs every positive of the denominator.
Negatives of the row's own modality come unweighted.

Relations:
- equivalent to `infonce` with alpha 1 and beta 0
- equivalent to `decoupled` with alpha 0 and beta 0

Papers:
- DiHT (arXiv 2301.02280): `objective: {hn_nce: {alpha: 1, beta: 0.25}}`; its beta could not be
  confirmed

Needs: image, text, scale; with positives and ignore what `infonce` needs

Cost: one pass over the pairs by the general path; O(b·D) memory. With positives or masks as
`infonce`

Use: in place of `infonce` where random negatives have become easy; data gains no field
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vlp.losses import _masked
from vlp.losses._candidate_options import Formed
from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs, softplus

NEEDS = frozenset({"image", "text", "scale"})
MIN_CANDIDATES = 2


@dataclass(frozen=True)
class Options(Formed):
    alpha: float = 1.0  # weight of the positive in the denominator, 0 <= α
    beta: float = 0.25  # concentration on hard negatives, 0 <= β

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0 or self.beta < 0:
            raise ValueError(
                f"alpha and beta: found {self.alpha} and {self.beta}, expected numbers >= 0"
            )


def needs(options: Options) -> frozenset[str]:
    return NEEDS | options.needs()


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    if not options.plain:
        by_image, by_text = _masked.of_pairs(inputs, pairs, options, options.alpha, options.beta)
        return pairs.mean((by_image + by_text) / 2)

    # With Λ(m) = log Σ_{j≠i} e^{m z_ij} the weighted sum is log(n−1) + Λ(1+β) − Λ(β): two multiples
    # of the scale in one pass.
    (sharp, flat), positive = pairs.multiples_logsumexp(
        inputs.image, inputs.text, inputs.scale, (1 + options.beta, options.beta)
    )
    log_others = math.log(pairs.candidates(len(positive)) - 1)
    margins = [log_others + a - b - positive for a, b in zip(sharp, flat)]

    # log(α + e^q) = softplus(q − log α) + log α, which has no α = 0.
    if options.alpha:
        log_alpha = math.log(options.alpha)
        margins = [softplus(q - log_alpha) + log_alpha for q in margins]
    by_row, by_column = margins
    return pairs.mean((by_row + by_column) / 2)
