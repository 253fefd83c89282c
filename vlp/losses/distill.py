"""Distillation of similarities from another dual encoder (TinyCLIP, MobileCLIP, arXiv 2311.17049).

    L = ½ Σ_directions mean_i −Σ_j softmax_j(z^T_ij) · log softmax_j(z_ij),      z^T = teacher_scale·u·v

cross-entropy of the student's rows and columns to the teacher's, whose embeddings u, v may have another width and
carry no gradient. Two passes: the teacher's normalisers, then the weighted sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.losses._objective import Inputs
from vlp.pairwise import SUM, Pairs, Reduction, Tile, softplus

NEEDS = frozenset({"image", "text", "scale", "teacher_image", "teacher_text", "teacher_scale"})


@dataclass(frozen=True)
class Options:
    pass


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    inputs = inputs.wide()  # the teacher's normalisers must fit its scores
    u, v = inputs.teacher_image.detach(), inputs.teacher_text.detach()
    scale, teacher_scale = (torch.as_tensor(s, device=u.device) for s in (inputs.scale, inputs.teacher_scale))
    rows, columns, positive = pairs.logsumexp(inputs.image, inputs.text, scale)
    with torch.no_grad():
        margins, own = pairs.margin_logsumexp(u, v, teacher_scale), teacher_scale * (u * v).sum(1)
        normalisers = [(own + softplus(q)).to(u.dtype) for q in margins]
    row_sums, column_sums = pairs.reduce(
        Reduction(_expected_scores, rows=(SUM,), columns=(SUM,)), [inputs.image, u], [inputs.text, v],
        row_values=normalisers[:1], column_values=normalisers[1:], shared=[teacher_scale.detach()], paired=False,
    )  # fmt: skip
    row_terms = positive + softplus(rows - positive) - scale * row_sums
    column_terms = positive + softplus(columns - positive) - scale * column_sums
    return pairs.mean((row_terms + column_terms) / 2)


def _expected_scores(tile: Tile) -> tuple[Tensor, ...]:
    """s_ij times the teacher's probability, of the row and of the column."""
    student, teacher = tile.scores[0], tile.shared[0] * tile.scores[1]
    by_row = (teacher - tile.row_values[0].unsqueeze(1)).exp()
    by_column = (teacher - tile.column_values[0].unsqueeze(0)).exp()
    return student * by_row, student * by_column
