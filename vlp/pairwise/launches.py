"""Launches of the Triton kernels over slices of one block, and the tiles they take."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vlp.pairwise import vectors
from vlp.pairwise.kernels import SPAN, UNPAIRED
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
    """The kernels of one block, over any of its rows and columns.

    A launch takes the host 60 µs or more, which is longer than the card needs for many: what
    launches share is made once, and only where each begins and ends is not.
    """

    def __init__(self, reduction: Reduction, block: Block, tile_size: int = 0) -> None:
        self.x, self.t = _for_descriptors(block.left[0]), _for_descriptors(block.right[0])
        self.offset = UNPAIRED if block.offset is None else block.offset
        self.softplus = reduction.fused == "softplus"
        self.columns = bool(reduction.columns)
        self.multiples = reduction.multiples or (1.0,)

        # On the device, as float32: no number is asked for by the host.
        self.shared = [number.float() for number in block.shared]
        self.scalars = torch.stack(self.shared) * LOG2_E  # scale, and bias where there is one
        self.scale = self.scalars[0]
        self.column_values: Tensor | None = None
        if block.column_values:
            self.column_values = torch.stack(block.column_values).sum(0).float() * LOG2_E

        dtype, D = self.x.dtype, self.x.shape[1]
        masked = self.column_values is not None
        self.tile = tile_of(dtype, D, tile_size)
        capability = _capability(self.x.device)
        descriptors = takes_descriptors(capability)
        both_sided_mask = masked and self.columns
        self.limit = options_of(dtype, capability, len(self.multiples), both_sided_mask)

        BM, BN, BK = (self.tile[name] for name in ("BM", "BN", "BK"))
        self.arguments: dict[str, Any] = {
            "x": _descriptor(self.x, BM, BK) if descriptors else self.x,
            "t": _descriptor(self.t, BN, BK) if descriptors else self.t,
            "offset": self.offset,
            "D": D,
            "DESCRIPTORS": descriptors,
            **self.tile,
        }
        # A kernel without column values reads none; it is given a pointer for want of them.
        self.masks = {
            "column_values": self.column_values if masked else self.scalars,
            "MASKED": masked,
            "COLUMNS": self.columns,
        }

    # Forward

    def shifts(self) -> tuple[Tensor, ...]:
        """For each multiple, the power of 2 by which its exponentials are scaled down."""
        # |z| ≤ scale · max‖x‖ · max‖t‖, plus the largest column value.
        bound = self.scale.abs()
        for matrix in (self.x, self.t):
            lengths = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32)
            bound = bound * lengths.max()
        if self.column_values is not None:
            bound = bound + self.column_values.max().clamp(min=0)
        sizes = (bound if m == 1 else bound * abs(m) for m in self.multiples)
        return tuple((size - HEADROOM).clamp_(min=0) for size in sizes)

    def log_sums(
        self,
        multiple: float,
        shift: Tensor,  # []
        rows: slice,
        columns: slice,
        by_row: Tensor,  # [b] float64
        by_column: Tensor | None,  # [n] float64
    ) -> None:
        """Join the LSE of these rows over these columns with `by_row`, and the columns' likewise.

        The first rows and the first columns to come find nothing there to be joined with.
        """
        m, n = rows.stop - rows.start, columns.stop - columns.start
        n_blocks = triton.cdiv(m, self.tile["BM"])
        n_spans = triton.cdiv(n, self.tile["BN"] * SPAN)
        scale = self.scale if multiple == 1 else self.scale * multiple

        # A program sees SPAN column tiles of one row block: sums come in parts.
        n_row_sums, n_column_sums = n_spans * m, n_blocks * n if self.columns else 0
        parts = self.x.new_empty(2, n_row_sums + n_column_sums, dtype=torch.float32)
        totals, shifts = parts.unbind()
        shifts.copy_(shift)
        row_total, column_total = totals.split((n_row_sums, n_column_sums))
        row_shift, column_shift = shifts.split((n_row_sums, n_column_sums))

        arguments = self.arguments | self.masks | _places(rows, columns)
        arguments |= {"scale": scale, "row_total": row_total, "column_total": column_total}
        grid = (n_blocks * n_spans,)
        logsumexp_kernel[grid](shift=shift, SPAN=SPAN, **arguments, **self.limit)
        shifts_to_write = {"row_shift": row_shift, "column_shift": column_shift}
        careful_kernel[grid](SPAN=SPAN, **arguments, **shifts_to_write)

        column_parts = (column_total.view(-1, n), column_shift.view(-1, n))
        vectors.merge(
            (row_total.view(-1, m), row_shift.view(-1, m)),
            by_row[rows],
            column_parts if self.columns else None,
            by_row if by_column is None else by_column[columns],
            again=(columns.start > 0, rows.start > 0),
        )

    def softplus_sums(self, rows: slice, columns: slice) -> Tensor:
        """Σ_j log(1 + e^{z_ij}) of the rows over the columns [m], float64."""
        m, n = rows.stop - rows.start, columns.stop - columns.start
        n_spans = triton.cdiv(n, self.tile["BN"] * SPAN)
        total = self.x.new_empty(n_spans, m, dtype=torch.float32)
        softplus_kernel[(triton.cdiv(m, self.tile["BM"]) * n_spans,)](
            scalars=self.scalars,
            row_total=total,
            SPAN=SPAN,
            **self.arguments,
            **_places(rows, columns),
            **self.limit,
        )
        return total.sum(0, dtype=torch.float64) * LN_2

    # Backward

    def dz_arguments(self, memory: Tensor, weights: dict[str, Tensor]) -> dict[str, Any]:
        """What launches share that write chunks of dz to this memory.

        weights: what the kernel reads of rows and columns, by its arguments' names.
        """
        arguments = self.arguments | self.limit | weights
        arguments["dz_out"] = _descriptor(memory, self.tile["BM"], self.tile["BN"])
        if self.softplus:
            return arguments | {"scalars": self.scalars}

        scale = self.scale
        if self.multiples != (1.0,):
            scale = torch.stack([self.scale * multiple for multiple in self.multiples])
        return arguments | self.masks | {"scale": scale, "K": len(self.multiples)}

    def logsumexp_weights(self, rows: slice, columns: slice, arguments: dict[str, Any]) -> None:
        """Write dz of the log-sum-exps of one chunk, 0 at the rows' own pairs."""
        grid = self._tiles(rows, columns)
        logsumexp_weights_kernel[grid](**arguments, **_places(rows, columns))

    def softplus_weights(self, rows: slice, columns: slice, arguments: dict[str, Any]) -> Tensor:
        """Write dz of the softplus sums of one chunk, 0 at the rows' own pairs.

        Returns its sums by tile, taken before it is rounded.
        """
        grid = self._tiles(rows, columns)
        sums = self.x.new_empty(grid[0] * grid[1], dtype=torch.float32)
        softplus_weights_kernel[grid](sums=sums, **arguments, **_places(rows, columns))
        return sums

    def _tiles(self, rows: slice, columns: slice) -> tuple[int, int]:
        return (
            triton.cdiv(rows.stop - rows.start, self.tile["BM"]),
            triton.cdiv(columns.stop - columns.start, self.tile["BN"]),
        )


def _places(rows: slice, columns: slice) -> dict[str, int]:
    """Where a launch begins and ends."""
    return {
        "row_start": rows.start,
        "row_stop": rows.stop,
        "column_start": columns.start,
        "column_stop": columns.stop,
    }


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
