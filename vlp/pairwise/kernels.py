"""The Triton kernels of `vlp.pairwise.triton`.

All of them work on tiles of BM rows and BN columns of the scores

    z = log₂e · (scale·x·tᵀ + bias + column value)

computed BK of D at a time from x [b, D] and t [n, D]. Logarithms are to base 2 because the hardware
knows 2^z only. Column i + offset is row i's own pair, which takes no part; `UNPAIRED` says that
there are none.

A launch covers the rows from row_start to row_stop and the columns from column_start to
column_stop, all of them numbers of the whole block: so every launch takes the same x and t.

DESCRIPTORS: x and t are tensor descriptors, so that Hopper's copy engine fetches their tiles
without a register or an address of any thread. Older cards take pointers, D a multiple of 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

SPAN = 16  # column tiles that a program streams before it writes its row statistics
UNPAIRED = -(1 << 30)  # an offset that leads to no column
# Sizes change from slice to slice: a kernel compiled for their divisors would be compiled often.
SIZES = ["row_start", "row_stop", "column_start", "column_stop", "offset"]
GROUP_BLOCKS = tl.constexpr(64)  # row blocks side by side: 8 MiB of rows at D = 512, in L2


@triton.jit
def products(
    left,
    right,
    first_left,
    first_right,
    n_left,
    n_right,
    D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BL: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """left·rightᵀ of one tile [BL, BR], float32."""
    s = tl.zeros((BL, BR), dtype=tl.float32)
    if DESCRIPTORS:
        for k in range(0, D, BK):
            a, b = left.load([first_left, k]), right.load([first_right, k])
            # ieee: TF32 would round float32 inputs to 10 bits.
            s = tl.dot(a, tl.trans(b), s, input_precision="ieee")
    else:
        lines, others = first_left + tl.arange(0, BL), first_right + tl.arange(0, BR)
        depth = tl.arange(0, BK)[None, :]
        # int64: rows × D passes 2³¹ at large batches.
        from_left = left + lines[:, None].to(tl.int64) * D + depth
        from_right = right + others[:, None].to(tl.int64) * D + depth
        for k in range(0, D, BK):
            inside = depth < D - k
            a = tl.load(from_left + k, mask=(lines < n_left)[:, None] & inside, other=0.0)
            b = tl.load(from_right + k, mask=(others < n_right)[:, None] & inside, other=0.0)
            s = tl.dot(a, tl.trans(b), s, input_precision="ieee")
    return s


@triton.jit
def entries(
    x,
    t,
    scale,
    addend,
    column_values,
    first_row,
    first_column,
    row_stop,
    column_stop,
    offset,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """z of one tile on its side, [BN, BM] float32; −∞ past the ends and at the rows' own pairs."""
    s = products(t, x, first_column, first_row, column_stop, row_stop, D, DESCRIPTORS, BN, BM, BK)
    z = s * scale + addend
    column = tl.arange(0, BN)
    if MASKED:
        there = column < column_stop - first_column
        z += tl.load(column_values + first_column + column, mask=there, other=0.0)[:, None]

    # All threads of a program go the same way, and nearly all programs past this branch: masks in
    # every tile cost 17 instructions an entry.
    at_end = (first_row + BM > row_stop) | (first_column + BN > column_stop)
    if at_end | meets_pairs(first_row, first_column, offset, BM, BN):
        # Rows are numbered 8·high + low: high is a constant of each register, so that no register
        # need hold a row's number. The bound must seem to change with the column for the same end.
        high, low = tl.arange(0, BM // 8)[None, :, None] * 8, tl.arange(0, 8)[None, None, :]
        own_row = (column + (first_column - first_row - offset))[:, None, None] - low
        row_bound = tl.minimum(row_stop - first_row, row_stop + first_column) - low
        inside = (high < row_bound) & (column < column_stop - first_column)[:, None, None]
        real = inside & (high != own_row)
        z = tl.where(real, tl.reshape(z, (BN, BM // 8, 8)), float("-inf"))
        z = tl.reshape(z, (BN, BM))
    return z


@triton.jit
def block_and_span(row_start, row_stop, column_start, column_stop, BM: tl.constexpr, LENGTH):
    """Which rows and which LENGTH columns a program of a flat grid takes.

    Numbers of row blocks run fastest, within a group of them: the columns of a span are fetched
    once for the group, and its rows stay in L2 from span to span.
    """
    n_blocks = tl.cdiv(row_stop - row_start, BM)
    n_spans = tl.cdiv(column_stop - column_start, LENGTH)
    in_group = GROUP_BLOCKS * n_spans

    program = tl.program_id(0)
    first = program // in_group * GROUP_BLOCKS
    n_group = tl.minimum(n_blocks - first, GROUP_BLOCKS)
    place = program % in_group
    return first + place % n_group, place // n_group


@triton.jit
def meets_pairs(first_row, first_column, offset, BM: tl.constexpr, BN: tl.constexpr):
    """Whether a tile may hold own pairs."""
    gap = first_row + offset - first_column
    return (gap > -BM) & (gap < BN)


@triton.jit
def sum_of_lines(values, BM: tl.constexpr, BN: tl.constexpr):
    """[BN, BM] -> [BN / 16, 8, BM]: lines l and l + 8 of each 16 added, which one thread holds."""
    return tl.sum(tl.reshape(values, (BN // 16, 2, 8, BM)), 1)
