"""InfoNCE, the loss of CLIP, ALIGN, BASIC and ConVIRT.

    L = (1/B) Σ_i [ λ·CE(z_i·, i) + (1−λ)·CE(z_·i, i) ],      z_ij = scale·x_i·t_j,   x, t: [b, D],

cross-entropies over the texts of a row and over the images of a column (CLIP, arXiv 2103.00020,
figure 3). With label smoothing ε the target is (1−ε)·δ_ij + ε/n (ALIGN, arXiv 2102.05918: ε = .1);
λ weighs the directions (ConVIRT, arXiv 2010.00747: λ = .75). Uninformative scores give log n, with
n the candidates of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs, softplus

NEEDS = frozenset({"image", "text", "scale"})


@dataclass(frozen=True)
class Options:
    label_smoothing: float = 0.0  # ε in [0, 1)
    image_weight: float = 0.5  # λ, the weight of the direction anchored at images; texts get 1 − λ

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: found {self.label_smoothing}, expected 0 <= ε < 1")
        if not 0 <= self.image_weight <= 1:
            raise ValueError(f"image_weight: found {self.image_weight}, expected 0 <= λ <= 1")


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """Share of L, with CE = softplus(LSE_{j≠i} z_ij − z_ii): exact also where the pair is well
    aligned.
    """
    rows, columns, positive = pairs.logsumexp(inputs.image, inputs.text, inputs.scale)
    rows, columns = softplus(rows - positive), softplus(columns - positive)
    if options.label_smoothing:
        # CE with a smoothed target is CE + ε·(z_ii − mean_j z_ij).
        n, ε = pairs.candidates(len(rows)), options.label_smoothing
        row_sums, column_sums = pairs.linear_sums(inputs.image, inputs.text, inputs.scale)
        rows, columns = (
            rows + ε * (positive - row_sums / n),
            columns + ε * (positive - column_sums / n),
        )
    λ = options.image_weight
    return pairs.mean(λ * rows + (1 - λ) * columns)
