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
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlp.pairwise import tiled
from vlp.pairwise.reduction import Block, Reduction, empty_statistic, merge
from vlp.pairwise.tiled import Kept

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Rows × columns of a program, depth of one dot, warps, pipeline stages; chosen to fit Hopper's
# registers and shared memory with float32 accumulators. Narrow inputs, then float32.
HALF = {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}
FULL = {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2}
SPAN = 16  # column tiles a forward program streams before it writes its row statistics
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


@triton.jit
def _scores(
    x,
    t,
    rows,
    columns,
    n_rows,
    n_columns,
    scale,
    bias,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """z = scale·x·tᵀ + bias of one tile [BM, BN], float32."""
    depth = tl.arange(0, BK)
    left = x + rows[:, None].to(tl.int64) * D + depth[None, :]
    right = t + columns[:, None].to(tl.int64) * D + depth[None, :]
    z = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, D, BK):
        here, there = rows[:, None] < n_rows, columns[:, None] < n_columns
        if D % BK != 0:
            inside = depth[None, :] < D - k
            here, there = here & inside, there & inside
        a = tl.load(left + k, mask=here, other=0.0)
        b = tl.load(right + k, mask=there, other=0.0)
        z = tl.dot(a, tl.trans(b), z, input_precision="ieee")
    return z * scale + bias


@triton.jit
def _softplus(z):
    """max(z, 0) + log1p(e^{−|z|}), with Kahan's log1p: at z = −10, where SigLIP starts, log(1 +
    e^z) is off by 1e-3.
    """
    e = tl.exp(-tl.abs(z))
    w = 1.0 + e
    return tl.maximum(z, 0.0) + tl.where(
        w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0))
    )


@triton.jit
def _statistics(
    x,
    t,
    scale_ptr,
    bias_ptr,
    by_row,
    positive_out,
    by_column,
    n_rows,
    n_columns,
    offset,
    paired,
    D: tl.constexpr,
    MODE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Statistics of BM rows over SPAN column tiles, and of each of those columns over the BM rows."""
    block, span = tl.program_id(0), tl.program_id(1)
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)
    rows = block * BM + tl.arange(0, BM)
    highest = tl.full((BM,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    positive = tl.zeros((BM,), dtype=tl.float32)
    start = span * SPAN * BN
    for first in range(start, min(start + SPAN * BN, n_columns), BN):
        columns = first + tl.arange(0, BN)
        z = _scores(x, t, rows, columns, n_rows, n_columns, scale, bias, D, BM, BN, BK)
        own = (rows[:, None] + offset == columns[None, :]) & (paired != 0)
        positive += tl.sum(tl.where(own, z, 0.0), 1)
        real = (rows[:, None] < n_rows) & (columns[None, :] < n_columns) & (own == 0)
        if MODE == "softplus":
            total += tl.sum(tl.where(real, _softplus(z), 0.0), 1)
        else:
            z = tl.where(real, z, float("-inf"))
            new = tl.maximum(highest, tl.max(z, 1))
            base = tl.where(new == float("-inf"), 0.0, new)  # −∞ − −∞ would be NaN
            total = total * tl.exp(highest - base) + tl.sum(tl.exp(z - base[:, None]), 1)
            highest = new
            if COLUMNS:
                top = tl.max(z, 0)
                base = tl.where(top == float("-inf"), 0.0, top)
                column = base + tl.log(tl.sum(tl.exp(z - base[None, :]), 0))
                tl.store(
                    by_column + block.to(tl.int64) * n_columns + columns,
                    column,
                    mask=columns < n_columns,
                )
    if MODE != "softplus":
        total = tl.where(highest == float("-inf"), 0.0, highest) + tl.log(total)
    out = span.to(tl.int64) * n_rows + rows
    tl.store(by_row + out, total, mask=rows < n_rows)
    tl.store(positive_out + out, positive, mask=rows < n_rows)


@triton.jit
def _weights(
    x,
    t,
    scale_ptr,
    bias_ptr,
    row_statistic,
    row_weight,
    positive_weight,
    column_statistic,
    column_weight,
    dz_out,
    sums,
    n_rows,
    n_columns,
    offset,
    paired,
    D: tl.constexpr,
    MODE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """dz of one tile, and its sum: g^r e^{z − r} + g^c e^{z − c}, or g^r σ(z); the upstream weight
    at the own pair.
    """
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    z = _scores(x, t, rows, columns, n_rows, n_columns, scale, bias, D, BM, BN, BK)
    here, there = rows < n_rows, columns < n_columns
    weight = tl.load(row_weight + rows, mask=here, other=0.0)
    if MODE == "softplus":
        dz = weight[:, None] * tl.sigmoid(z)
    else:
        statistic = tl.load(row_statistic + rows, mask=here, other=float("inf"))
        dz = weight[:, None] * tl.exp(z - statistic[:, None])
        if COLUMNS:
            statistic = tl.load(column_statistic + columns, mask=there, other=float("inf"))
            weight = tl.load(column_weight + columns, mask=there, other=0.0)
            dz += weight[None, :] * tl.exp(z - statistic[None, :])
    own = (rows[:, None] + offset == columns[None, :]) & (paired != 0)
    dz = tl.where(own, tl.load(positive_weight + rows, mask=here, other=0.0)[:, None], dz)
    real = here[:, None] & there[None, :]
    dz = tl.where(real, dz, 0.0)
    tl.store(
        sums + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(dz, 1), 0)
    )
    where = rows[:, None].to(tl.int64) * n_columns + columns[None, :]
    tl.store(dz_out + where, dz.to(dz_out.dtype.element_ty), mask=real)


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


def compile_ahead(D: int, dtype: str, mode: str, capability: int = 90) -> dict[str, Any]:
    """Both kernels compiled for a GPU generation without one at hand: {kernel name: compiled
    kernel}.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    compiled, meta = {}, dict(FULL if dtype == "fp32" else HALF)
    options = {name: meta.pop(name) for name in ("num_warps", "num_stages")}
    for kernel in (_statistics, _weights):
        constants = {"MODE": mode, "COLUMNS": mode == "margin", "SPAN": SPAN, "D": D, **meta}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        signature = {}
        for name in kernel.arg_names:
            if name in constants:
                signature[name] = "constexpr"
            elif name in ("n_rows", "n_columns", "offset", "paired"):
                signature[name] = "i32"
            else:
                signature[name] = f"*{dtype}" if name in ("x", "t", "dz_out") else "*fp32"
        # Tensors of torch are aligned; without the hint loads would be too narrow to pipeline.
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(kernel.arg_names)
            if str(signature[n])[0] == "*"
        }
        source = ASTSource(kernel, signature, constants, aligned)
        compiled[kernel.__name__] = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options=options
        )
    return compiled
