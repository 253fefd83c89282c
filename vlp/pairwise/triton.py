"""Triton's way to compute the margin log-sum-exp and the sigmoid loss.

The score GEMM is fused with what follows it, and no float32 score ever leaves the chip:

    forward   one kernel streams z tiles and writes row and column statistics only (2B²D FLOPs);
    backward  one kernel recomputes z tiles and writes dz of a CHUNK of the matrix in the inputs'
              dtype; two library GEMMs turn it into dX and dT while it is in cache or nearly so
              (6B²D).

A kernel that kept dX and dT accumulators on the chip would have to compute z once for each of them
(10B²D in all). Inputs bfloat16, float16 or float32, accumulation in float32. Other reductions, and
masked columns, take the tiled path.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from vlp.pairwise import tiled
from vlp.pairwise.kernels import FULL, HALF, SPAN, compile_ahead, statistics_kernel, weights_kernel
from vlp.pairwise.reduction import SUM, Block, Reduction, empty_statistic, merge, without_empty
from vlp.pairwise.tiled import Kept, slices

__all__ = ["check_device", "compile_ahead", "gradients", "reduce", "supports"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Rows a launch: bounds the partial column statistics, FORWARD_ROWS / BM · n numbers.
FORWARD_ROWS = 8192
CHUNK = (4096, 8192)  # rows × columns of dz that exist at once: 64 MiB in bfloat16


def check_device() -> None:
    """ValueError where the kernels cannot run."""
    if not (torch.cuda.is_available() or INTERPRETED):
        raise ValueError(
            "impl: 'triton' needs a CUDA device and found none; choose auto, tiled or dense"
        )


def supports(reduction: Reduction, block: Block) -> bool:
    """Whether a kernel computes this; what it does not takes the tiled path."""
    # The kernels know neither float64 nor masked columns.
    x = block.left[0]
    narrow = x.dtype != torch.float64 and not block.column_values
    return bool(reduction.fused) and narrow and (x.is_cuda or INTERPRETED)


def reduce(reduction: Reduction, block: Block, kept: Kept, tile_size: int = 0) -> list[Tensor]:
    """Row statistics [b], then column statistics [n], in float64 (see `tiled.reduce`).

    No tile is kept.
    """
    if not supports(reduction, block):
        return tiled.reduce(reduction, block, kept, tile_size)

    # The kernels compute addresses from D alone.
    x, t, (n_rows, n_columns) = block.left[0].contiguous(), block.right[0].contiguous(), block.shape
    sizes = [n_rows, n_rows, n_columns]
    totals = [empty_statistic(kind, n, x.device) for kind, n in zip(reduction.kinds, sizes)]

    launch = _launch(x, tile_size)
    for rows in slices(n_rows, FORWARD_ROWS):
        by_row, positive, by_column = _partial_statistics(reduction, block, x, t, rows, launch)
        totals[0][rows] = _merge_parts(reduction.kinds[0], by_row)
        totals[1][rows] = positive.double().sum(0)
        if reduction.columns:
            part = _merge_parts(reduction.kinds[2], by_column)
            totals[2] = merge(reduction.kinds[2], totals[2], part)
    return totals


def _partial_statistics(
    reduction: Reduction, block: Block, x: Tensor, t: Tensor, rows: slice, launch: dict[str, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Row statistics and positives [spans, rows], column statistics [row blocks, n]; float32."""
    n_rows, n_columns = rows.stop - rows.start, len(t)
    n_blocks = triton.cdiv(n_rows, launch["BM"])
    n_spans = triton.cdiv(n_columns, launch["BN"] * SPAN)

    # A program sees SPAN column tiles of one row block: statistics come in parts.
    by_row, positive = (x.new_empty(n_spans, n_rows, dtype=torch.float32) for _ in range(2))
    n_parts = n_blocks if reduction.columns else 0
    by_column = x.new_empty(n_parts, n_columns, dtype=torch.float32)
    statistics_kernel[(n_blocks, n_spans)](
        x[rows],
        t,
        *_scalars(block),
        by_row,
        positive,
        by_column,
        n_rows,
        n_columns,
        *_offset(block, rows),
        D=x.shape[1],
        MODE=reduction.fused,
        COLUMNS=bool(reduction.columns),
        SPAN=SPAN,
        **launch,
    )
    return by_row, positive, by_column


