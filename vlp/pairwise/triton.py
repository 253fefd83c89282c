"""Triton's way to compute the log-sum-exps of InfoNCE and the sigmoid loss.

The score GEMM is fused with what follows it, and no float32 score ever leaves the chip:

    forward   one kernel streams z tiles and writes row and column sums only (2B²D FLOPs); another
              reads them and repeats, with shifts of their own, the few that underflowed;
    backward  one kernel recomputes z tiles and writes dz of a chunk of the matrix in the inputs'
              dtype; two library GEMMs add it to dX and dT (6B²D).

Few launches surround these (`vectors.py`): one merges partial sums, one prepares what the backward
reads of rows and columns, one finishes gradients.

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

from vlp.pairwise import tiled, vectors
from vlp.pairwise.launches import Launches
from vlp.pairwise.reduction import Block, Reduction
from vlp.pairwise.tiled import Kept, slices

__all__ = ["check_device", "gradients", "reduce", "supports"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Rows × columns of a forward launch: bounds the partial sums and their shifts, 64 MiB
# (128 for float32, whose tiles are smaller).
FORWARD = (32768, 32768)
# Rows of a chunk of dz, and its bytes: as many as the two float32 gradients take at B = 32,768,
# D = 512. Chunks of 32 MiB, which fit the L2, took the host longer to launch than the card to do.
CHUNK_ROWS, CHUNK_BYTES = 8192, 128 * 2**20
CHUNK_STEP = 128  # columns of a chunk come in multiples of this: whole tiles, and whole 16 bytes


def check_device() -> None:
    """ValueError where the kernels cannot run."""
    if not (torch.cuda.is_available() or INTERPRETED):
        raise ValueError(
            "impl: 'triton' needs a CUDA device and found none; choose auto, tiled or dense"
        )


def supports(reduction: Reduction, block: Block) -> bool:
    """Whether a kernel computes this; what it does not takes the tiled path."""
    # The kernels know no float64, no column values in the sigmoid loss, and no block of no pairs.
    x = block.left[0]
    masked_softplus = reduction.fused == "softplus" and bool(block.column_values)
    known = bool(reduction.fused or reduction.multiples) and not masked_softplus
    return (
        known and 0 not in block.shape and x.dtype != torch.float64 and (x.is_cuda or INTERPRETED)
    )


def reduce(reduction: Reduction, block: Block, kept: Kept, tile_size: int = 0) -> list[Tensor]:
    """Row statistics, then column statistics, in float64 (see `tiled.reduce`).

    No tile is kept. Exponentials kept in bfloat16 were tried: the store takes 32 KiB more of shared
    memory, so that one program a multiprocessor is left, to save a quarter of the products at most.
    """
    if not supports(reduction, block):
        return tiled.reduce(reduction, block, kept, tile_size)

    launches = Launches(reduction, block, tile_size)
    by_column: list[Tensor] = []
    if launches.softplus:
        by_row = [_softplus_sums(launches)]
    else:
        by_row, by_column = _log_sums(launches)

    bias = launches.shared[1] if launches.softplus else None
    positive = vectors.positives(launches.x, launches.t, launches.shared[0], bias, launches.offset)
    rows, columns = _pairs(block)
    for values in block.column_values:
        positive[rows] += values[columns]
    return [*by_row, positive, *by_column]


def _softplus_sums(launches: Launches) -> Tensor:
    """Σ_j log(1 + e^{z_ij}) of all rows."""
    total = launches.x.new_zeros(len(launches.x), dtype=torch.float64)
    for rows in slices(len(launches.x), FORWARD[0]):
        for columns in slices(len(launches.t), FORWARD[1]):
            total[rows] += launches.softplus_sums(rows, columns)
    return total


def _log_sums(launches: Launches) -> tuple[list[Tensor], list[Tensor]]:
    """The log-sum-exps of all rows, and those of all columns where they are wanted, by multiple."""
    by_row, by_column = [], []
    for multiple, shift in zip(launches.multiples, launches.shifts()):
        row_sums = launches.x.new_empty(len(launches.x), dtype=torch.float64)
        column_sums = None
        if launches.columns:
            column_sums = launches.t.new_empty(len(launches.t), dtype=torch.float64)
            by_column.append(column_sums)
        by_row.append(row_sums)

        for rows in slices(len(launches.x), FORWARD[0]):
            for columns in slices(len(launches.t), FORWARD[1]):
                launches.log_sums(multiple, shift, rows, columns, row_sums, column_sums)
    return by_row, by_column


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

    # dz is written in the inputs' dtype, so it is computed for weights of at most 1: 1/(2B) times
    # a probability would vanish in float16.
    largest = _largest(upstream)
    upstream = [weights.contiguous() for weights in upstream]
    launches = Launches(reduction, block, tile_size)

    dx, dt, dz_sum = _products(reduction, launches, statistics, upstream, largest)
    positive = upstream[_positive(reduction)]
    dx, dt, inner_product = vectors.finished(
        launches.x, launches.t, dx, dt, positive, largest, launches.shared[0], launches.offset
    )

    shared = [inner_product * largest]
    if dz_sum is not None:
        shared.append(dz_sum * largest + positive[_pairs(block)[0]].sum())

    # Columns of zeros at the end were added for descriptors.
    D = block.left[0].shape[1]
    constants = [None] * len(block.column_values)
    results = [dx[:, :D], dt[:, :D], *constants, *shared]
    return [
        gradient.to(tensor.dtype) if wanted and gradient is not None else None
        for gradient, tensor, wanted in zip(results, block.tensors, needed)
    ]


def _products(
    reduction: Reduction,
    launches: Launches,
    statistics: list[Tensor],
    upstream: list[Tensor],
    largest: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dz·t [b, D] and dzᵀ·x [n, D] in float32, and Σ dz for the sigmoid loss's bias."""
    x, t = launches.x, launches.t
    dx, dt = (torch.empty_like(matrix, dtype=torch.float32) for matrix in (x, t))
    dz_of = _Weights(reduction, launches, statistics, upstream, largest)

    # What comes first is written, not added: the totals need no zeros.
    for rows in slices(len(x), dz_of.n_rows):
        for columns in slices(len(t), dz_of.n_columns):
            dz = dz_of.chunk(rows, columns)
            _accumulate(dx[rows], dz, t[columns], is_first=columns.start == 0)
            _accumulate(dt[columns], dz.T, x[rows], is_first=rows.start == 0)
    return dx, dt, dz_of.sum()


