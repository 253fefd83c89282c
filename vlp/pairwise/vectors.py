"""Launches of the Triton kernels over vectors, and over the gradients of both sides of a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from vlp.pairwise.vector_kernels import (
    gradients_kernel,
    merge_kernel,
    pairs_kernel,
    weights_kernel,
)

# Lines of a program, with the parts or the numbers of D that it takes at a time; and the lines of
# one that takes a number a line.
LINES, PARTS, DEPTH, MANY_LINES = 32, 64, 64, 1024

Parts = tuple[Tensor, Tensor]  # [parts, lines] float32: sums, and the powers of 2 they lack


def positives(
    x: Tensor,  # [b, D]
    t: Tensor,  # [n, D]
    scale: Tensor,  # [] float32
    bias: Tensor | None,  # [] float32
    offset: int,
) -> Tensor:
    """[b] float64: scale·x_i·t_{i + offset} (+ bias), 0 where that is no column here."""
    n_rows, D = x.shape
    positive = x.new_empty(n_rows, dtype=torch.float64)
    pairs_kernel[(triton.cdiv(n_rows, LINES),)](
        x,
        t,
        scale,
        scale if bias is None else bias,
        positive,
        n_rows,
        len(t),
        offset,
        BIASED=bias is not None,
        D=D,
        LINES=LINES,
        BK=DEPTH,
    )
    return positive


def merge(
    row_parts: Parts,
    by_row: Tensor,  # [rows] float64, written
    column_parts: Parts | None,
    by_column: Tensor,  # [columns] float64, written where there are parts of columns
    again: tuple[bool, bool],
) -> None:
    """Write log Σ total·2^shift over the parts.

    again: whether `by_row` and `by_column` hold log-sum-exps, which are to be joined with these.
    """
    rows, columns = row_parts[0], (column_parts or row_parts)[0]
    n_sides = 1 if column_parts is None else 2
    merge_kernel[(triton.cdiv(max(rows.shape[1], columns.shape[1]), LINES), n_sides)](
        *row_parts,
        by_row,
        *(column_parts or row_parts),
        by_column,
        *rows.shape,
        *columns.shape,
        int(again[0]),
        int(again[1]),
        LINES=LINES,
        PARTS=PARTS,
    )


def weights(
    multiples: Sequence[float],
    by_row: Sequence[tuple[Tensor, Tensor]],  # K log-sum-exps and their upstream weights, [b]
    by_column: Sequence[tuple[Tensor, Tensor]],  # [n], or none
    largest: Tensor,  # [] float64: of all upstream weights
) -> dict[str, Tensor]:
    """What the kernel of dz reads of each row [b, K] and of each column [n, K], float32."""
    # In one direction nothing reads a column; the kernels are given rows for want of others.
    columns_or_rows = by_column or by_row
    n_rows, n_columns = len(by_row[0][0]), len(columns_or_rows[0][0])
    n_sides = 2 if by_column else 1

    K = len(multiples)
    rows = largest.new_empty(2, n_rows, K, dtype=torch.float32).unbind()
    columns = rows
    if by_column:
        columns = largest.new_empty(2, n_columns, K, dtype=torch.float32).unbind()

    grid = (triton.cdiv(max(n_rows, n_columns), MANY_LINES), n_sides)
    for k, multiple in enumerate(multiples):
        weights_kernel[grid](
            *by_row[k],
            *rows,
            *columns_or_rows[k],
            *columns,
            largest,
            n_rows,
            n_columns,
            float(multiple),
            k,
            K=K,
            LINES=MANY_LINES,
        )
    return {
        "row_statistic": rows[0],
        "row_weight": rows[1],
        "column_statistic": columns[0],
        "column_weight": columns[1],
    }


def finished(
    x: Tensor,  # [b, D]
    t: Tensor,  # [n, D]
    dx: Tensor,  # [b, D] float32, for dz instead of dz·scale, without the positives
    dt: Tensor,  # [n, D]
    upstream: Tensor,  # [b] float64, of the positives
    largest: Tensor,  # [] float64
    scale: Tensor,  # [] float32
    offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dX and dT in the inputs' dtype, and Σ_ij dz_ij·s_ij."""
    (n_rows, D), n_columns = x.shape, len(t)
    products = x.new_empty(triton.cdiv(n_rows, LINES), dtype=torch.float64)

    # float32 gradients need no second copy.
    results = (dx, dt)
    if x.dtype != torch.float32:
        results = (torch.empty_like(x), torch.empty_like(t))
    gradients_kernel[(triton.cdiv(max(n_rows, n_columns), LINES), 2)](
        x,
        t,
        dx,
        dt,
        *results,
        upstream,
        largest,
        scale,
        products,
        n_rows,
        n_columns,
        offset,
        D=D,
        LINES=LINES,
        BK=DEPTH,
    )
    return *results, products.sum()
