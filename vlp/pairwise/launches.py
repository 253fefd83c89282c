"""Launches of the Triton kernels over slices of one block, and the tiles they take."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vlp.pairwise.kernels import SPAN, UNPAIRED, pairs_kernel
from vlp.pairwise.logsumexp_kernels import (
    careful_kernel,
    logsumexp_kernel,
    logsumexp_weights_kernel,
)
from vlp.pairwise.reduction import Block, Reduction
from vlp.pairwise.softplus_kernels import softplus_kernel, softplus_weights_kernel

# Rows × columns of a program, depth of one product, warps, pipeline stages. Narrow inputs, then
# float32, whose products take more registers.
HALF = {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}
FULL = {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 2}
# Of 8 warps with so many registers a thread, two programs share a multiprocessor: the exponentials
# of one then hide behind the products of the other.
TWO_PROGRAMS = {"maxnreg": 128}

# The largest exponential is 2^100: a span's sum of them is finite, and what underflows lies 2^226
# below. At scale 100 and unit rows that is a cosine of −.56.
HEADROOM = 100.0
LOG2_E, LN_2 = math.log2(math.e), math.log(2)


def tile_of(dtype: torch.dtype, D: int, tile_size: int = 0) -> dict[str, int]:
    """Tile sizes and launch options of the kernels for these inputs."""
    tile = dict(FULL if dtype == torch.float32 else HALF)
    if tile_size:
        tile |= {"BM": tile_size, "BN": tile_size}
    depth = max(16, triton.next_power_of_2(D))  # tl.dot takes 16 at least
    return tile | {"BK": min(tile["BK"], depth)}


def takes_descriptors(capability: int) -> bool:
    """Whether cards of this compute capability (90: 9.0) have a copy engine for tiles."""
    return capability >= 90


def options_of(
    dtype: torch.dtype, capability: int, n_multiples: int, both_sided_mask: bool
) -> dict[str, int]:
    """Further launch options of the kernels that are to share a multiprocessor of Hopper's.

    Several multiples, or column values with column statistics, would spill within that limit; so
    would float32, and other cards, which hold more of a product in registers.
    """
    spills = n_multiples > 1 or both_sided_mask or dtype == torch.float32
    return TWO_PROGRAMS if capability // 10 == 9 and not spills else {}


def _capability(device: torch.device) -> int:
    """The card's compute capability; Hopper's where the interpreter stands for a card."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class Launches:
    """The kernels of one block, over any of its rows and columns."""

    def __init__(self, reduction: Reduction, block: Block, tile_size: int = 0) -> None:
        self.x, self.t = _for_descriptors(block.left[0]), _for_descriptors(block.right[0])
        self.offset = block.offset
        self.softplus = reduction.fused == "softplus"
        self.columns = bool(reduction.columns)
        self.multiples = reduction.multiples or (1.0,)

        # On the device, as float32: no number is asked for by the host.
        self.scale = block.shared[0].float() * LOG2_E
        bias = block.shared[1].float() * LOG2_E if self.softplus else torch.zeros_like(self.scale)
        self.scalars = torch.stack([torch.stack([self.scale * m, bias]) for m in self.multiples])
        self.column_values: Tensor | None = None
        if block.column_values:
            self.column_values = torch.stack(block.column_values).sum(0).float() * LOG2_E

        dtype, D = self.x.dtype, self.x.shape[1]
        masked = self.column_values is not None
        self.tile = tile_of(dtype, D, tile_size)
        capability = _capability(self.x.device)
        self.descriptors = takes_descriptors(capability)
        both_sided_mask = masked and self.columns
        self.limit = options_of(dtype, capability, len(self.multiples), both_sided_mask)
        self.sides: dict[tuple[str, int, int], Any] = {}

    def pair_scores(self, rows: slice, columns: slice) -> Tensor:
        """[m] float32: x_i·t_j of the i-th of `rows` and the i-th of `columns`."""
        n_rows, D = rows.stop - rows.start, self.x.shape[1]
        out = self.x.new_empty(n_rows, dtype=torch.float32)
        BM, BK = self.tile["BM"], self.tile["BK"]
        grid = (triton.cdiv(n_rows, BM),)
        pairs_kernel[grid](self.x[rows], self.t[columns], out, n_rows, D=D, BM=BM, BK=BK)
        return out

    def shifts(self) -> Tensor:
        """For each multiple, the power of 2 by which its exponentials are scaled down."""
        # |z| ≤ scale · max‖x‖ · max‖t‖, plus the largest column value.
        bound = self.scale.abs()
        for matrix in (self.x, self.t):
            lengths = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32)
            bound = bound * lengths.max()
        if self.column_values is not None:
            bound = bound + self.column_values.max().clamp(min=0)
        sizes = torch.stack([bound * abs(m) for m in self.multiples])
        return (sizes - HEADROOM).clamp(min=0)

    def log_sums(
        self, multiple: int, shift: Tensor, rows: slice, columns: slice
    ) -> tuple[Tensor, Tensor]:
        """LSE of the rows over the columns [m], and of the columns over the rows [n]; float64.

        Without column statistics the second is empty.
        """
        m, n = rows.stop - rows.start, columns.stop - columns.start
        grid = (triton.cdiv(m, self.tile["BM"]), triton.cdiv(n, self.tile["BN"] * SPAN))

        # A program sees SPAN column tiles of one row block: sums come in parts.
        n_parts = grid[0] if self.columns else 0
        row_total = self.x.new_empty(grid[1], m, dtype=torch.float32)
        column_total = self.x.new_empty(n_parts, n, dtype=torch.float32)
        row_shift, column_shift = (
            shift.expand_as(total).contiguous() for total in (row_total, column_total)
        )

        scalars = torch.stack([self.scalars[multiple, 0], -shift])
        arguments = self._arguments(rows, columns, scalars) | self._masks(columns)
        sums = {"row_total": row_total, "column_total": column_total, "SPAN": SPAN}
        logsumexp_kernel[grid](**arguments, **sums, **self.limit)
        shifts = {"row_shift": row_shift, "column_shift": column_shift}
        careful_kernel[grid](**arguments, **sums, **shifts)
        by_column = _log_sum(column_total, column_shift) if self.columns else column_total
        return _log_sum(row_total, row_shift), by_column

    def softplus_sums(self, rows: slice, columns: slice) -> Tensor:
        """Σ_j log(1 + e^{z_ij}) of the rows over the columns [m], float64."""
        m, n = rows.stop - rows.start, columns.stop - columns.start
        grid = (triton.cdiv(m, self.tile["BM"]), triton.cdiv(n, self.tile["BN"] * SPAN))
        total = self.x.new_empty(grid[1], m, dtype=torch.float32)
        arguments = self._arguments(rows, columns, self.scalars)
        softplus_kernel[grid](row_total=total, SPAN=SPAN, **arguments, **self.limit)
        return total.sum(0, dtype=torch.float64) * LN_2

    def logsumexp_weights(
        self,
        rows: slice,
        columns: slice,
        dz: Tensor,  # [m, n], written
        by_row: tuple[Tensor, Tensor],  # log2 statistics and weights [K, b]
        by_column: tuple[Tensor, Tensor],  # [K, n], read where there are column statistics
    ) -> None:
        """Write dz of the log-sum-exps of one chunk, 0 at the rows' own pairs."""
        row_statistic, row_weight = (values[:, rows].contiguous() for values in by_row)
        column_statistic, column_weight = (values[:, columns].contiguous() for values in by_column)
        logsumexp_weights_kernel[self._tiles(dz)](
            row_statistic=row_statistic,
            row_weight=row_weight,
            column_statistic=column_statistic,
            column_weight=column_weight,
            dz_out=_descriptor(dz, self.tile["BM"], self.tile["BN"]),
            K=len(self.multiples),
            **self._arguments(rows, columns, self.scalars),
            **self._masks(columns),
            **self.limit,
        )

    def softplus_weights(self, rows: slice, columns: slice, dz: Tensor, weight: Tensor) -> Tensor:
        """Write dz of the softplus sums of one chunk, 0 at the rows' own pairs.

        Returns its sum, taken before it is rounded.
        """
        grid = self._tiles(dz)
        sums = self.x.new_empty(grid, dtype=torch.float32)
        softplus_weights_kernel[grid](
            row_weight=weight[rows],
            dz_out=_descriptor(dz, self.tile["BM"], self.tile["BN"]),
            sums=sums,
            **self._arguments(rows, columns, self.scalars),
            **self.limit,
        )
        return sums.sum()

    # What launches share

    def _arguments(self, rows: slice, columns: slice, scalars: Tensor) -> dict[str, Any]:
        """The arguments that say which scores are meant, and how they are computed."""
        offset = UNPAIRED
        if self.offset is not None:
            offset = self.offset + rows.start - columns.start
        return {
            "x": self._side("x", rows, self.tile["BM"]),
            "t": self._side("t", columns, self.tile["BN"]),
            "scalars": scalars,
            "n_rows": rows.stop - rows.start,
            "n_columns": columns.stop - columns.start,
            "offset": offset,
            "D": self.x.shape[1],
            "DESCRIPTORS": self.descriptors,
            **self.tile,
        }

    def _side(self, name: str, lines: slice, n_lines: int) -> Any:
        """What a kernel takes for these lines of x or t."""
        # Each is part of many launches, and a launch in backward has only 65 µs to be made in.
        key = name, lines.start, lines.stop
        if key not in self.sides:
            matrix = getattr(self, name)[lines]
            if self.descriptors:
                matrix = _descriptor(matrix, n_lines, self.tile["BK"])
            self.sides[key] = matrix
        return self.sides[key]

    def _masks(self, columns: slice) -> dict[str, Any]:
        """The arguments of the log-sum-exps alone."""
        # A kernel without column values reads none; it is given a pointer for want of them.
        values, masked = self.scalars, self.column_values is not None
        if self.column_values is not None:
            values = self.column_values[columns]
        return {"column_values": values, "MASKED": masked, "COLUMNS": self.columns}

    def _tiles(self, dz: Tensor) -> tuple[int, int]:
        return triton.cdiv(dz.shape[0], self.tile["BM"]), triton.cdiv(dz.shape[1], self.tile["BN"])


