"""Model-aware contrastive learning: a temperature that follows the alignment of the pairs.

    A = mean sg(s_ii) over the group,   τ = τ₀ (1 + α (A − A₀))
    L = ½ Σ_directions mean_i sg(1 / (1 − P_i)) · (−log P_i)

x, t: [b, D] images and texts, s_ii = x_i·t_i, sg the stop-gradient, and P_i the softmax probability
of the pair at temperature τ. The factor restores the gradient that vanishes for easy pairs; it is
clamped at `max_factor`.

Relations:
- equivalent to `infonce` at temperature τ but for the factor; the model's learned scale takes no
  part

Papers:
- MACL (arXiv 2207.07874):
  `objective: {macl: {temperature: 0.1, alpha: 0.5, alignment: 0}}`

Needs: image, text

Cost: one pass over the pairs, 8·b·n·D FLOPs forward and backward; O(b·D) memory

Use: with few candidates a row, and where a learned temperature is not wanted
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
                f"alpha: found {self.alpha}, with which the temperature could become negative; "
                "lower it"
            )


def exported_scale(options: Options) -> float:
    """1/τ₀, which holds at A = A₀: τ itself moves with the batch."""
    return 1 / options.temperature


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    # The temperature follows the group's alignment, without gradient.
    wide = inputs.wide()
    cosine = (wide.image * wide.text).detach().sum(1)
    mean = pairs.sum(cosine) / pairs.candidates(len(cosine))
    temperature = options.temperature * (1 + options.alpha * (mean - options.alignment))

    # With the margins q: 1 − P = σ(q), −log P = softplus(q).
    margins = pairs.margin_logsumexp(inputs.image, inputs.text, 1 / temperature)
    factors = [(1 / torch.sigmoid(q.detach())).clamp(max=options.max_factor) for q in margins]
    by_row, by_column = (factor * softplus(q) for factor, q in zip(factors, margins))
    return pairs.mean((by_row + by_column) / 2)
