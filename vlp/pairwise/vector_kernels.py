"""Triton kernels of what lies around the tiles: vectors of b and n numbers, and finished gradients.

Each does in one launch what took ten to thirty of torch's: at B = 1,024 launches are nearly all of
the loss's time. Where rows and columns need the same, the second axis of the grid says which.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that change from launch to launch: a kernel of its own for each would be compiled often.
MERGED = ["n_row_parts", "n_rows", "n_column_parts", "n_columns", "rows_again", "columns_again"]

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["n_rows", "n_columns", "offset"])
def pairs_kernel(
    x,
    t,
    scale,  # [] float32
    bias,  # [] float32
    positive,  # [b] float64
    n_rows,
    n_columns,
    offset,
    BIASED: tl.constexpr,
    D: tl.constexpr,
    LINES: tl.constexpr,
    BK: tl.constexpr,
):
    """scale·x_i·t_{i + offset} (+ bias) of LINES rows; 0 where that is no column of this block."""
    rows = tl.program_id(0) * LINES + tl.arange(0, LINES)
    depth = tl.arange(0, BK)[None, :]
    paired = (rows < n_rows) & (rows + offset >= 0) & (rows + offset < n_columns)
    # int64: rows × D passes 2³¹ at large batches.
    from_x = x + rows.to(tl.int64)[:, None] * D + depth
    from_t = t + (rows + offset).to(tl.int64)[:, None] * D + depth

    total = tl.zeros((LINES,), dtype=tl.float32)
    for k in range(0, D, BK):
        inside = paired[:, None] & (depth < D - k)
        a = tl.load(from_x + k, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(from_t + k, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(a * b, 1)

    z = tl.load(scale).to(tl.float64) * total.to(tl.float64)
    if BIASED:
        z = tl.where(paired, z + tl.load(bias).to(tl.float64), z)
    tl.store(positive + rows, z, mask=rows < n_rows)


@triton.jit(do_not_specialize=MERGED)
def merge_kernel(
    row_total,  # [parts, rows] float32: sums, to be multiplied by 2^shift
    row_shift,
    by_row,  # [rows] float64, written
    column_total,
    column_shift,
    by_column,
    n_row_parts,
    n_rows,
    n_column_parts,
    n_columns,
    rows_again,  # 1 where by_row holds the log-sum-exps of earlier launches, else 0
    columns_again,
    LINES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """log Σ total·2^shift over the parts, −∞ where all are empty, joined with earlier launches'."""
    if tl.program_id(1) == 0:
        _merge(row_total, row_shift, by_row, n_row_parts, n_rows, rows_again, LINES, PARTS)
    else:
        _merge(
            column_total, column_shift, by_column, n_column_parts, n_columns, columns_again,
            LINES, PARTS,
        )  # fmt: skip