def _for_descriptors(matrix: Tensor) -> Tensor:
    """The matrix as the copy engine takes it: from a multiple of 16 bytes on, in rows of such.

    Where D refuses, that is a copy with columns of zeros at its end, which add nothing to a score.
    """
    n_fitting = 16 // matrix.itemsize
    n_missing = -matrix.shape[1] % n_fitting
    matrix = torch.nn.functional.pad(matrix, (0, n_missing)) if n_missing else matrix.contiguous()
    return matrix if matrix.data_ptr() % 16 == 0 else matrix.clone()


def _descriptor(matrix: Tensor, n_rows: int, n_columns: int) -> TensorDescriptor:
    """What the copy engine needs to know for tiles [n_rows, n_columns]."""
    return TensorDescriptor.from_tensor(matrix, [n_rows, n_columns])


def _log_sum(totals: Tensor, shifts: Tensor) -> Tensor:
    """log Σ total·2^shift over the parts [parts, size], [size] float64; −∞ where all are empty."""
    highest = shifts.amax(0)
    base = highest.masked_fill(highest == -torch.inf, 0)
    # float32 until the sum: nearly all factors are 1, and what underflows is no part of it.
    total = (totals * (shifts - base).exp2()).sum(0, dtype=torch.float64)
    return (total.log2() + base) * LN_2
