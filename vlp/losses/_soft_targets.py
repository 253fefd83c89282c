"""Losses of a row against soft targets, from scores a_ij of another model's rows.

    −Σ_j q_ij log softmax_j(z_ij) = softplus(m_i) − Σ_{j≠i} q_ij (z_ij − z_ii)

with m_i = log Σ_{j≠i} e^{z_ij} − z_ii and Σ_j q_ij = 1: centred on the pair, nothing cancels where
teacher and student are sure of it. q has no gradient. `softmax` and `distance` give q; `kernel`
weighs the negatives instead:

    softmax    q_ij = (1−α) δ_ij + α softmax_j(a_ij/τ)
    distance   q_ij = w_ij / Σ_k w_ik,   w_ii = 1,   w_ij = 2β σ(−γ (1 − a_ij))
    kernel     log [ 1 + (n−1) Σ_{j≠i} w_ij e^{z_ij − z_ii} ],   w = (K + λI)⁻¹ K,   K_ij = a_ij

K = UUᵀ of the unit rows U: [n, D'] makes w = U (UᵀU + λI)⁻¹ Uᵀ: a matrix [D', D'] for the whole
group, and scores as all others. Weights below 10⁻⁶ are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import (
    LOGSUMEXP,
    SUM,
    Pairs,
    Reduction,
    Tile,
    in_students_dtype,
    number,
    softplus,
    widened,
)

SMALLEST_WEIGHT = 1e-6
Matrix = tuple[Tensor, Tensor]  # rows and columns of a score matrix, [b, D'] each
# (scores of a tile, the value of each row or column) -> weights, all [m, n] or broadcast to it
Weights = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Targets:
    """Soft targets of a row's candidates, from a teacher's stored unit rows; a_ij their cosines."""

    # softmax: its distribution (SoftCLIP); distance: a weight by 1 − a_ij (SoftCLT); kernel: the
    # negatives weigh by their likeness (CCL-K)
    by: Literal["softmax", "distance", "kernel"] = "softmax"
    # images among images and texts among texts in their own direction, one of them in both
    # directions, or images against texts
    of: Literal["own", "image", "text", "cross"] = "own"
    alpha: float = 0.5  # softmax: α, what the teacher's distribution gets of the target
    temperature: float = 0.05  # softmax: τ of the teacher's cosines
    beta: float = 0.5  # distance: β, the weight of a candidate that equals the pair
    gamma: float = 10.0  # distance: γ, how fast weights fall with 1 − a_ij
    ridge: float = 0.1  # kernel: λ

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"targets.alpha: found {self.alpha}, expected 0 <= α <= 1")
        if min(self.temperature, self.gamma, self.ridge) <= 0 or not 0 <= self.beta <= 1:
            raise ValueError(
                "targets: expected temperature, gamma and ridge > 0 and 0 <= beta <= 1, found "
                f"{self.temperature}, {self.gamma}, {self.ridge} and {self.beta}"
            )
        if self.by == "kernel" and self.of == "cross":
            raise ValueError(
                "targets.of: a kernel compares rows of one modality; use own, image or text"
            )

    def needs(self) -> frozenset[str]:
        """The keywords that hold the teacher's rows."""
        one_side = {"image": {"teacher_image"}, "text": {"teacher_text"}}
        return frozenset(one_side.get(self.of, {"teacher_image", "teacher_text"}))


def of_pairs(inputs: Inputs, pairs: Pairs, targets: Targets) -> tuple[Tensor, Tensor]:
    """Losses of images against texts [b], and of texts against images [b]."""
    by_row, by_column = _matrices(inputs, targets.of)
    if targets.by == "kernel":
        return _weighted_negatives(inputs, pairs, by_row, by_column, targets.ridge)

    scale = number(inputs.scale, inputs.image)
    rows, columns, positive = pairs.logsumexp(inputs.image, inputs.text, scale)

    if targets.by == "softmax":
        τ, α = targets.temperature, targets.alpha
        values = log_normalisers(pairs, *by_row, 1 / τ)
        if by_column is not by_row:
            values = values[0], log_normalisers(pairs, *by_column, 1 / τ)[1]
        gaps = expected_gaps(
            inputs, pairs, by_row, by_column, values, lambda a, lse: (a / τ - lse).exp()
        )
        row_gaps, column_gaps = (α * side for side in gaps)
    else:
        row_gaps, column_gaps = _distance_gaps(inputs, pairs, by_row, by_column, targets)

    by_image = softplus(rows - positive) - scale * row_gaps
    by_text = softplus(columns - positive) - scale * column_gaps
    return by_image, by_text


