"""Triton kernels of the sigmoid loss over score tiles, and of its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from vlp.pairwise.kernels import SIZES, block_and_span, entries, meets_pairs, products, sum_of_lines


@triton.jit(do_not_specialize=SIZES)
def softplus_kernel(
    x,
    t,
    scalars,  # scale and bias
    row_total,  # [spans, rows]
    row_start,
    row_stop,
    column_start,
    column_stop,
    offset,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Σ_j log₂(1 + 2^{z_ij}) of BM rows over SPAN column tiles."""
    length: tl.constexpr = SPAN * BN
    block, span = block_and_span(row_start, row_stop, column_start, column_stop, BM, length)
    first_row, start = row_start + block * BM, column_start + span * length
    scale, bias = tl.load(scalars), tl.load(scalars + 1)
    totals = tl.zeros((BN // 16, 8, BM), dtype=tl.float32)

    for first in range(start, min(start + length, column_stop), BN):
        z = entries(
            x, t, scale, bias, scalars, first_row, first, row_stop, column_stop, offset,
            D, False, DESCRIPTORS, BM, BN, BK,
        )  # fmt: skip
        # max(z, 0) + log(1 + e^{−|z|}): log(1 + e^z) is off by 1e-3 at −10, where SigLIP starts.
        values = tl.maximum(z, 0.0) + _log2_1p(tl.exp2(-tl.abs(z)))
        totals += sum_of_lines(values, BM, BN)

    rows = first_row + tl.arange(0, BM)
    total = tl.sum(tl.sum(totals, 0), 0)
    place = span.to(tl.int64) * (row_stop - row_start) + (rows - row_start)
    tl.store(row_total + place, total, mask=rows < row_stop)


@triton.jit
def _log2_1p(e):
    """log₂(1 + e) for e in [0, 1], with a relative error of 3e-7.

    e times the Chebyshev interpolant of log₂(1 + e)/e, of degree 7. A logarithm, and the division
    that makes it exact for small e, would take as many instructions as all the rest.
    """
    p = -0.012077020269607358 * e + 0.06274843357249996
    p = p * e - 0.15415200643415863
    p = p * e + 0.25517634921539684
    p = p * e - 0.3530963533416844
    p = p * e + 0.4800124607953167
    p = p * e - 0.7213067574280055
    p = p * e + 1.442694724590345
    return p * e


@triton.jit(do_not_specialize=SIZES)
def softplus_weights_kernel(
    x,
    t,
    scalars,  # scale and bias
    row_weight,  # [b]
    dz_out,  # descriptor of [rows, columns], which begins at row_start and column_start
    sums,  # [row blocks, column blocks]
    row_start,
    row_stop,
    column_start,
    column_stop,
    offset,
    D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """dz = g_i σ(z) of one tile, 0 at the rows' own pairs, and its sum."""
    first_row, first_column = tl.program_id(0) * BM, tl.program_id(1) * BN
    rows, columns = first_row + tl.arange(0, BM), first_column + tl.arange(0, BN)
    n_rows, n_columns = row_stop - row_start, column_stop - column_start
    s = products(
        x, t, row_start + first_row, column_start + first_column, row_stop, column_stop,
        D, DESCRIPTORS, BM, BN, BK,
    )  # fmt: skip

    # σ = (1 + 2^{−z})^{−1}: the square of a reciprocal root needs fewer instructions than a
    # division. Rows past the end have no weight.
    weight = tl.load(row_weight + row_start + rows, mask=rows < n_rows, other=0.0)
    root = tl.rsqrt(1.0 + tl.exp2(-tl.load(scalars + 1) - s * tl.load(scalars)))
    dz = weight[:, None] * (root * root)
    gap = offset + row_start - column_start
    at_end = first_column + BN > n_columns
    if at_end | meets_pairs(first_row, first_column, gap, BM, BN):
        is_pair = rows[:, None] + gap == columns[None, :]
        dz = tl.where((columns[None, :] < n_columns) & (is_pair == 0), dz, 0.0)

    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + place, tl.sum(tl.sum(dz, 1), 0))
    dz_out.store([first_row, first_column], dz.to(dz_out.dtype))
