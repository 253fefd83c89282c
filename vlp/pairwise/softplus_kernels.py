"""Triton kernels of the sigmoid loss over score tiles, and of its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from vlp.pairwise.kernels import SIZES, entries, meets_pairs, products, sum_of_lines


@triton.jit(do_not_specialize=SIZES)
def softplus_kernel(
    x,
    t,
    scalars,  # scale and bias
    row_total,  # [spans, n_rows]
    n_rows,
    n_columns,
    offset,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Σ_j log₂(1 + 2^{z_ij}) of BM rows over SPAN column tiles."""
    block, span = tl.program_id(0), tl.program_id(1)
    first_row = block * BM
    scale, bias = tl.load(scalars), tl.load(scalars + 1)
    totals = tl.zeros((BN // 16, 8, BM), dtype=tl.float32)

    start = span * SPAN * BN
    for first in range(start, min(start + SPAN * BN, n_columns), BN):
        z = entries(
            x, t, scale, bias, scalars, first_row, first, n_rows, n_columns, offset,
            D, False, DESCRIPTORS, BM, BN, BK,
        )  # fmt: skip
        # max(z, 0) + log(1 + e^{−|z|}): log(1 + e^z) is off by 1e-3 at −10, where SigLIP starts.
        values = tl.maximum(z, 0.0) + _log2_1p(tl.exp2(-tl.abs(z)))
        totals += sum_of_lines(values, BM, BN)

    rows = first_row + tl.arange(0, BM)
    total = tl.sum(tl.sum(totals, 0), 0)
    tl.store(row_total + span.to(tl.int64) * n_rows + rows, total, mask=rows < n_rows)


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
    row_weight,  # [n_rows]
    dz_out,  # descriptor of [n_rows, n_columns]
    sums,  # [row blocks, column blocks]
    n_rows,
    n_columns,
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
    s = products(x, t, first_row, first_column, n_rows, n_columns, D, DESCRIPTORS, BM, BN, BK)

    # σ = (1 + 2^{−z})^{−1}: the square of a reciprocal root needs fewer instructions than a
    # division. Rows past the end have no weight.
    weight = tl.load(row_weight + rows, mask=rows < n_rows, other=0.0)
    root = tl.rsqrt(1.0 + tl.exp2(-tl.load(scalars + 1) - s * tl.load(scalars)))
    dz = weight[:, None] * (root * root)
    at_end = first_column + BN > n_columns
    if at_end | meets_pairs(first_row, first_column, offset, BM, BN):
        is_pair = rows[:, None] + offset == columns[None, :]
        dz = tl.where((columns[None, :] < n_columns) & (is_pair == 0), dz, 0.0)

    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + place, tl.sum(tl.sum(dz, 1), 0))
    dz_out.store([first_row, first_column], dz.to(dz_out.dtype))