def expected_gaps(
    inputs: Inputs,
    pairs: Pairs,
    by_row: Matrix,
    by_column: Matrix,
    values: tuple[Tensor, Tensor],  # of the rows and of the columns, [b] each
    weights: Weights,
) -> tuple[Tensor, ...]:
    """Σ_{j≠i} q_ij (s_ij − s_ii) of the rows, and the same of the columns, [b] each."""
    wide = inputs.wide()
    cosine = (wide.image * wide.text).sum(1)

    def function(tile: Tile) -> tuple[Tensor, ...]:
        student, pair = tile.scores[0], tile.positive
        gaps = []
        for scores, (value, own), axis in (
            (tile.scores[1], tile.row_values, 1),
            (tile.scores[-1], tile.column_values, 0),
        ):
            weight = weights(scores.detach(), value.unsqueeze(axis)).masked_fill(pair, 0)
            gaps.append(weight * (student - own.unsqueeze(axis)))
        return tuple(gaps)

    # One matrix where both directions have the same.
    others = [by_row] if by_row is by_column else [by_row, by_column]
    by_rows, by_columns = (value.to(cosine.dtype) for value in values)
    return pairs.reduce(
        Reduction(function, rows=(SUM,), columns=(SUM,)),
        [inputs.image, *(left for left, _ in others)],
        [inputs.text, *(right for _, right in others)],
        row_values=[by_rows, cosine],
        column_values=[by_columns, cosine],
    )


@torch.no_grad()
def log_normalisers(
    pairs: Pairs, left: Tensor, right: Tensor, scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    """log Σ_j e^{scale·l_i·r_j} of the rows and of the columns, [b] each, in float32 at least."""
    # The positive is apart, so that a sure teacher keeps its other candidates.
    positive = scale * (widened(left) * widened(right)).sum(1)
    rows, columns = (positive + softplus(q) for q in pairs.margin_logsumexp(left, right, scale))
    return rows, columns


def _distance_gaps(
    inputs: Inputs, pairs: Pairs, by_row: Matrix, by_column: Matrix, targets: Targets
) -> tuple[Tensor, ...]:
    """The gaps of weights by distance, divided by the sum of the weights."""

    def weight(scores: Tensor) -> Tensor:
        return 2 * targets.beta * torch.sigmoid(-targets.gamma * (1 - scores))

    def function(tile: Tile) -> tuple[Tensor, ...]:
        return tuple(
            weight(scores).masked_fill(tile.positive, 0)
            for scores in (tile.scores[0], tile.scores[-1])
        )

    # The pair's own weight is 1.
    others = [by_row] if by_row is by_column else [by_row, by_column]
    with torch.no_grad():
        sums = pairs.reduce(
            Reduction(function, rows=(SUM,), columns=(SUM,)),
            [left for left, _ in others],
            [right for _, right in others],
        )
    totals = (1 + sums[0], 1 + sums[1])
    return expected_gaps(
        inputs, pairs, by_row, by_column, totals, lambda a, total: weight(a) / total
    )


def _weighted_negatives(
    inputs: Inputs, pairs: Pairs, by_row: Matrix, by_column: Matrix, ridge: float
) -> tuple[Tensor, Tensor]:
    """The losses whose negatives a kernel weighs, in logarithms."""
    log_others = math.log(max(pairs.candidates(len(inputs.image)) - 1, 1))

    def function(tile: Tile) -> tuple[Tensor, ...]:
        z, pair = tile.shared[0] * tile.scores[0], tile.positive
        others = []
        for weights in (tile.scores[1].detach(), tile.scores[-1].detach()):
            none = pair | (weights < SMALLEST_WEIGHT)
            log_weights = weights.clamp(min=SMALLEST_WEIGHT).log()
            others.append((z + log_weights).masked_fill(none, -torch.inf))
        return others[0], z.masked_fill(~pair, 0), others[1]

    kernels = [_kernel(pairs, by_row, ridge)]
    if by_column is not by_row:
        kernels.append(_kernel(pairs, by_column, ridge))
    rows, positive, columns = pairs.reduce(
        Reduction(function, rows=(LOGSUMEXP, SUM), columns=(LOGSUMEXP,)),
        [inputs.image, *(left for left, _ in kernels)],
        [inputs.text, *(right for _, right in kernels)],
        shared=[number(inputs.scale, inputs.image)],
    )
    by_image, by_text = (softplus(log_others + side - positive) for side in (rows, columns))
    return by_image, by_text


@torch.no_grad()
def _kernel(pairs: Pairs, matrix: Matrix, ridge: float) -> Matrix:
    """Rows and columns whose scores are (K + λI)⁻¹ K, of the rows u of all the group."""
    u = widened(matrix[0])
    moments = pairs.sum_over_group(u.T @ u)
    identity = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    return torch.linalg.solve(moments + ridge * identity, u.T).T, u


def _matrices(inputs: Inputs, of: str) -> tuple[Matrix, Matrix]:
    """The scores that images have for targets, and those of texts; one where they are the same."""

    def rows(name: str) -> Tensor:
        return in_students_dtype(inputs.image, getattr(inputs, f"teacher_{name}").detach())

    if of == "own":
        image, text = rows("image"), rows("text")
        return (image, image), (text, text)
    first, second = ("image", "text") if of == "cross" else (of, of)
    matrix = rows(first), rows(second)
    return matrix, matrix
