"""The two Triton kernels of `vlp.pairwise.triton`, and their compilation without a GPU.

Both work on tiles z = scale·x·tᵀ + bias of BM rows and BN columns, computed BK of D at a time, with
x [n_rows, D] and t [n_columns, D] contiguous. Where `paired`, column i + offset is row i's own
pair. MODE is `margin` or `softplus`; COLUMNS: column statistics are wanted too.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# Rows × columns of a program, depth of one dot, warps, pipeline stages; chosen to fit Hopper's
# registers and shared memory with float32 accumulators. Narrow inputs, then float32.
HALF = {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}
FULL = {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2}
SPAN = 16  # column tiles a forward program streams before it writes its row statistics


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
    # int64: rows × D passes 2³¹ at large batches.
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
        # ieee: TF32 would round float32 inputs to 10 bits.
        z = tl.dot(a, tl.trans(b), z, input_precision="ieee")
    return z * scale + bias


@triton.jit
def _softplus(z):
    """max(z, 0) + log1p(e^{−|z|}), with Kahan's log1p.

    At z = −10, where SigLIP starts, log(1 + e^z) is off by 1e-3.
    """
    e = tl.exp(-tl.abs(z))
    w = 1.0 + e
    log1p = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.maximum(z, 0.0) + log1p


@triton.jit
def statistics_kernel(
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
    """Statistics of BM rows over SPAN column tiles, and of those columns over the BM rows."""
    block, span = tl.program_id(0), tl.program_id(1)
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)
    rows = block * BM + tl.arange(0, BM)

    # An online log-sum-exp: Σ e^z = total · e^highest.
    highest = tl.full((BM,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    positive = tl.zeros((BM,), dtype=tl.float32)

    start = span * SPAN * BN
    for first in range(start, min(start + SPAN * BN, n_columns), BN):
        columns = first + tl.arange(0, BN)
        z = _scores(x, t, rows, columns, n_rows, n_columns, scale, bias, D, BM, BN, BK)
        is_pair = (rows[:, None] + offset == columns[None, :]) & (paired != 0)
        positive += tl.sum(tl.where(is_pair, z, 0.0), 1)

        # Rows and columns past the end were read as zeros; own pairs are no negatives.
        real = (rows[:, None] < n_rows) & (columns[None, :] < n_columns) & (is_pair == 0)
        if MODE == "softplus":
            total += tl.sum(tl.where(real, _softplus(z), 0.0), 1)
        else:
            z = tl.where(real, z, float("-inf"))
            new = tl.maximum(highest, tl.max(z, 1))
            base = tl.where(new == float("-inf"), 0.0, new)  # −∞ − −∞ would be NaN
            total = total * tl.exp(highest - base) + tl.sum(tl.exp(z - base[:, None]), 1)
            highest = new

            # Columns meet no other tile of this program: their part is final here.
            if COLUMNS:
                top = tl.max(z, 0)
                base = tl.where(top == float("-inf"), 0.0, top)
                column = base + tl.log(tl.sum(tl.exp(z - base[None, :]), 0))
                tl.store(
                    by_column + block.to(tl.int64) * n_columns + columns,
                    column,
                    mask=columns < n_columns,
                )

    # These rows over these columns only: the caller merges the spans.
    if MODE != "softplus":
        total = tl.where(highest == float("-inf"), 0.0, highest) + tl.log(total)
    out = span.to(tl.int64) * n_rows + rows
    tl.store(by_row + out, total, mask=rows < n_rows)
    tl.store(positive_out + out, positive, mask=rows < n_rows)


@triton.jit
def weights_kernel(
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
    """dz of one tile, and its sum.

    g^r e^{z − r} + g^c e^{z − c} for `margin`, g^r σ(z) for `softplus`; the upstream weight of the
    positive at the own pair.
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
        # +∞ past the end: e^{z − ∞} is 0.
        statistic = tl.load(row_statistic + rows, mask=here, other=float("inf"))
        dz = weight[:, None] * tl.exp(z - statistic[:, None])
        if COLUMNS:
            statistic = tl.load(column_statistic + columns, mask=there, other=float("inf"))
            weight = tl.load(column_weight + columns, mask=there, other=0.0)
            dz += weight[None, :] * tl.exp(z - statistic[None, :])

    # The positive is a statistic of its own, with a weight of its own.
    is_pair = (rows[:, None] + offset == columns[None, :]) & (paired != 0)
    dz = tl.where(is_pair, tl.load(positive_weight + rows, mask=here, other=0.0)[:, None], dz)

    # Rows and columns past the end were read as zeros, whose z is the bias.
    real = here[:, None] & there[None, :]
    dz = tl.where(real, dz, 0.0)
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + place, tl.sum(tl.sum(dz, 1), 0))
    entries = rows[:, None].to(tl.int64) * n_columns + columns[None, :]
    tl.store(dz_out + entries, dz.to(dz_out.dtype.element_ty), mask=real)


def compile_ahead(D: int, dtype: str, mode: str, capability: int = 90) -> dict[str, Any]:
    """{kernel name: compiled kernel} for a GPU generation without one at hand."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    sizes = dict(FULL if dtype == "fp32" else HALF)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"MODE": mode, "COLUMNS": mode == "margin", "SPAN": SPAN, "D": D, **sizes}

    compiled = {}
    for kernel in (statistics_kernel, weights_kernel):
        own_constants = {n: value for n, value in constants.items() if n in kernel.arg_names}
        signature = {name: _type(name, own_constants, dtype) for name in kernel.arg_names}

        # Tensors of torch are aligned; without the hint loads would be too narrow to pipeline.
        aligned = {}
        for i, name in enumerate(kernel.arg_names):
            if signature[name].startswith("*"):
                aligned[(i,)] = [["tt.divisibility", 16]]

        source = ASTSource(kernel, signature, own_constants, aligned)
        compiled[kernel.__name__] = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options=options
        )
    return compiled


def _type(name: str, constants: dict[str, Any], dtype: str) -> str:
    """Triton's word for the type of a kernel's argument."""
    if name in constants:
        return "constexpr"
    if name in ("n_rows", "n_columns", "offset", "paired"):
        return "i32"
    return f"*{dtype}" if name in ("x", "t", "dz_out") else "*fp32"