class _Weights:
    """dz of one chunk after another, in memory that is used again."""

    def __init__(
        self,
        reduction: Reduction,
        launches: Launches,
        statistics: list[Tensor],
        upstream: list[Tensor],
        largest: Tensor,
    ) -> None:
        self.launches = launches
        x, t = launches.x, launches.t
        self.n_rows, self.n_columns = chunk_of(len(x), len(t), x.itemsize)
        # Rows of whole 16 bytes, for the copy engine.
        width = -(-self.n_columns // 8) * 8
        self.memory = x.new_empty(self.n_rows, width)

        if launches.softplus:
            row_weight = (upstream[0] / largest).float()
            self.arguments = launches.dz_arguments(self.memory, {"row_weight": row_weight})
            self.sums: list[Tensor] = []  # of chunks so far, by tile
            return
        parts = list(zip(statistics, upstream))
        n, first = len(launches.multiples), _first_column(reduction)
        weights = vectors.weights(launches.multiples, parts[:n], parts[first:], largest)
        self.arguments = launches.dz_arguments(self.memory, weights)

    def chunk(self, rows: slice, columns: slice) -> Tensor:
        """dz [rows, columns] in the inputs' dtype, 0 at own pairs."""
        if self.launches.softplus:
            self.sums.append(self.launches.softplus_weights(rows, columns, self.arguments))
        else:
            self.launches.logsumexp_weights(rows, columns, self.arguments)
        return self.memory[: rows.stop - rows.start, : columns.stop - columns.start]

    def sum(self) -> Tensor | None:
        """Σ dz of all chunks; none for log-sum-exps, where nothing needs it."""
        if not self.launches.softplus:
            return None
        return torch.cat(self.sums).sum(dtype=torch.float64)


def chunk_of(n_rows: int, n_columns: int, itemsize: int) -> tuple[int, int]:
    """Rows × columns of dz that exist at once: the whole matrix where it is small enough."""
    rows = min(n_rows, CHUNK_ROWS)
    fitting = CHUNK_BYTES // (itemsize * rows)
    return rows, min(n_columns, max(CHUNK_STEP, fitting // CHUNK_STEP * CHUNK_STEP))


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


def _largest(upstream: list[Tensor]) -> Tensor:
    """[] float64: the largest upstream weight; where all are 0, a number to divide by."""
    largest = torch.linalg.vector_norm(torch.cat(upstream), torch.inf, dtype=torch.float64)
    return largest.clamp_(min=1e-300)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, is_first: bool = False) -> None:
    """Add a·b to the float32 total where it lies, not rounded to the inputs' dtype before.

    `is_first`: write it there, whatever lies there.
    """
    beta = 0 if is_first else 1
    if _widens(a):
        # The same tensor twice: only then does torch add without a copy of it.
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, beta=beta, out=total)
    else:
        total.addmm_(a.float(), b.float(), beta=beta)


def _widens(a: Tensor) -> bool:
    """Whether torch adds products of such matrices to a float32 total without widening them."""
    return a.is_cuda and a.dtype != torch.float32
