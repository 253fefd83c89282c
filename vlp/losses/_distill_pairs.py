"""The forms of `distill` that compare every row of the batch with a teacher's rows.

Each gives a loss for every image and one for every text, [b] each; L is the mean of their sum
divided by 2, and over several teachers the mean. `focus` weighs the rows by what the student does
not know yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vlp.losses import _teachers
from vlp.losses._inputs import Inputs
from vlp.losses._queue import keys
from vlp.losses._soft_targets import expected_gaps, log_normalisers
from vlp.losses._teachers import Rows
from vlp.pairwise import (
    SUM,
    Pairs,
    Reduction,
    Tile,
    logaddexp,
    number,
    softplus,
    widened,
)

Sides = tuple[Tensor, Tensor]  # of images and of texts, [b] each
# The last: margins of the student's own pairs, where they are known.
Form = Callable[[Inputs, Pairs, Rows, "Sides | None"], Sides]


def over_pairs(
    inputs: Inputs,
    pairs: Pairs,
    form: str,
    focus: float,
    norm: str = "squared",  # of features
    sides: str = "both",  # of features: or "image", or "text"
) -> Tensor:
    """This rank's share of L in one of FORMS."""
    inputs = inputs.operands()
    margins = None
    if form == "similarity" or focus:
        margins = pairs.margin_logsumexp(
            inputs.image, inputs.text, number(inputs.scale, inputs.image)
        )

    teachers = _teachers.each(inputs, projected=form != "similarity")
    forms = FORMS | {"features": partial(features, distance=_DISTANCES[norm])}
    of_teachers = [forms[form](inputs, pairs, teacher, margins) for teacher in teachers]
    by_image, by_text = (torch.stack(side).mean(0) for side in zip(*of_teachers))
    if sides == "image":
        by_text = torch.zeros_like(by_text)
    if sides == "text":
        by_image = torch.zeros_like(by_image)
    if margins is None or not focus:
        return pairs.mean((by_image + by_text) / 2)

    # 1 − P_i = σ(q_i): what the student is sure of has nothing to learn.
    of_images, of_texts = (torch.sigmoid(side.detach()) ** focus for side in margins)
    return (pairs.mean(by_image, of_images) + pairs.mean(by_text, of_texts)) / 2


def similarity(inputs: Inputs, pairs: Pairs, teacher: Rows, margins: Sides | None) -> Sides:
    """Cross-entropy to the teacher's rows and columns.

    Centred on the pair, −Σ_j p_j log softmax(z)_j = softplus(q_i) − Σ_{j≠i} p_j (z_ij − z_ii):
    nothing cancels where teacher and student are sure of it.
    """
    scale = number(inputs.scale, inputs.image)

    # The teacher's normalisers come first. They must fit its scores in the second pass: made of
    # the same rows, and wide.
    values = log_normalisers(pairs, teacher.image, teacher.text, teacher.scale)

    # Then teacher and student in one tile: Σ_j p_j (s_ij − s_ii) of rows and columns.
    matrix = teacher.image, teacher.text
    row_gaps, column_gaps = expected_gaps(
        inputs, pairs, matrix, matrix, values, lambda a, lse: (teacher.scale * a - lse).exp()
    )
    assert margins is not None  # `over_pairs` computes them for this form
    by_row, by_column = margins
    return softplus(by_row) - scale * row_gaps, softplus(by_column) - scale * column_gaps


def _squared(projected: Tensor, rows: Tensor) -> Tensor:
    return (widened(projected) - widened(rows)).square().sum(1)


def _absolute(projected: Tensor, rows: Tensor) -> Tensor:
    return (widened(projected) - widened(rows)).abs().sum(1)


_DISTANCES = {"squared": _squared, "l1": _absolute}


def features(
    inputs: Inputs,
    pairs: Pairs,
    teacher: Rows,
    margins: Sides | None,
    distance: Callable[[Tensor, Tensor], Tensor] = _squared,
) -> Sides:
    """Twice the distances, because L is their sum over images and texts."""
    by_image = distance(teacher.projected_image, teacher.image)
    by_text = distance(teacher.projected_text, teacher.text)
    return 2 * by_image, 2 * by_text


def interactive(inputs: Inputs, pairs: Pairs, teacher: Rows, margins: Sides | None) -> Sides:
    """Cross-entropy of the student's rows against the teacher's of the other modality."""
    by_image = _against(teacher, pairs, "image", teacher.text, teacher.queue_text)
    by_text = _against(teacher, pairs, "text", teacher.image, teacher.queue_image)
    return by_image, by_text


def _against(
    teacher: Rows, pairs: Pairs, side: str, columns: Tensor, queue: Tensor | None
) -> Tensor:
    """−log p of the own column, [b], of the student's rows of a side; the queue adds columns."""
    rows, scale = teacher.student(side), teacher.interactive_scale
    others = pairs.row_logsumexp(rows, columns, scale, paired=True)
    if queue is not None:
        queue, holds_key = keys(queue, len(rows), pairs)
        of_queue = pairs.alone.row_logsumexp(rows, queue.to(rows.dtype), scale, valid=holds_key)
        others = logaddexp(others, of_queue)
    return softplus(others - scale * _own_cosines(rows, columns))


def cross(inputs: Inputs, pairs: Pairs, teacher: Rows, margins: Sides | None) -> Sides:
    """Divergence of the interactive rows from the teacher's own."""
    by_image = _from_teacher(teacher, pairs, "image", teacher.image, teacher.text)
    by_text = _from_teacher(teacher, pairs, "text", teacher.text, teacher.image)
    return by_image, by_text


def _from_teacher(teacher: Rows, pairs: Pairs, side: str, left: Tensor, right: Tensor) -> Tensor:
    """KL(p‖q) of each row, [b]: p the teacher's softmax over `right`, q the student's.

    Centred on the pair: with gaps a_ij = z_ij − z_ii of either and their margins m_i,
    KL = Σ_{j≠i} p_ij (a^T_ij − a_ij) + softplus(m_i) − softplus(m^T_i), which is exactly 0 where
    both are one.
    """
    rows, scale = teacher.student(side), teacher.interactive_scale
    cosines, teacher_cosines = _own_cosines(rows, right), _own_cosines(left, right)
    margins = pairs.row_logsumexp(rows, right, scale, paired=True) - scale * cosines

    with torch.no_grad():
        teacher_others = pairs.row_logsumexp(left, right, teacher.scale, paired=True)
        teacher_margins = teacher_others - teacher.scale * teacher_cosines

    def function(tile: Tile) -> tuple[Tensor, ...]:
        scores, teacher_scores = tile.scores
        own, teacher_own, margin = (value.unsqueeze(1) for value in tile.row_values)
        gaps = tile.shared[1] * (teacher_scores - teacher_own)
        # log p_ij is the gap less the normaliser of the gaps, 1 + e^m.
        shares = (gaps - softplus(margin)).exp().detach()
        terms = shares * (gaps.detach() - tile.shared[0] * (scores - own))
        return (terms.masked_fill(tile.positive, 0),)

    (expected,) = pairs.reduce(
        Reduction(function, rows=(SUM,), columns=()),
        [rows, left],
        [right, right],
        row_values=[cosines, teacher_cosines, teacher_margins],
        shared=[scale, teacher.scale],
    )
    return expected + softplus(margins) - softplus(teacher_margins)


def _own_cosines(rows: Tensor, columns: Tensor) -> Tensor:
    return (widened(rows) * widened(columns)).sum(1)


FORMS: dict[str, Form] = {
    "similarity": similarity,
    "features": features,
    "interactive": interactive,
    "cross": cross,
}
