"""Decoupled uniformity: the centres of the samples spread, and views of a sample stay together.

    L = log mean_{i<j} e^{−t‖μ_i − μ_j‖²},      μ_i = (x_i + t_i) / 2

x, t: [b, D] images and texts; μ is not normalised, so that its norm grows as a pair agrees. As in
`uniformity`, every rank of a group returns the group's value.

With `kernel` and a teacher's unit rows u: [n, D'] of that modality, K_ij = u_i·u_j (of several
teachers their mean), centres of samples that the teacher finds alike are averaged:
μ ← (K + λI)⁻¹K μ, the weights without gradient.

Relations:
- `uniformity` spreads each modality by itself, and needs `alignment` beside it
- as `ridge` nears 0 and K can be inverted, `kernel` changes nothing

Papers:
- Dufumier et al. (arXiv 2206.01646): `objective: {decoupled_uniformity: {}}`
- Dufumier et al., with prior knowledge: `objective: {decoupled_uniformity: {kernel: image}}`;
  their kernel is Gaussian, this one the teacher's cosines

Needs: image, text; with `kernel` teacher_image or teacher_text

Cost: one pass over pairs of centres; O(b·D) memory. A kernel sums D'² + D'·D numbers over ranks and
solves one system of D' equations

Use: where positives are far apart and should not lose their pull as negatives do their push; with
`kernel`, where another model knows which samples are alike
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import LOGSUMEXP, Pairs, Reduction, Tile, is_narrow, number, widened

NEEDS = frozenset({"image", "text"})
MIN_CANDIDATES = 2


@dataclass(frozen=True)
class Options:
    t: float = 2.0  # of the Gaussian of two centres' distance
    # whose stored teacher's rows say which samples are alike; none: each centre is its own
    kernel: Literal["none", "image", "text"] = "none"
    ridge: float = 0.01  # λ of the kernel

    def __post_init__(self) -> None:
        if self.t <= 0 or self.ridge <= 0:
            raise ValueError(f"t and ridge: found {self.t} and {self.ridge}, expected numbers > 0")


def needs(options: Options) -> frozenset[str]:
    of_kernel = set() if options.kernel == "none" else {f"teacher_{options.kernel}"}
    return NEEDS | of_kernel


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """L of the group, whole."""
    centres = (widened(inputs.image) + widened(inputs.text)) / 2
    if options.kernel != "none":
        centres = _smoothed(centres, getattr(inputs, f"teacher_{options.kernel}"), pairs, options)

    # Where embeddings are multiplied in bfloat16, so are centres; norms are of the rounded ones.
    if is_narrow(inputs.image):
        centres = centres.to(inputs.image.dtype)

    # −t‖μ_i − μ_j‖² = 2t μ_i·μ_j − t‖μ_i‖² − t‖μ_j‖²: scores, and a value of each row and column.
    penalty = options.t * widened(centres).square().sum(1)
    (rows,) = pairs.reduce(
        _GAUSSIANS,
        [centres],
        [centres],
        row_values=[penalty],
        column_values=[penalty],
        shared=[number(2 * options.t, centres)],
    )

    n = pairs.candidates(len(centres))
    return pairs.log_sum(rows) - math.log(n * (n - 1))


def _gaussians(tile: Tile) -> tuple[Tensor, ...]:
    exponents = tile.shared[0] * tile.scores[0] - tile.row_values[0].unsqueeze(1)
    exponents = exponents - tile.column_values[0]
    return (exponents.masked_fill(tile.positive, -torch.inf),)


_GAUSSIANS = Reduction(_gaussians, rows=(LOGSUMEXP,))


def _smoothed(centres: Tensor, rows: Tensor, pairs: Pairs, options: Options) -> Tensor:
    """(K + λI)⁻¹ K μ, [b, D], over the centres of the group."""
    # With K = UUᵀ it is U (UᵀU + λI)⁻¹ (Uᵀμ): a system of D' equations, not of n, and moments that
    # ranks add up. In float64, since λ is small beside the largest eigenvalue.
    u = widened(rows.detach()).double()

    # Of several teachers, rows beside one another: K is the mean of their cosines.
    if u.dim() == 3:
        u = u.flatten(1) / math.sqrt(u.shape[1])
    moments = pairs.sum_over_group(u.T @ u)
    means = pairs.sum_over_group(u.T @ centres.double())
    identity = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    smoothed = u @ torch.linalg.solve(moments + options.ridge * identity, means)
    return smoothed.to(centres.dtype)
