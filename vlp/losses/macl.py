"""Model-aware contrastive learning (MACL, arXiv 2207.07874): a temperature that follows the
alignment of the pairs.

    A = mean sg(s_ii) over the group,   τ = τ₀ (1 + α (A − A₀)),   P_i = softmax of the pair at temperature τ,
    L = ½ Σ_directions mean_i sg(1 / (1 − P_i)) · (−log P_i)

x, t: [b, D]. The factor restores the gradient that vanishes for easy pairs; 1 − P_i = σ(q_i) with
the margin q, and the factor is clamped at `max_factor`. The model's learned scale takes no part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs, softplus

NEEDS = frozenset({"image", "text"})
MIN_CANDIDATES = 2


@dataclass(frozen=True)
class Options:
    temperature: float = 0.1  # τ₀
    alpha: float = 0.5  # α, how strongly the temperature follows
    alignment: float = 0.0  # A₀
    max_factor: float = 1e4  # largest 1 / (1 − P)

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.max_factor < 1:
            raise ValueError(f"expected temperature > 0 and max_factor >= 1, found {self}")
        if not 0 <= self.alpha * (1 + abs(self.alignment)) < 1:
            raise ValueError(
                f"alpha: found {self.alpha}, with which the temperature could become negative; lower it"
            )


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    wide = inputs.wide()
    own = (wide.image * wide.text).detach().sum(1)
    mean = pairs.sum(own) / pairs.candidates(len(own))
    temperature = options.temperature * (1 + options.alpha * (mean - options.alignment))
    margins = pairs.margin_logsumexp(inputs.image, inputs.text, 1 / temperature)
    factors = [(1 / torch.sigmoid(q.detach())).clamp(max=options.max_factor) for q in margins]
    return pairs.mean(sum(f * softplus(q) for f, q in zip(factors, margins)) / 2)
