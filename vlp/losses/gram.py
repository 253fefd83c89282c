"""GRAM: the modalities of a sample span a small volume, those of different samples a large one.

    L = ½ [ mean_i CE(z_i·, i) + mean_j CE(z_·j, j) ],   z_ij = −scale·V_ij
    V_ij = √max(det G_ij, ε),   G_ij = Gram matrix of t_i, x_j, o_1j, …, o_Oj

t: [b, D] texts, the anchors; x: [b, D] images; o: [O, b, D] further modalities (`others`). With
C_j the Gram matrix of column j's modalities and s_ij their scores with t_i,

    det G_ij = ‖t_i‖²·det C_j − s_ijᵀ adj(C_j) s_ij

so that a tile needs 1 + O scores a pair and no matrix a pair. The root has no gradient where
det G_ij < ε. Samples that lack a modality (`others_valid`) are neither rows nor candidates; a batch
without any complete sample gives 0, and `complete` in the log is the share that has all.

Relations:
- without `others` V_ij = √(1 − s_ij²): t and −t are equally aligned with x, as signs of rows never
  matter to a volume
- `infonce` over −scale·V instead of scale·s

Papers:
- GRAM (arXiv 2412.11959): `objective: {gram: {label_smoothing: 0.1}}` with scale 1/.07; its second
  part, a matching head with negatives drawn by volume, is not among the terms, and its release
  gathers without gradient and learns τ itself, which may reach 0, where here log τ is learned

Needs: image, text, scale; where the call carries them others and others_valid

Cost: one pass over the pairs with 1 + O score matrices; O(O·b·D) memory

Use: with three modalities or more that should all agree, from towers that agree already or beside
`infonce`: from nothing, texts and images may come to lie opposite each other, and retrieval by
cosines then ranks the right one last; more modalities than the embedding has dimensions span no
volume, which is refused
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.losses import _modalities
from vlp.losses._inputs import Inputs
from vlp.losses._modalities import OPTIONAL as OPTIONAL  # what the house asks of a term
from vlp.pairwise import LOGSUMEXP, SUM, Pairs, Reduction, Tile, number, softplus, widened

NEEDS = frozenset({"image", "text", "scale"})


@dataclass(frozen=True)
class Options:
    label_smoothing: float = 0.0  # in [0, 1): share of the target that all candidates divide
    epsilon: float = 1e-6  # ε, the least squared volume under the root

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: found {self.label_smoothing}, expected 0 <= ε < 1")
        if self.epsilon <= 0:
            raise ValueError(f"epsilon: found {self.epsilon}, expected a number > 0")


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    valid = _modalities.complete(inputs)
    # Of half precision too: a small determinant is the difference of large parts.
    inputs = inputs.wide()
    columns = [inputs.image, *_modalities.further(inputs)]
    _check_rank(1 + len(columns), inputs.text.shape[1])

    by_row, by_column = _losses(inputs, columns, valid, pairs, options)
    return _modalities.mean_of_complete((by_row + by_column) / 2, valid, pairs)


def check_modalities(options: Options, names: list[str], width: int, n: int) -> None:
    """Refuse more modalities than the space has dimensions. ValueError."""
    _check_rank(len(names), width)


def _check_rank(n_vectors: int, width: int) -> None:
    if n_vectors > width:
        raise ValueError(
            f"found {n_vectors} modalities in a space of {width} dimensions, where any of them "
            f"span no volume; expected at most {width}: take wider embeddings, or drop "
            "modalities"
        )


def _losses(
    inputs: Inputs, columns: list[Tensor], valid: Tensor, pairs: Pairs, options: Options
) -> tuple[Tensor, Tensor]:
    """Cross-entropies of texts and of columns over the candidates, [b] each."""
    text = widened(inputs.text)
    determinants, cofactors = _of_columns(columns)
    kept = valid.to(text.dtype)

    smooth = bool(options.label_smoothing)
    statistics = pairs.reduce(
        _reduction(len(columns), options.epsilon, smooth),
        [inputs.text] * len(columns),
        columns,
        row_values=[kept, text.square().sum(1)],
        column_values=[kept, determinants, *cofactors],
        shared=[number(inputs.scale, inputs.text)],
    )
    if not smooth:
        row_others, positive, column_others = statistics
        return softplus(row_others - positive), softplus(column_others - positive)

    # As in `infonce`; the uniform part is over the candidates that take part.
    row_others, positive, row_sums, column_others, column_sums = statistics
    n_kept = pairs.sum(kept).clamp(min=1)
    by_row = softplus(row_others - positive)
    by_column = softplus(column_others - positive)
    by_row = by_row + options.label_smoothing * (positive - row_sums / n_kept)
    by_column = by_column + options.label_smoothing * (positive - column_sums / n_kept)
    return by_row, by_column


def _of_columns(columns: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """det C_j [b], and the entries of adj(C_j) on and above the diagonal, [b] each."""
    rows = widened(torch.stack(columns, 1))  # [b, k, D]
    # Small matrices: float64 costs nothing, and modalities that agree leave few digits.
    gram = (rows @ rows.mT).double()
    determinant, adjugate = _adjugate(gram)

    upper = itertools.combinations_with_replacement(range(len(columns)), 2)
    cofactors = [adjugate[:, p, q].to(rows.dtype) for p, q in upper]
    return determinant.to(rows.dtype), cofactors


def _adjugate(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Determinants [b] and adjugates [b, k, k] of [b, k, k] by Faddeev and LeVerrier's recursion.

    Polynomials of the entries alone: exact gradients where two modalities are one and no inverse
    exists.
    """
    k = matrices.shape[-1]
    identity = torch.eye(k, dtype=matrices.dtype, device=matrices.device)
    term = identity.expand_as(matrices)
    for step in range(1, k):
        product = matrices @ term
        coefficient = -_trace(product) / step
        term = product + coefficient[:, None, None] * identity

    sign = 1 if k % 2 else -1
    return sign * _trace(matrices @ term) / k, sign * term


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _reduction(n_columns: int, epsilon: float, smooth: bool) -> Reduction:
    """LSE_{j≠i} z_ij, z_ii, with `smooth` Σ_j z_ij, and by column the same without z_ii."""
    upper = list(itertools.combinations_with_replacement(range(n_columns), 2))

    def function(tile: Tile) -> tuple[Tensor, ...]:
        kept_rows, squares = tile.row_values
        kept_columns, determinants, *cofactors = tile.column_values
        volume = squares.unsqueeze(1) * determinants  # squared
        for (p, q), cofactor in zip(upper, cofactors):
            times = 1 if p == q else 2
            volume = torch.addcmul(
                volume, times * cofactor * tile.scores[p], tile.scores[q], value=-1
            )
        z = -tile.shared[0] * volume.clamp(min=epsilon).sqrt()

        out_by_row = (kept_columns == 0).expand_as(z)
        out_by_column = (kept_rows == 0).unsqueeze(1).expand_as(z)
        by_row = z.masked_fill(tile.positive | out_by_row, -torch.inf)
        by_column = z.masked_fill(tile.positive | out_by_column, -torch.inf)
        own = z.masked_fill(~tile.positive, 0)
        if not smooth:
            return by_row, own, by_column
        sums = z.masked_fill(out_by_row, 0), z.masked_fill(out_by_column, 0)
        return by_row, own, sums[0], by_column, sums[1]

    if smooth:
        return Reduction(function, rows=(LOGSUMEXP, SUM, SUM), columns=(LOGSUMEXP, SUM))
    return Reduction(function, rows=(LOGSUMEXP, SUM), columns=(LOGSUMEXP,))