@triton.jit
def _merge(
    total,
    shift,
    result,
    n_parts,
    n_lines,
    again,
    LINES: tl.constexpr,
    PARTS: tl.constexpr,
):
    lines = tl.program_id(0) * LINES + tl.arange(0, LINES)
    here = lines < n_lines

    # float32 in a part: nearly all factors are 1, and what underflows is no part of the sum.
    highest = tl.full((LINES,), float("-inf"), dtype=tl.float32)
    merged = tl.zeros((LINES,), dtype=tl.float64)
    for first in range(0, n_parts, PARTS):
        parts = first + tl.arange(0, PARTS)
        place = parts[:, None].to(tl.int64) * n_lines + lines[None, :]
        inside = (parts < n_parts)[:, None] & here[None, :]
        values = tl.load(total + place, mask=inside, other=0.0)
        shifts = tl.load(shift + place, mask=inside, other=float("-inf"))

        new = tl.maximum(highest, tl.max(shifts, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        scaled = values * tl.exp2(shifts - base[None, :])
        merged = merged * tl.exp2(highest - base).to(tl.float64)
        merged += tl.sum(scaled.to(tl.float64), 0)
        highest = new

    # float64: at a scale of 100 float32 would round each merge by 4e-6.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    logarithm = (tl.log2(merged) + base.to(tl.float64)) * LN_2
    earlier = tl.load(result + lines, mask=lines < n_lines * again, other=float("-inf"))
    top = tl.maximum(logarithm, earlier)
    top = tl.where(top == float("-inf"), 0.0, top)
    both = tl.exp(logarithm - top) + tl.exp(earlier - top)
    tl.store(result + lines, tl.log(both) + top, mask=here)


@triton.jit(do_not_specialize=["n_rows", "n_columns", "multiple", "k"])
def weights_kernel(
    row_logsumexp,  # [b] float64
    row_upstream,  # [b] float64
    row_statistic,  # [b, K] float32, written at k
    row_weight,
    column_logsumexp,
    column_upstream,
    column_statistic,
    column_weight,
    largest,  # [] float64
    n_rows,
    n_columns,
    multiple,
    k,
    K: tl.constexpr,
    LINES: tl.constexpr,
):
    """What `logsumexp_weights_kernel` reads: log₂ Σ_j 2^{z_ij} and its weight in ∂/∂z."""
    if tl.program_id(1) == 0:
        _weights(
            row_logsumexp, row_upstream, row_statistic, row_weight, largest, n_rows, multiple, k,
            K, LINES,
        )  # fmt: skip
    else:
        _weights(
            column_logsumexp, column_upstream, column_statistic, column_weight, largest, n_columns,
            multiple, k, K, LINES,
        )  # fmt: skip


@triton.jit
def _weights(
    logsumexp,
    upstream,
    statistic,
    weight,
    largest,
    n_lines,
    multiple,
    k,
    K: tl.constexpr,
    LINES: tl.constexpr,
):
    lines = tl.program_id(0) * LINES + tl.arange(0, LINES)
    here = lines < n_lines
    logarithm = tl.load(logsumexp + lines, mask=here, other=0.0) * LOG2_E
    # +∞ for an empty sum: 2^{z − statistic} is 0 there and not NaN.
    logarithm = tl.where(logarithm == float("-inf"), float("inf"), logarithm)
    share = tl.load(upstream + lines, mask=here, other=0.0) / tl.load(largest)
    tl.store(statistic + lines * K + k, logarithm.to(tl.float32), mask=here)
    tl.store(weight + lines * K + k, (share * multiple).to(tl.float32), mask=here)


@triton.jit(do_not_specialize=["n_rows", "n_columns", "offset"])
def gradients_kernel(
    x,  # [b, D]
    t,  # [n, D]
    dx,  # [b, D] float32: dz·t
    dt,  # [n, D] float32: dzᵀ·x
    dx_out,  # in the dtype of x; may be dx itself
    dt_out,
    upstream,  # [b] float64, of the positives
    largest,  # [] float64
    scale,  # [] float32
    products,  # [row blocks] float64
    n_rows,
    n_columns,
    offset,
    D: tl.constexpr,
    LINES: tl.constexpr,
    BK: tl.constexpr,
):
    """Add the positives' part to dX and dT, and scale and round them; Σ_ij dz_ij·s_ij by block.

    Positives are no part of dz: the largest entry of a row would be rounded to the inputs' dtype.
    """
    if tl.program_id(1) == 0:
        total = _finish(
            x, t, dx, dx_out, upstream, largest, scale, n_rows, n_columns, offset, 0,
            D, LINES, BK,
        )  # fmt: skip
        if tl.program_id(0) * LINES < n_rows:
            tl.store(products + tl.program_id(0), total)
    else:
        _finish(
            t, x, dt, dt_out, upstream, largest, scale, n_columns, n_rows, -offset, -offset,
            D, LINES, BK,
        )  # fmt: skip


@triton.jit
def _finish(
    own,
    other,
    gradient,
    result,
    upstream,
    largest,
    scale,
    n_lines,
    n_others,
    offset,  # from a line to its pair
    row_offset,  # from a line to the row whose pair this is
    D: tl.constexpr,
    LINES: tl.constexpr,
    BK: tl.constexpr,
):
    lines = tl.program_id(0) * LINES + tl.arange(0, LINES)
    pairs = lines + offset
    here = lines < n_lines
    paired = here & (pairs >= 0) & (pairs < n_others)

    unit = tl.load(largest)
    weight = tl.load(upstream + lines + row_offset, mask=paired, other=0.0) / unit
    weight = weight.to(tl.float32)[:, None]
    factor = unit.to(tl.float32) * tl.load(scale)

    depth = tl.arange(0, BK)[None, :]
    place = lines.to(tl.int64)[:, None] * D + depth
    pair_place = pairs.to(tl.int64)[:, None] * D + depth
    total = tl.zeros((LINES,), dtype=tl.float64)
    for k in range(0, D, BK):
        inside = here[:, None] & (depth < D - k)
        pair_inside = paired[:, None] & (depth < D - k)
        values = tl.load(gradient + place + k, mask=inside, other=0.0)
        partner = tl.load(other + pair_place + k, mask=pair_inside, other=0.0)
        values += weight * partner.to(tl.float32)

        # What the scale receives is a small difference of large sums: float64.
        itself = tl.load(own + place + k, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum((values * itself).to(tl.float64), 1)
        tl.store(result + place + k, (values * factor).to(result.dtype.element_ty), mask=inside)
    return tl.sum(total, 0)
