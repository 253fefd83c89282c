"""Kernel mixture: InfoNCE whose kernel is exponential in a distance, not in its square alone.

    L = λ L_1 + (1−λ) L_2
    L_γ = ½ Σ_directions mean_i −log [ e^{−scale·d_ii^γ} / Σ_j e^{−scale·d_ij^γ} ]
    d_ij = √(2 − 2 x_i·t_j + ε),   ε = 10⁻¹²

x, t: [b, D] unit rows, so that d_ij = ‖x_i − t_j‖; ε keeps the gradient of equal rows finite.

`ignore` is that of `infonce`: which other samples are no candidates of a row.

Relations:
- with mix 0 it is `infonce` at twice the scale: −d² = 2s − 2
- with mix 1 the kernel is Laplace's, whose push on far candidates falls more slowly

Papers:
- Contrastive learning is spectral clustering (arXiv 2303.15103), the sum of two kernels:
  `objective: {kernel_mixture: {mix: 0.5}}`; its λ was found by search, and no value is its default

Needs: image, text, scale; with `ignore` what it names

Cost: one pass over the pairs by the general path; O(b·D) memory

Use: to try a kernel with a heavier tail in place of `infonce`; the scale wants a search of its own
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.losses import _candidates
from vlp.losses._candidate_options import Ignoring
from vlp.losses._candidates import Masks
from vlp.losses._inputs import Inputs
from vlp.pairwise import LOGSUMEXP, Pairs, Tile, number, softplus

NEEDS = frozenset({"image", "text", "scale"})
EPSILON = 1e-12  # of the squared distance


@dataclass(frozen=True)
class Options(Ignoring):
    mix: float = 0.5  # λ in [0, 1], the weight of the exponential of the distance itself

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix: found {self.mix}, expected 0 <= λ <= 1")

    @property
    def weights(self) -> dict[int, float]:
        """The weight of each γ that takes part."""
        weights = {1: self.mix, 2: 1 - self.mix}
        return {gamma: weight for gamma, weight in weights.items() if weight}


def needs(options: Options) -> frozenset[str]:
    return NEEDS | options.ignore.needs()


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    chosen = _candidates.of_batch(inputs, pairs, options.candidates())
    scale, gammas = number(inputs.scale, inputs.image), tuple(options.weights)

    def function(tile: Tile, masks: Masks) -> tuple[Tensor, ...]:
        matrices = [-tile.shared[0] * _power(tile.scores[0], gamma) for gamma in gammas]
        return tuple(z.masked_fill(~kept, -torch.inf) for kept in masks.kept for z in matrices)

    kinds = (LOGSUMEXP,) * len(gammas)
    log_sums = chosen.reduce(
        pairs, function, inputs.image, inputs.text, rows=kinds, columns=kinds, shared=[scale]
    )

    # In float64: of a pair that is aligned, 2 − 2s keeps few of float32's digits.
    cosine = (inputs.image.double() * inputs.text.double()).sum(1)
    total: Tensor | int = 0
    for k, (gamma, weight) in enumerate(options.weights.items()):
        positive = -scale * _power(cosine, gamma).to(scale.dtype)
        by_image, by_text = (softplus(log_sums[k + side] - positive) for side in (0, len(gammas)))
        total = total + weight * pairs.mean(by_image + by_text) / 2
    assert isinstance(total, Tensor)
    return total


def _power(cosine: Tensor, gamma: int) -> Tensor:
    """d^γ of unit rows."""
    # Rounding may take a cosine above 1.
    square = (2 - 2 * cosine).clamp(min=0) + EPSILON
    return square if gamma == 2 else square.sqrt()
