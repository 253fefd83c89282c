"""Products of embeddings, and of score gradients with embeddings: which numbers are multiplied.

On a CPU all operands are widened to the accumulation dtype first. On a device bfloat16 operands
stay as they are: the product of two of them is exact in float32, so that the tensor cores give the
same scores, accumulated in float32, about ten times faster. What is rounded there, and only there,
is the gradient of a score when it becomes an operand of the backward products: to bfloat16, 2⁻⁹ of
each entry at most. Those of the positives, the largest of their rows, are kept apart in float32.

float16 rows are widened everywhere: score gradients of 1/(2B) times a probability would vanish in
it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlp.pairwise import reduction
from vlp.pairwise.diagonal import Diagonal
from vlp.pairwise.reduction import Tile, widened


def is_narrow(rows: Tensor) -> bool:
    """Whether rows are multiplied in bfloat16."""
    return rows.dtype == torch.bfloat16 and reduction.on_device(rows)


def operand(rows: Tensor) -> Tensor:
    """Rows as they are multiplied."""
    return rows if is_narrow(rows) else widened(rows)


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left·right of two operands into `out`, in the accumulation dtype."""
    if left.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left, right, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left·right of two operands."""
    if left.dtype == torch.bfloat16:
        torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
    else:
        total.addmm_(left, right)


def add_gradients(
    d_left: Tensor | None,  # [m, D] in the accumulation dtype
    d_right: Tensor | None,  # [n, D]
    d_scores: Tensor,  # [m, n]
    left: Tensor,  # [m, D] operand
    right: Tensor,  # [n, D] operand
    tile: Tile,
) -> None:
    """d_left += d_scores·right and d_right += d_scoresᵀ·left, where they are wanted."""
    if left.dtype == torch.bfloat16:
        _add_positives(d_left, d_right, d_scores, left, right, tile)
        d_scores = d_scores.to(torch.bfloat16)
        Diagonal(tile, *d_scores.shape).fill(d_scores, 0.0)

    if d_left is not None:
        add_product(d_left, d_scores, right)
    if d_right is not None:
        add_product(d_right, d_scores.T, left)


def _add_positives(
    d_left: Tensor | None,
    d_right: Tensor | None,
    d_scores: Tensor,
    left: Tensor,
    right: Tensor,
    tile: Tile,
) -> None:
    """The part of each row's own pair, in float32."""
    diagonal = Diagonal(tile, *d_scores.shape)
    if not diagonal.present:
        return

    rows, columns = diagonal.places(d_scores)
    own = d_scores.diagonal(diagonal.offset).unsqueeze(1)
    if d_left is not None:
        d_left[rows] += own * right[columns]
    if d_right is not None:
        d_right[columns] += own * left[rows]


def in_students_dtype(student: Tensor, teacher: Tensor) -> Tensor:
    """Rows without gradient, in bfloat16 where the student's are multiplied in it.

    Stored float32 rows would widen every product with them, and cost ten times the student's own.
    """
    constant = not teacher.requires_grad
    return teacher.to(student.dtype) if constant and is_narrow(student) else teacher
