"""Reductions one tile at a time: O(b·D) memory, exact gradients by recomputation, any device.

Forward streams the row and column statistics of every tile; backward recomputes each tile once and
takes all its gradients from it. With hand-derived programs (`fused.py`) symmetric InfoNCE costs
2B²D + 6B²D FLOPs; tiles that fit `budget` bytes are kept from forward and need no recomputation
(2B²D less where all fit).

Deterministic for a given tile size; another tile size changes the order of float additions, nothing
else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlp.pairwise import fused
from vlp.pairwise.products import add_gradients, is_narrow, multiply, operand
from vlp.pairwise.program import Program, Recompute
from vlp.pairwise.reduction import (
    Block,
    Gradients,
    Reduction,
    Tile,
    accumulation_dtype,
    empty_statistic,
    merge,
    widened,
)

# Rows and columns of a tile. On a CPU 512 to 2,048 measured alike; fewer tiles mean fewer thread
# barriers.
TILE = {"cpu": 1024, "cuda": 4096}
# The general path holds some forty matrices of a tile's size at once, the fused ones two.
GENERAL_TILE = {"cpu": 1024, "cuda": 2048}


@dataclass
class Kept:
    """Memos of tiles from forward, as many as fit."""

    budget: int  # bytes
    memos: dict[tuple[int, int], Any] = field(default_factory=dict)

    def offer(self, key: tuple[int, int], memo: Any, n_bytes: int) -> bool:
        """Whether the memo was kept."""
        # First come, first kept: which tiles are kept changes no number.
        if n_bytes > self.budget:
            return False
        self.budget -= n_bytes
        self.memos[key] = memo
        return True


class Scratch:
    """Memory for the scores of one tile after another.

    Fresh pages for each tile would cost a sixth of its GEMM.
    """

    def __init__(self) -> None:
        self.buffers: dict[int, Tensor] = {}

    def take(self, k: int, m: int, n: int, like: Tensor) -> Tensor:
        """[m, n] for score matrix k, in the accumulation dtype and on the device of `like`."""
        # Tiles at the edges are smaller: a view of the same memory.
        if k not in self.buffers or self.buffers[k].numel() < m * n:
            self.buffers[k] = like.new_empty(m * n, dtype=accumulation_dtype(like))
        return self.buffers[k][: m * n].view(m, n)

    def forget(self) -> None:
        """Hand over the last tile, which somebody keeps."""
        self.buffers.clear()


def reduce(reduction: Reduction, block: Block, kept: Kept, tile_size: int = 0) -> list[Tensor]:
    """Row statistics [b], then column statistics [n], in float64."""
    n_rows, n_columns = block.shape
    size, device = _tile_size(reduction, block, tile_size), block.left[0].device
    sizes = [n_rows] * len(reduction.rows) + [n_columns] * len(reduction.columns)
    totals = [empty_statistic(kind, n, device) for kind, n in zip(reduction.kinds, sizes)]

    # One sweep serves both: a tile gives its part of row and of column statistics.
    program, scratch = program_for(reduction, block), Scratch()
    scaling = Scaling.of(program, block)
    for rows, left in _row_tiles(block, size, scaling):
        for columns in slices(n_columns, size):
            tile = _tile(block, left, rows, columns, scratch, scaling)
            partials, memo = program.forward(tile)

            places = _places(reduction, rows, columns)
            for total, kind, place, partial in zip(totals, reduction.kinds, places, partials):
                total[place] = merge(kind, total[place], partial)

            # A memo that is kept may be the scratch itself.
            n_bytes = sum(scores.nbytes for scores in tile.scores)
            if kept.offer((rows.start, columns.start), memo, n_bytes):
                scratch.forget()
    return totals


def gradients(
    reduction: Reduction,
    block: Block,
    statistics: list[Tensor],
    upstream: list[Tensor],
    kept: Kept,
    needed: Sequence[bool],  # one flag a tensor of block.tensors
    tile_size: int = 0,
) -> list[Tensor | None]:
    """Gradients of Σ upstream·statistics with respect to `block.tensors`, in that order."""
    program, size = program_for(reduction, block), _tile_size(reduction, block, tile_size)
    scaling = Scaling.of(program, block)
    sink, scratch = _Sink(block, needed, scaling), Scratch()

    for rows, left in _row_tiles(block, size, scaling):
        sink.start_rows(rows)
        for columns in slices(block.shape[1], size):
            # A tile that forward kept comes without scores: its memo stands for them.
            memo = kept.memos.get((rows.start, columns.start))
            tile = _tile(block, left, rows, columns, scratch if memo is None else None, scaling)

            places = _places(reduction, rows, columns)
            tile_gradients = program.backward(
                tile,
                memo,
                [statistic[place] for statistic, place in zip(statistics, places)],
                [weight[place] for weight, place in zip(upstream, places)],
            )
            sink.add(tile_gradients, tile, left, rows, columns)
        sink.finish_rows(rows)
    return sink.result()


class _Sink:
    """Where the gradients of tiles add up: dX = dS·T and dT = dSᵀ·X in the accumulation dtype."""

    def __init__(self, block: Block, needed: Sequence[bool], scaling: Scaling) -> None:
        self.block, self.needed, self.scaling = block, needed, scaling
        flags = block.with_tensors(needed)
        wanted: Any = flags  # a flag in the place of each tensor
        self.scale_needed = bool(scaling.prescaled and wanted.shared[0])

        # The scale's gradient is ⟨X, dZ·T⟩, so it needs dX even where nobody else does.
        wanted_left = [flag or self.scale_needed for flag in wanted.left]
        self.left = _zeros(block.left, wanted_left)
        self.right = _zeros(block.right, wanted.right)
        self.row_values = _zeros(block.row_values, wanted.row_values)
        self.column_values = _zeros(block.column_values, wanted.column_values)
        self.shared = _zeros(block.shared, wanted.shared)

    def start_rows(self, rows: slice) -> None:
        self.current = [None if total is None else total[rows] for total in self.left]

    def add(
        self, part: Gradients, tile: Tile, left: Sequence[Tensor], rows: slice, columns: slice
    ) -> None:
        """Add the gradients of one tile, whose left operands are `left`."""
        for k, d_scores in enumerate(part.scores):
            if d_scores is None:
                continue

            d_left, d_right = self.current[k], self.right[k]
            if d_right is not None:
                d_right = d_right[columns]
            right = operand(self.block.right[k][columns])
            add_gradients(d_left, d_right, d_scores, left[k], right, tile)

        _add_at(self.row_values, part.row_values, rows)
        _add_at(self.column_values, part.column_values, columns)
        _add_at(self.shared, part.shared, ...)

    def finish_rows(self, rows: slice) -> None:
        """From dZ to dS, where z = (scale·x)·t: the sums of these rows hold dZ·T.

        dscale = Σ dz·s = ⟨X, dZ·T⟩, and dX = scale·dZ·T.
        """
        if not self.scaling.prescaled:
            return
        d_left, d_scale = self.current[0], self.shared[0]
        if d_left is None:
            return

        if d_scale is not None:
            x = widened(self.block.left[0][rows])
            d_scale += torch.linalg.vecdot(d_left, x).sum()
        d_left.mul_(self.block.shared[0])

    def result(self) -> list[Tensor | None]:
        """The sums that are needed, in the dtypes of the block's tensors."""
        # dT = dSᵀ·X took its scale with the rows, or has to take it now.
        if self.scaling.late and self.right[0] is not None:
            self.right[0].mul_(self.block.shared[0])

        sums = (*self.left, *self.right, *self.row_values, *self.column_values, *self.shared)
        results: list[Tensor | None] = []
        for total, tensor, wanted in zip(sums, self.block.tensors, self.needed):
            needed = total if wanted else None
            results.append(None if needed is None else needed.to(tensor.dtype))
        return results