def gradients(
    reduction: Reduction,
    block: Block,
    statistics: list[Tensor],
    upstream: list[Tensor],
    kept: Kept,
    needed: Sequence[bool],
    tile_size: int = 0,
) -> list[Tensor | None]:
    """Gradients with respect to `block.tensors`, in that order (see `tiled.gradients`)."""
    if not supports(reduction, block):
        return tiled.gradients(reduction, block, statistics, upstream, kept, needed, tile_size)

    x, t = block.left[0].contiguous(), block.right[0].contiguous()
    dx, dt = (torch.zeros_like(rows, dtype=torch.float32) for rows in (x, t))
    bias_sum = x.new_zeros((), dtype=torch.float32)
    # dz is written in the inputs' dtype, so it is computed for weights of at most 1.
    unit, weights = _normalised(upstream)
    saved = [without_empty(statistic).float() for statistic in statistics]

    launch = _launch(x, tile_size)
    for rows in slices(len(x), CHUNK[0]):
        for columns in slices(len(t), CHUNK[1]):
            dz, dz_sum = _chunk(reduction, block, x, t, saved, weights, rows, columns, launch)
            dx[rows] += _product(dz, t[columns])
            dt[columns] += _product(dz.T, x[rows])
            bias_sum += dz_sum

    # z = scale·s: so far dx and dt hold the sums for dz, not for ds.
    scale_gradient = torch.linalg.vecdot(dx, x.float()).sum() * unit
    factor = unit * block.shared[0].float()
    results = [
        dx.mul_(factor).to(x.dtype),
        dt.mul_(factor).to(t.dtype),
        scale_gradient,
        bias_sum * unit,
    ]
    return [
        gradient.to(tensor.dtype) if wanted else None
        for gradient, tensor, wanted in zip(results, block.tensors, needed)
    ]


def _chunk(
    reduction: Reduction,
    block: Block,
    x: Tensor,
    t: Tensor,
    saved: list[Tensor],
    upstream: list[Tensor],
    rows: slice,
    columns: slice,
    launch: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """dz [rows, columns] in the inputs' dtype, and its sum in float32."""
    m, n = rows.stop - rows.start, columns.stop - columns.start
    grid = (triton.cdiv(m, launch["BM"]), triton.cdiv(n, launch["BN"]))
    dz, sums = x.new_empty(m, n), x.new_empty(grid, dtype=torch.float32)

    # In one direction the kernel reads no column; it is given the rows' for want of others.
    by_column = [
        values[-1][columns] if reduction.columns else values[0] for values in (saved, upstream)
    ]
    weights_kernel[grid](
        x[rows],
        t[columns],
        *_scalars(block),
        saved[0][rows],
        upstream[0][rows],
        upstream[1][rows],
        *by_column,
        dz,
        sums,
        m,
        n,
        *_offset(block, rows, columns),
        D=x.shape[1],
        MODE=reduction.fused,
        COLUMNS=bool(reduction.columns),
        **launch,
    )
    return dz, sums.sum()


def _launch(x: Tensor, tile_size: int) -> dict[str, int]:
    """Tile sizes and launch options of the kernels for these inputs."""
    launch = dict(FULL if x.dtype == torch.float32 else HALF)
    if tile_size:
        launch |= {"BM": tile_size, "BN": tile_size}
    depth = max(16, triton.next_power_of_2(x.shape[1]))  # tl.dot takes 16 at least
    return launch | {"BK": min(launch["BK"], depth)}


def _scalars(block: Block) -> tuple[Tensor, Tensor]:
    """Scale and bias as float32 on the device: no host synchronisation."""
    scale = block.shared[0].float()
    bias = block.shared[1].float() if len(block.shared) > 1 else torch.zeros_like(scale)
    return scale, bias


def _offset(block: Block, rows: slice, columns: slice | None = None) -> tuple[int, int]:
    """(column of the first row's own pair, counted from the first one; 1 if there are pairs)."""
    if block.offset is None:
        return 0, 0
    first_column = columns.start if columns else 0
    return block.offset + rows.start - first_column, 1


def _merge_parts(kind: str, parts: Tensor) -> Tensor:
    """The statistic of all parts [parts, size] together, in float64."""
    return parts.double().sum(0) if kind == SUM else torch.logsumexp(parts.double(), 0)


def _normalised(upstream: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The largest upstream weight, and all of them divided by it.

    1/(2B) times a probability would vanish in float16.
    """
    largest = torch.stack([weights.abs().max() for weights in upstream]).max()
    largest = torch.where(largest > 0, largest, 1)
    return largest.float(), [(weights / largest).float() for weights in upstream]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a·b with a float32 result, not rounded to the inputs' dtype before it is accumulated."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)
