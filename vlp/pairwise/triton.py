"""Triton's way to compute the log-sum-exps of InfoNCE and the sigmoid loss.

The score GEMM is fused with what follows it, and no float32 score ever leaves the chip:

    forward   one kernel streams z tiles and writes row and column sums only (2B²D FLOPs); another
              reads them and repeats, with shifts of their own, the few that underflowed;
    backward  one kernel recomputes z tiles and writes dz of a CHUNK of the matrix in the inputs'
              dtype; two library GEMMs add it to dX and dT while it is in cache (6B²D).

A kernel that kept dX and dT accumulators on the chip would have to compute z once for each of them
(10B²D in all). The positives are no part of dz: they are added to dX and dT in float32, so that
the largest entry of a row is not rounded to the inputs' dtype.

Inputs bfloat16, float16 or float32, accumulation in float32. Other reductions take the tiled path.
Rows of a length that Hopper's copy engine refuses (D·itemsize no multiple of 16 bytes) are copied
with zeros at their end, which costs the memory of the embeddings once more.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from vlp.pairwise import tiled
from vlp.pairwise.launches import LOG2_E, Launches
from vlp.pairwise.reduction import (
    LOGSUMEXP,
    Block,
    Reduction,
    empty_statistic,
    merge,
    without_empty,
)
from vlp.pairwise.tiled import Kept, slices

__all__ = ["check_device", "gradients", "reduce", "supports"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Rows × columns of a forward launch: bounds the partial sums of columns, 8 MiB.
FORWARD = (8192, 32768)
# Rows × columns of dz that exist at once: 128 MiB in bfloat16, as much as the two float32 gradients
# at B = 32,768, D = 512. At 4,096, which fits the L2, launches took longer than what they launched.
CHUNK = (8192, 8192)


def check_device() -> None:
    """ValueError where the kernels cannot run."""
    if not (torch.cuda.is_available() or INTERPRETED):
        raise ValueError(
            "impl: 'triton' needs a CUDA device and found none; choose auto, tiled or dense"
        )


def supports(reduction: Reduction, block: Block) -> bool:
    """Whether a kernel computes this; what it does not takes the tiled path."""
    # The kernels know no float64, and no column values in the sigmoid loss.
    x = block.left[0]
    masked_softplus = reduction.fused == "softplus" and bool(block.column_values)
    known = bool(reduction.fused or reduction.multiples) and not masked_softplus
    return known and x.dtype != torch.float64 and (x.is_cuda or INTERPRETED)


def reduce(reduction: Reduction, block: Block, kept: Kept, tile_size: int = 0) -> list[Tensor]:
    """Row statistics, then column statistics, in float64 (see `tiled.reduce`).

    No tile is kept. Exponentials kept in bfloat16 were tried: the store takes 32 KiB more of shared
    memory, so that one program a multiprocessor is left, to save a quarter of the products at most.
    """
    if not supports(reduction, block):
        return tiled.reduce(reduction, block, kept, tile_size)

    n_rows, n_columns = block.shape
    sizes = [n_rows] * len(reduction.rows) + [n_columns] * len(reduction.columns)
    device = block.left[0].device
    totals = [empty_statistic(kind, n, device) for kind, n in zip(reduction.kinds, sizes)]
    # Torch has no maximum of nothing.
    if not (n_rows and n_columns):
        return totals

    launches = Launches(reduction, block, tile_size)
    if launches.softplus:
        _sum_softplus(totals[0], launches)
    else:
        for k, shift in enumerate(launches.shifts().unbind()):
            by_column = totals[_first_column(reduction) + k] if reduction.columns else None
            _sum_exponentials(totals[k], by_column, launches, k, shift)
    _write_positives(totals[_positive(reduction)], launches, block)
    return totals


def _sum_softplus(total: Tensor, launches: Launches) -> None:
    """Write the rows' sums."""
    for rows in slices(len(launches.x), FORWARD[0]):
        for columns in slices(len(launches.t), FORWARD[1]):
            total[rows] += launches.softplus_sums(rows, columns)


def _sum_exponentials(
    by_row: Tensor, by_column: Tensor | None, launches: Launches, k: int, shift: Tensor
) -> None:
    """Write the log-sum-exps of multiple k."""
    for rows in slices(len(launches.x), FORWARD[0]):
        for columns in slices(len(launches.t), FORWARD[1]):
            row_part, column_part = launches.log_sums(k, shift, rows, columns)
            by_row[rows] = merge(LOGSUMEXP, by_row[rows], row_part)
            if by_column is not None:
                by_column[columns] = merge(LOGSUMEXP, by_column[columns], column_part)


def _write_positives(positive: Tensor, launches: Launches, block: Block) -> None:
    """z_ii where the row's own pair is a column of this block; elsewhere 0 stands."""
    rows, columns = _pairs(block)
    if rows.start == rows.stop:
        return
    z = block.shared[0].double() * launches.pair_scores(rows, columns)
    if launches.softplus:
        z = z + block.shared[1]
    for values in block.column_values:
        z = z + values[columns]
    positive[rows] = z


