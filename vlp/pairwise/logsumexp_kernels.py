"""Triton kernels of log-sum-exps over score tiles, and of their gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from vlp.pairwise.kernels import SIZES, entries, meets_pairs, products, sum_of_lines

# A sum of exponentials below this may have lost more than 2^−24 of itself by underflow, since each
# of its terms, at most 128·SPAN, lost 2^−126 at most.
FLOOR = tl.constexpr(2.0**-90)


@triton.jit(do_not_specialize=SIZES)
def logsumexp_kernel(
    x,
    t,
    scalars,  # [2]: scale and −shift
    column_values,  # [n_columns]
    row_total,  # [spans, n_rows]
    column_total,  # [row blocks, n_columns]
    n_rows,
    n_columns,
    offset,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    SPAN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Σ 2^{z − shift} of BM rows over SPAN column tiles, and of those columns over the BM rows.

    One exponential an entry serves rows and columns, since the shift is the same for all. Tiles lie
    on their side: a column, which is final after one tile, is summed by four threads alone, and a
    row, which is summed over threads and warps, is so once a span.
    """
    block, span = tl.program_id(0), tl.program_id(1)
    first_row = block * BM
    scale, addend = tl.load(scalars), tl.load(scalars + 1)
    totals = tl.zeros((BN // 16, 8, BM), dtype=tl.float32)

    start = span * SPAN * BN
    for first in range(start, min(start + SPAN * BN, n_columns), BN):
        z = entries(
            x, t, scale, addend, column_values, first_row, first, n_rows, n_columns, offset,
            D, MASKED, DESCRIPTORS, BM, BN, BK,
        )  # fmt: skip
        e = tl.exp2(z)
        totals += sum_of_lines(e, BM, BN)
        if COLUMNS:
            columns = first + tl.arange(0, BN)
            place = block.to(tl.int64) * n_columns + columns
            tl.store(column_total + place, tl.sum(e, 1), mask=columns < n_columns)

    # These rows over these columns only: the caller merges the spans.
    rows = first_row + tl.arange(0, BM)
    total = tl.sum(tl.sum(totals, 0), 0)
    tl.store(row_total + span.to(tl.int64) * n_rows + rows, total, mask=rows < n_rows)


@triton.jit(do_not_specialize=SIZES)
def careful_kernel(
    x,
    t,
    scalars,
    column_values,
    row_total,  # [spans, n_rows]
    row_shift,
    column_total,  # [row blocks, n_columns]
    column_shift,
    n_rows,
    n_columns,
    offset,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    SPAN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The sums of `logsumexp_kernel` once more where they underflowed, with shifts of their own.

    Rows take their running maximum, columns theirs. Where no sum lies below FLOOR, which is nearly
    everywhere, a program only reads its sums.
    """
    block, span = tl.program_id(0), tl.program_id(1)
    first_row, start = block * BM, span * SPAN * BN
    stop = min(start + SPAN * BN, n_columns)
    scale = tl.load(scalars)

    rows = first_row + tl.arange(0, BM)
    row_place = span.to(tl.int64) * n_rows + rows
    total = tl.load(row_total + row_place, mask=rows < n_rows, other=float("inf"))
    if tl.min(total, 0) < FLOOR:
        # An online log-sum-exp: Σ 2^z = total · 2^highest.
        highest = tl.full((BM,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BM,), dtype=tl.float32)
        for first in range(start, stop, BN):
            z = entries(
                x, t, scale, 0.0, column_values, first_row, first, n_rows, n_columns, offset,
                D, MASKED, DESCRIPTORS, BM, BN, BK,
            )  # fmt: skip
            new = tl.maximum(highest, tl.max(z, 0))
            shift = _or_zero(new)
            total = total * tl.exp2(highest - shift) + tl.sum(tl.exp2(z - shift[None, :]), 0)
            highest = new
        tl.store(row_total + row_place, total, mask=rows < n_rows)
        tl.store(row_shift + row_place, highest, mask=rows < n_rows)

    # All columns are looked at together: one tile's after another's would take most of the time.
    if COLUMNS:
        span_columns = start + tl.arange(0, SPAN * BN)
        span_place = block.to(tl.int64) * n_columns + span_columns
        span_there = span_columns < n_columns
        totals = tl.load(column_total + span_place, mask=span_there, other=float("inf"))
        if tl.min(totals, 0) < FLOOR:
            for first in range(start, stop, BN):
                columns = first + tl.arange(0, BN)
                place, there = block.to(tl.int64) * n_columns + columns, columns < n_columns
                part = tl.load(column_total + place, mask=there, other=float("inf"))
                if tl.min(part, 0) < FLOOR:
                    z = entries(
                        x, t, scale, 0.0, column_values, first_row, first, n_rows, n_columns,
                        offset, D, MASKED, DESCRIPTORS, BM, BN, BK,
                    )  # fmt: skip
                    top = tl.max(z, 1)
                    part = tl.sum(tl.exp2(z - _or_zero(top)[:, None]), 1)
                    tl.store(column_total + place, part, mask=there)
                    tl.store(column_shift + place, top, mask=there)


@triton.jit
def _or_zero(highest):
    """A maximum, with 0 for −∞: −∞ − −∞ would be NaN."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit(do_not_specialize=SIZES)
def logsumexp_weights_kernel(
    x,
    t,
    scalars,  # [K, 2]
    column_values,
    row_statistic,  # [K, n_rows], log₂ Σ_j 2^{z_ij}
    row_weight,  # [K, n_rows]
    column_statistic,  # [K, n_columns]
    column_weight,  # [K, n_columns]
    dz_out,  # descriptor of [n_rows, n_columns]
    n_rows,
    n_columns,
    offset,
    K: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """dz = Σ_k g^r_i 2^{z − r_i} + g^c_j 2^{z − c_j} of one tile; 0 at the rows' own pairs.

    An exponential each way is exact for every input; one for both would need the statistics of a
    tile to lie close together.
    """
    first_row, first_column = tl.program_id(0) * BM, tl.program_id(1) * BN
    rows, columns = first_row + tl.arange(0, BM), first_column + tl.arange(0, BN)
    here, there = rows < n_rows, columns < n_columns
    s = products(x, t, first_row, first_column, n_rows, n_columns, D, DESCRIPTORS, BM, BN, BK)

    dz = tl.zeros((BM, BN), dtype=tl.float32)
    for m in tl.static_range(K):
        z = s * tl.load(scalars + 2 * m)
        if MASKED:
            z += tl.load(column_values + columns, mask=there, other=0.0)[None, :]
        statistic = tl.load(row_statistic + m * n_rows + rows, mask=here, other=0.0)
        weight = tl.load(row_weight + m * n_rows + rows, mask=here, other=0.0)
        dz += weight[:, None] * tl.exp2(z - statistic[:, None])
        if COLUMNS:
            statistic = tl.load(column_statistic + m * n_columns + columns, mask=there, other=0.0)
            weight = tl.load(column_weight + m * n_columns + columns, mask=there, other=0.0)
            dz += weight[None, :] * tl.exp2(z - statistic[None, :])

    # The descriptor drops what lies past the ends.
    if meets_pairs(first_row, first_column, offset, BM, BN):
        dz = tl.where(rows[:, None] + offset == columns[None, :], 0.0, dz)
    dz_out.store([first_row, first_column], dz.to(dz_out.dtype))
