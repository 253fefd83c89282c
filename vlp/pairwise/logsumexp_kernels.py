"""Triton kernels of log-sum-exps over score tiles, and of their gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from vlp.pairwise.kernels import SIZES, block_and_span, entries, meets_pairs, products, sum_of_lines

# A sum of exponentials below this may have lost more than 2^−24 of itself by underflow, since each
# of its terms, at most 128·SPAN, lost 2^−126 at most.
FLOOR = tl.constexpr(2.0**-90)


@triton.jit(do_not_specialize=SIZES)
def logsumexp_kernel(
    x,
    t,
    scale,  # []
    shift,  # []
    column_values,  # [n]
    row_total,  # [spans, rows]
    column_total,  # [row blocks, columns]
    row_start,
    row_stop,
    column_start,
    column_stop,
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
    length: tl.constexpr = SPAN * BN
    block, span = block_and_span(row_start, row_stop, column_start, column_stop, BM, length)
    first_row, start = row_start + block * BM, column_start + span * length
    factor, addend = tl.load(scale), -tl.load(shift)
    n_rows, n_columns = row_stop - row_start, column_stop - column_start
    totals = tl.zeros((BN // 16, 8, BM), dtype=tl.float32)

    for first in range(start, min(start + length, column_stop), BN):
        z = entries(
            x, t, factor, addend, column_values, first_row, first, row_stop, column_stop, offset,
            D, MASKED, DESCRIPTORS, BM, BN, BK,
        )  # fmt: skip
        e = tl.exp2(z)
        totals += sum_of_lines(e, BM, BN)
        if COLUMNS:
            columns = first + tl.arange(0, BN)
            place = block.to(tl.int64) * n_columns + (columns - column_start)
            tl.store(column_total + place, tl.sum(e, 1), mask=columns < column_stop)

    # These rows over these columns only: the caller merges the spans.
    rows = first_row + tl.arange(0, BM)
    total = tl.sum(tl.sum(totals, 0), 0)
    place = span.to(tl.int64) * n_rows + (rows - row_start)
    tl.store(row_total + place, total, mask=rows < row_stop)


@triton.jit(do_not_specialize=SIZES)
def careful_kernel(
    x,
    t,
    scale,
    column_values,
    row_total,  # [spans, rows]
    row_shift,
    column_total,  # [row blocks, columns]
    column_shift,
    row_start,
    row_stop,
    column_start,
    column_stop,
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
    length: tl.constexpr = SPAN * BN
    block, span = block_and_span(row_start, row_stop, column_start, column_stop, BM, length)
    first_row, start = row_start + block * BM, column_start + span * length
    stop = min(start + length, column_stop)
    factor = tl.load(scale)
    n_rows, n_columns = row_stop - row_start, column_stop - column_start

    rows = first_row + tl.arange(0, BM)
    row_place = span.to(tl.int64) * n_rows + (rows - row_start)
    total = tl.load(row_total + row_place, mask=rows < row_stop, other=float("inf"))
    if tl.min(total, 0) < FLOOR:
        # An online log-sum-exp: Σ 2^z = total · 2^highest.
        highest = tl.full((BM,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BM,), dtype=tl.float32)
        for first in range(start, stop, BN):
            z = entries(
                x, t, factor, 0.0, column_values, first_row, first, row_stop, column_stop, offset,
                D, MASKED, DESCRIPTORS, BM, BN, BK,
            )  # fmt: skip
            new = tl.maximum(highest, tl.max(z, 0))
            shift = _or_zero(new)
            total = total * tl.exp2(highest - shift) + tl.sum(tl.exp2(z - shift[None, :]), 0)
            highest = new
        tl.store(row_total + row_place, total, mask=rows < row_stop)
        tl.store(row_shift + row_place, highest, mask=rows < row_stop)

    # All columns are looked at together: one tile's after another's would take most of the time.
    if COLUMNS:
        span_columns = start + tl.arange(0, length)
        span_place = block.to(tl.int64) * n_columns + (span_columns - column_start)
        span_there = span_columns < column_stop
        totals = tl.load(column_total + span_place, mask=span_there, other=float("inf"))
        if tl.min(totals, 0) < FLOOR:
            for first in range(start, stop, BN):
                columns = first + tl.arange(0, BN)
                place = block.to(tl.int64) * n_columns + (columns - column_start)
                there = columns < column_stop
                part = tl.load(column_total + place, mask=there, other=float("inf"))
                if tl.min(part, 0) < FLOOR:
                    z = entries(
                        x, t, factor, 0.0, column_values, first_row, first, row_stop, column_stop,
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
    scale,  # [K]
    column_values,
    row_statistic,  # [b, K], log₂ Σ_j 2^{z_ij}
    row_weight,  # [b, K]
    column_statistic,  # [n, K]
    column_weight,  # [n, K]
    dz_out,  # descriptor of [rows, columns], which begins at row_start and column_start
    row_start,
    row_stop,
    column_start,
    column_stop,
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
    # Numbers within the chunk, which begin at multiples of a tile: those of the block would take
    # registers that are not there.
    first_row, first_column = tl.program_id(0) * BM, tl.program_id(1) * BN
    rows, columns = first_row + tl.arange(0, BM), first_column + tl.arange(0, BN)
    here, there = rows < row_stop - row_start, columns < column_stop - column_start
    s = products(
        x, t, row_start + first_row, column_start + first_column, row_stop, column_stop,
        D, DESCRIPTORS, BM, BN, BK,
    )  # fmt: skip
    row_statistic += row_start * K
    row_weight += row_start * K
    column_statistic += column_start * K
    column_weight += column_start * K
    column_values += column_start

    dz = tl.zeros((BM, BN), dtype=tl.float32)
    for m in tl.static_range(K):
        z = s * tl.load(scale + m)
        if MASKED:
            z += tl.load(column_values + columns, mask=there, other=0.0)[None, :]
        statistic = tl.load(row_statistic + rows * K + m, mask=here, other=0.0)
        weight = tl.load(row_weight + rows * K + m, mask=here, other=0.0)
        dz += weight[:, None] * tl.exp2(z - statistic[:, None])
        if COLUMNS:
            statistic = tl.load(column_statistic + columns * K + m, mask=there, other=0.0)
            weight = tl.load(column_weight + columns * K + m, mask=there, other=0.0)
            dz += weight[None, :] * tl.exp2(z - statistic[None, :])

    # The descriptor drops what lies past the ends.
    gap = offset + row_start - column_start
    if meets_pairs(first_row, first_column, gap, BM, BN):
        dz = tl.where(rows[:, None] + gap == columns[None, :], 0.0, dz)
    dz_out.store([first_row, first_column], dz.to(dz_out.dtype))