def gradients(
    reduction: Reduction,
    block: Block,
    statistics: list[Tensor],
    upstream: list[Tensor],
    kept: Kept,
    needed: Sequence[bool],
    tile_size: int = 0,
) -> list[Tensor | None]:
    """Gradients with respect to `block.tensors`, in that order (see `tiled.gradients`).

    Column values are constants: they receive none.
    """
    if not supports(reduction, block):
        return tiled.gradients(reduction, block, statistics, upstream, kept, needed, tile_size)

    # dz is written in the inputs' dtype, so it is computed for weights of at most 1.
    unit, weights = _normalised(upstream)
    launches = Launches(reduction, block, tile_size)
    x, t = block.left[0], block.right[0]
    dx, dt = _pair_gradients(block, weights[_positive(reduction)])

    dz_of = _Weights(reduction, launches, statistics, weights)
    for rows in slices(len(x), CHUNK[0]):
        for columns in slices(len(t), CHUNK[1]):
            dz = dz_of.chunk(rows, columns)
            _accumulate(dx[rows], dz, t[columns])
            _accumulate(dt[columns], dz.T, x[rows])

    # Its memory serves the gradients in the inputs' dtype.
    dz_sum = dz_of.sum
    del dz, dz_of

    # z = scale·s: so far dx and dt hold the sums for dz, not for ds.
    shared = [_inner_product(dx, x) * unit]
    if launches.softplus:
        pair_sum = weights[_positive(reduction)][_pairs(block)[0]].sum()
        shared.append((dz_sum + pair_sum) * unit)

    factor = unit * block.shared[0].float()
    constants = [None] * len(block.column_values)
    results = [dx.mul_(factor), dt.mul_(factor), *constants, *shared]
    return [
        gradient.to(tensor.dtype) if wanted and gradient is not None else None
        for gradient, tensor, wanted in zip(results, block.tensors, needed)
    ]


class _Weights:
    """dz of one chunk after another, in memory that is used again."""

    def __init__(
        self,
        reduction: Reduction,
        launches: Launches,
        statistics: list[Tensor],
        weights: list[Tensor],  # upstream, at most 1
    ) -> None:
        self.launches = launches
        n, first = len(launches.multiples), _first_column(reduction)
        self.row_weight = weights[0]
        self.sum = weights[0].new_zeros(())  # of all chunks so far, for the sigmoid loss's bias
        self.by_row = _by_multiple(launches, statistics[:n], weights[:n])
        # In one direction the kernel reads no column; it is given the rows' for want of others.
        self.by_column = self.by_row
        if reduction.columns:
            self.by_column = _by_multiple(launches, statistics[first:], weights[first:])

        # Rows of whole 16 bytes, for the copy engine.
        x, t = launches.x, launches.t
        n_rows, n_columns = min(len(x), CHUNK[0]), min(len(t), CHUNK[1])
        self.memory = x.new_empty(n_rows, -(-n_columns // 8) * 8)

    def chunk(self, rows: slice, columns: slice) -> Tensor:
        """dz [rows, columns] in the inputs' dtype, 0 at own pairs."""
        dz = self.memory[: rows.stop - rows.start, : columns.stop - columns.start]
        if self.launches.softplus:
            self.sum += self.launches.softplus_weights(rows, columns, dz, self.row_weight)
        else:
            self.launches.logsumexp_weights(rows, columns, dz, self.by_row, self.by_column)
        return dz


def _by_multiple(
    launches: Launches, statistics: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Statistics to base 2, and ∂/∂z of them times their weights; [K, size] float32."""
    logs = [without_empty(statistic) * LOG2_E for statistic in statistics]
    inner = [weight * multiple for weight, multiple in zip(weights, launches.multiples)]
    return torch.stack(logs).float(), torch.stack(inner).float()


def _pair_gradients(block: Block, weight: Tensor) -> tuple[Tensor, Tensor]:
    """dX and dT so far, float32: what the positives add, and 0 elsewhere.

    They are no part of dz: the largest entry of a row would be rounded to the inputs' dtype.
    """
    x, t = block.left[0], block.right[0]
    dx, dt = (torch.zeros_like(matrix, dtype=torch.float32) for matrix in (x, t))
    rows, columns = _pairs(block)
    own_weight = weight[rows].unsqueeze(1)
    torch.mul(t[columns], own_weight, out=dx[rows])
    torch.mul(x[rows], own_weight, out=dt[columns])
    return dx, dt


def _pairs(block: Block) -> tuple[slice, slice]:
    """The rows whose own pair is a column of this block, and these columns; perhaps none."""
    if block.offset is None:
        return slice(0, 0), slice(0, 0)
    n_rows, n_columns = block.shape
    start = max(0, -block.offset)
    stop = max(start, min(n_rows, n_columns - block.offset))
    return slice(start, stop), slice(start + block.offset, stop + block.offset)


def _positive(reduction: Reduction) -> int:
    """Which statistic is the positive: the last of the rows'."""
    return len(reduction.rows) - 1


def _first_column(reduction: Reduction) -> int:
    """Which statistic is the first of the columns'."""
    return len(reduction.rows)


def _inner_product(first: Tensor, second: Tensor) -> Tensor:
    """Σ first·second in float64, without a second copy of either."""
    total = first.new_zeros((), dtype=torch.float64)
    for rows in slices(len(first), FORWARD[0]):
        total += (first[rows] * second[rows]).sum(dtype=torch.float64)
    return total


def _normalised(upstream: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The largest upstream weight, and all of them divided by it.

    1/(2B) times a probability would vanish in float16.
    """
    largest = torch.stack([weights.abs().max() for weights in upstream]).max()
    largest = torch.where(largest > 0, largest, 1)
    return largest.float(), [(weights / largest).float() for weights in upstream]


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a·b to the float32 total where it lies, not rounded to the inputs' dtype before."""
    if _widens(a):
        # The same tensor twice: only then does torch add without a copy of it.
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _widens(a: Tensor) -> bool:
    """Whether torch adds products of such matrices to a float32 total without widening them."""
    return a.is_cuda and a.dtype != torch.float32
