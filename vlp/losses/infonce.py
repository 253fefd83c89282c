"""InfoNCE: cross-entropy of every pair against the other texts, and against the other images.

    L = (1/B) Σ_i [ λ·CE(z_i·, i) + (1−λ)·CE(z_·i, i) ],      z_ij = scale·x_i·t_j

x, t: [b, D] images and texts; the first cross-entropy is over the n texts of a row, the second over
the n images of a column. With label smoothing ε the target is (1−ε)·δ_ij + ε/n. Uninformative
scores give log n.

Relations:
- `decoupled` leaves the positive out of the denominator
- `hn_nce` with alpha 1 and beta 0, and `ranked` with power 0, equal this one
- with a topology of groups, candidates come from the group of ranks instead of all (M2-Encoder,
  arXiv 2401.15896)

Papers:
- CLIP (arXiv 2103.00020): `objective: {infonce: {}}`
- ALIGN (arXiv 2102.05918): `objective: {infonce: {label_smoothing: 0.1}}`
- ConVIRT (arXiv 2010.00747): `objective: {infonce: {image_weight: 0.75}}`

Needs: image, text, scale

Cost: one pass over the pairs for both directions, 8·b·n·D FLOPs forward and backward; O(b·D) memory

Use: the default. It wants many candidates a row: a large batch, or several ranks
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
    """This rank's share of L."""
    row_others, column_others, positive = pairs.logsumexp(inputs.image, inputs.text, inputs.scale)

    # CE = softplus(LSE_{j≠i} z_ij − z_ii), exact also where the pair is well aligned.
    rows, columns = softplus(row_others - positive), softplus(column_others - positive)

    if options.label_smoothing:
        # CE with a smoothed target is CE + ε·(z_ii − mean_j z_ij).
        n, ε = pairs.candidates(len(rows)), options.label_smoothing
        row_sums, column_sums = pairs.linear_sums(inputs.image, inputs.text, inputs.scale)
        rows = rows + ε * (positive - row_sums / n)
        columns = columns + ε * (positive - column_sums / n)

    # Means over rows: each rank returns that of its own.
    λ = options.image_weight
    return pairs.mean(λ * rows + (1 - λ) * columns)
