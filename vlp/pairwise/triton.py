"""Triton kernels for the margin log-sum-exp and the sigmoid loss: the reductions with a
hand-derived gradient.

The score GEMM is fused with what follows it, and no float32 score ever leaves the chip:

    forward   one kernel streams z tiles and writes row and column statistics only (2B²D FLOPs);
    backward  one kernel recomputes z tiles and writes dz of a CHUNK of the matrix in the inputs' dtype; two library
              GEMMs turn it into dX and dT while it is in cache or nearly so (6B²D).

A kernel that kept dX and dT accumulators on the chip would have to compute z once for each of them
(10B²D in all). Inputs bfloat16, float16 or float32, accumulation in float32. Other reductions take
the tiled path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor

from vlp.pairwise import tiled
from vlp.pairwise.kernels import FULL, HALF, SPAN, _statistics, _weights, compile_ahead
from vlp.pairwise.reduction import Block, Reduction, empty_statistic, merge
from vlp.pairwise.tiled import Kept

__all__ = ["check_device", "compile_ahead", "gradients", "reduce", "supports"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

FORWARD_ROWS = (
    8192  # rows a launch: bounds the partial column statistics, FORWARD_ROWS / BM · n numbers
)
CHUNK = (4096, 8192)  # rows × columns of dz that exist at once: 64 MiB in bfloat16


def check_device() -> None:
    """ValueError where the kernels cannot run."""
    if not (torch.cuda.is_available() or INTERPRETED):
        raise ValueError(
            "impl: 'triton' needs a CUDA device and found none; choose auto, tiled or dense"
        )


def supports(reduction: Reduction, block: Block) -> bool:
    narrow = block.left[0].dtype != torch.float64 and not block.column_values
    return bool(reduction.fused) and narrow and (block.left[0].is_cuda or INTERPRETED)


def reduce(reduction: Reduction, block: Block, kept: Kept, tile_size: int = 0) -> list[Tensor]:
    """Row statistics [b], then column statistics [n], in float64 (see `tiled.reduce`). Nothing is
    kept.
    """
    if not supports(reduction, block):
        return tiled.reduce(reduction, block, kept, tile_size)
    x, t, (n_rows, n_columns) = block.left[0].contiguous(), block.right[0].contiguous(), block.shape
    kinds = (*reduction.rows, *reduction.columns)
    sizes = [n_rows, n_rows, n_columns][: len(kinds)]
    results = [empty_statistic(kind, size, x.device) for kind, size in zip(kinds, sizes)]
    meta = _meta(x, tile_size)
    for rows in _slices(n_rows, FORWARD_ROWS):
        size = rows.stop - rows.start
        n_blocks, n_spans = triton.cdiv(size, meta["BM"]), triton.cdiv(n_columns, meta["BN"] * SPAN)
        by_row, positive = (x.new_empty(n_spans, size, dtype=torch.float32) for _ in range(2))
        by_column = x.new_empty(
            n_blocks if reduction.columns else 0, n_columns, dtype=torch.float32
        )
        _statistics[(n_blocks, n_spans)](
            x[rows],
            t,
            *_scalars(block),
            by_row,
            positive,
            by_column,
            size,
            n_columns,
            *_offset(block, rows),
            D=x.shape[1],
            MODE=reduction.fused,
            COLUMNS=bool(reduction.columns),
            SPAN=SPAN,
            **meta,
        )
        results[0][rows] = _merge_parts(kinds[0], by_row)
        results[1][rows] = positive.double().sum(0)
        if reduction.columns:
            results[2] = merge(kinds[2], results[2], _merge_parts(kinds[2], by_column))
    return results


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
    dx, dt = (torch.zeros_like(e, dtype=torch.float32) for e in (x, t))
    unit, upstream = _normalised(upstream)
    bias_sum = x.new_zeros((), dtype=torch.float32)
    meta = _meta(x, tile_size)
    # An empty log-sum-exp (−∞) has no entries that could carry a gradient.
    saved = [s.masked_fill(s == -torch.inf, torch.inf).float() for s in statistics]
    for rows in _slices(len(x), CHUNK[0]):
        for columns in _slices(len(t), CHUNK[1]):
            dz, sums = _chunk(reduction, block, x, t, saved, upstream, rows, columns, meta)
            dx[rows] += _product(dz, t[columns])
            dt[columns] += _product(dz.T, x[rows])
            bias_sum += sums
    scale_gradient = torch.linalg.vecdot(dx, x.float()).sum() * unit
    factor = unit * block.shared[0].float()
    found = [
        dx.mul_(factor).to(x.dtype),
        dt.mul_(factor).to(t.dtype),
        scale_gradient,
        bias_sum * unit,
    ]
    return [g.to(v.dtype) if n else None for g, v, n in zip(found, block.tensors, needed)]


def _chunk(
    reduction: Reduction,
    block: Block,
    x: Tensor,
    t: Tensor,
    saved: list[Tensor],
    upstream: list[Tensor],
    rows: slice,
    columns: slice,
    meta: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """dz [rows, columns] in the inputs' dtype, and its sum in float32."""
    m, n = rows.stop - rows.start, columns.stop - columns.start
    grid = (triton.cdiv(m, meta["BM"]), triton.cdiv(n, meta["BN"]))
    dz, sums = x.new_empty(m, n), x.new_empty(grid, dtype=torch.float32)
    by_column = [
        values[-1][columns] if reduction.columns else values[0] for values in (saved, upstream)
    ]
    _weights[grid](
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
        **meta,
    )
    return dz, sums.sum()


def _meta(x: Tensor, tile_size: int) -> dict[str, int]:
    meta = dict(FULL if x.dtype == torch.float32 else HALF)
    if tile_size:
        meta |= {"BM": tile_size, "BN": tile_size}
    return meta | {"BK": min(meta["BK"], max(16, triton.next_power_of_2(x.shape[1])))}


def _scalars(block: Block) -> tuple[Tensor, Tensor]:
    """Scale and bias as float32 on the device: no host synchronisation."""
    scale = block.shared[0].float()
    return scale, (block.shared[1].float() if len(block.shared) > 1 else torch.zeros_like(scale))


def _offset(block: Block, rows: slice, columns: slice | None = None) -> tuple[int, int]:
    """Where the own pair of the first row lies relative to the first column, and whether there are
    pairs at all.
    """
    first_column = columns.start if columns else 0
    return (0, 0) if block.offset is None else (block.offset + rows.start - first_column, 1)


def _merge_parts(kind: str, parts: Tensor) -> Tensor:
    return parts.double().sum(0) if kind == "sum" else torch.logsumexp(parts.double(), 0)


def _normalised(upstream: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Upstream weights divided by their largest: 1/(2B) times a probability would vanish in
    float16.
    """
    largest = torch.stack([u.abs().max() for u in upstream]).max()
    largest = torch.where(largest > 0, largest, 1)
    return largest.float(), [(u / largest).float() for u in upstream]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a·b with a float32 result, not rounded to the inputs' dtype before it is accumulated."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
