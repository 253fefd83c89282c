"""Hard-negative noise contrastive estimation, the loss of DiHT (arXiv 2301.02280).

    L = ½ Σ_directions mean_i −log [ e^{z_ii} / (α e^{z_ii} + Σ_{j≠i} w_ij e^{z_ij}) ],
    w_ij = (n−1) e^{β z_ij} / Σ_{k≠i} e^{β z_ik},

x, t: [b, D]; each direction with its own normaliser; gradients flow through w. α = 1, β = 0 is
`infonce`; α = β = 0 is `decoupled`. With Λ(m) = log Σ_{j≠i} e^{m z_ij} the sum is log(n−1) + Λ(1+β)
− Λ(β): two multiples of the scale in one pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs, softplus

NEEDS = frozenset({"image", "text", "scale"})
MIN_CANDIDATES = 2


@dataclass(frozen=True)
class Options:
    alpha: float = 1.0  # weight of the positive in the denominator, 0 <= α
    beta: float = 0.25  # concentration on hard negatives, 0 <= β

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta < 0:
            raise ValueError(
                f"alpha and beta: found {self.alpha} and {self.beta}, expected numbers >= 0"
            )


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    (sharp, flat), positive = pairs.multiples_logsumexp(
        inputs.image, inputs.text, inputs.scale, (1 + options.beta, options.beta)
    )
    log_others = math.log(pairs.candidates(len(positive)) - 1)
    margins = [log_others + a - b - positive for a, b in zip(sharp, flat)]
    if options.alpha:
        log_alpha = math.log(options.alpha)
        margins = [softplus(m - log_alpha) + log_alpha for m in margins]
    return pairs.mean(sum(margins) / 2)