def _zeros(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    return [
        torch.zeros_like(tensor, dtype=accumulation_dtype(tensor)) if flag else None
        for tensor, flag in zip(tensors, wanted)
    ]


def _add_at(totals: list[Tensor | None], parts: Sequence[Tensor | None], place: Any) -> None:
    for total, part in zip(totals, parts):
        if total is not None and part is not None:
            total[place] += part


def program_for(reduction: Reduction, block: Block) -> Program:
    """The hand-derived program of a reduction, or the general path."""
    if reduction.fused:
        return fused.PROGRAMS[reduction.fused](reduction, block)
    return Recompute(reduction)


@torch.no_grad()
def best_columns(
    block: Block,
    k: int,
    scores_of: Callable[[Tile], Tensor],  # [m, n] of a tile, −∞ for what is out of the question
    tile_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """The k highest scores of each row, [b, k], best first, and the positions of their columns."""
    size, left, right = tile_size or _default(GENERAL_TILE, block), block.left[0], block.right[0]

    # The k best of each row so far are all that is kept of a tile: O(b·k) memory.
    best_of_rows, chosen_rows = [], []
    for rows, left_tile in _row_tiles(block, size, Scaling()):
        n_rows = rows.stop - rows.start
        best = left.new_empty(n_rows, 0, dtype=accumulation_dtype(left))
        positions = torch.empty(n_rows, 0, dtype=torch.int64, device=left.device)

        for columns in slices(len(right), size):
            scores = scores_of(_tile(block, left_tile, rows, columns, Scratch(), Scaling()))
            numbers = torch.arange(columns.start, columns.stop, device=left.device)

            # The best so far compete with this tile's.
            best = torch.cat([best, scores], dim=1)
            positions = torch.cat([positions, numbers.expand(n_rows, -1)], dim=1)
            best, chosen = best.topk(min(k, best.shape[1]), dim=1)
            positions = positions.gather(1, chosen)
        best_of_rows.append(best)
        chosen_rows.append(positions)
    return torch.cat(best_of_rows), torch.cat(chosen_rows)


def scores_of_others(tile: Tile) -> Tensor:
    """The first scores of a tile, −∞ for the pairs."""
    return tile.scores[0].masked_fill(tile.positive, -torch.inf)


# Tiles of a block


def slices(size: int, step: int) -> Iterator[slice]:
    """0..size in steps, the last one perhaps shorter."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _tile_size(reduction: Reduction, block: Block, tile_size: int) -> int:
    return tile_size or _default(TILE if reduction.fused else GENERAL_TILE, block)


def _default(sizes: dict[str, int], block: Block) -> int:
    """The size of the block's device."""
    return sizes.get(block.left[0].device.type, sizes["cpu"])


@dataclass(frozen=True)
class Scaling:
    """How scores are multiplied by shared[0], for programs that take them so."""

    prescaled: bool = False  # the program takes z = scale·s
    late: bool = False  # z is the product times the scale; else the rows are

    @classmethod
    def of(cls, program: Program, block: Block) -> Scaling:
        """In the rows it costs b·D products instead of b·n, but would round narrow ones."""
        return cls(program.prescaled, program.prescaled and is_narrow(block.left[0]))


def _row_tiles(block: Block, size: int, scaling: Scaling) -> Iterator[tuple[slice, list[Tensor]]]:
    """(rows, their left operands, times the scale where it goes into the rows)."""
    for rows in slices(block.shape[0], size):
        left = [operand(x[rows]) for x in block.left]
        if scaling.prescaled and not scaling.late:
            left = [left[0] * block.shared[0]]
        yield rows, left


def _tile(
    block: Block,
    left: Sequence[Tensor],
    rows: slice,
    columns: slice,
    scratch: Scratch | None,
    scaling: Scaling,
) -> Tile:
    """The tile with its scores in `scratch`, or without scores where there is none."""
    scores = []
    if scratch is not None:
        m, n = rows.stop - rows.start, columns.stop - columns.start
        for k, (x, t) in enumerate(zip(left, block.right)):
            out = scratch.take(k, m, n, x)
            scores.append(multiply(x, operand(t[columns]).T, out))
        if scaling.late:
            scores[0].mul_(block.shared[0])

    offset = block.offset
    return Tile(
        tuple(scores),
        tuple(values[rows] for values in block.row_values),
        tuple(values[columns] for values in block.column_values),
        block.shared,
        None if offset is None else offset + rows.start - columns.start,
    )


def _places(reduction: Reduction, rows: slice, columns: slice) -> list[slice]:
    """Where the tile lies in each statistic."""
    return [rows] * len(reduction.rows) + [columns] * len(reduction.columns)
