"""Reductions one tile at a time: O(b·D) memory, exact gradients by recomputation, any device.

Forward streams the row and column statistics of every tile; backward recomputes each tile once and
takes all its gradients from it. With hand-derived programs (`fused.py`) symmetric InfoNCE costs
2B²D + 6B²D FLOPs; tiles that fit `budget` bytes are kept from forward and need no recomputation
(2B²D less where all fit). Deterministic for a given tile size; another tile size changes the order
of float additions, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlp.pairwise import fused
from vlp.pairwise.program import Program, Recompute
from vlp.pairwise.reduction import (
    Block,
    Gradients,
    Reduction,
    Tile,
    accumulation_dtype,
    empty_statistic,
    merge,
)

TILE = {
    "cpu": 1024,
    "cuda": 4096,
}  # 512 to 2,048 measured alike on a CPU; fewer tiles mean fewer thread barriers


@dataclass
class Kept:
    """Memos of tiles from forward, as many as fit."""

    budget: int
    memos: dict[tuple[int, int], Any] = field(default_factory=dict)

    def offer(self, key: tuple[int, int], memo: Any, n_bytes: int) -> bool:
        """Whether the memo was kept."""
        if n_bytes > self.budget:
            return False
        self.budget -= n_bytes
        self.memos[key] = memo
        return True


class Scratch:
    """Memory for the scores of one tile after another: fresh pages for each would cost a sixth of
    its GEMM.
    """

    def __init__(self) -> None:
        self.buffers: dict[int, Tensor] = {}

    def take(self, k: int, m: int, n: int, like: Tensor) -> Tensor:
        if k not in self.buffers or self.buffers[k].numel() < m * n:
            self.buffers[k] = like.new_empty(m * n)
        return self.buffers[k][: m * n].view(m, n)

    def forget(self) -> None:
        """Somebody keeps the last tile."""
        self.buffers.clear()


def reduce(reduction: Reduction, block: Block, kept: Kept, tile_size: int = 0) -> list[Tensor]:
    """Row statistics [b], then column statistics [n], in float64."""
    n_rows, n_columns = block.shape
    kinds = (*reduction.rows, *reduction.columns)
    program = program_for(reduction, block)
    sizes = [n_rows] * len(reduction.rows) + [n_columns] * len(reduction.columns)
    results = [
        empty_statistic(kind, size, block.left[0].device) for kind, size in zip(kinds, sizes)
    ]
    scratch = Scratch()
    for rows, left in _row_tiles(program, block, tile_size):
        for columns in _slices(n_columns, _tile_size(block, tile_size)):
            tile = _tile(block, left, rows, columns, scratch)
            partials, memo = program.forward(tile)
            for result, kind, where, partial in zip(
                results, kinds, _where(reduction, rows, columns), partials
            ):
                result[where] = merge(kind, result[where], partial)
            if kept.offer((rows.start, columns.start), memo, sum(s.nbytes for s in tile.scores)):
                scratch.forget()
    return results


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
    program = program_for(reduction, block)
    sink, scratch = _Sink(block, needed, program.prescaled), Scratch()
    for rows, left in _row_tiles(program, block, tile_size):
        sink.start_rows(rows)
        for columns in _slices(block.shape[1], _tile_size(block, tile_size)):
            memo = kept.memos.get((rows.start, columns.start))
            tile = _tile(block, left, rows, columns, scratch if memo is None else None)
            where = _where(reduction, rows, columns)
            found = program.backward(
                tile,
                memo,
                [s[w] for s, w in zip(statistics, where)],
                [u[w] for u, w in zip(upstream, where)],
            )
            sink.add(found, left, rows, columns)
        sink.finish_rows(rows)
    return sink.result()


class _Sink:
    """Where the gradients of tiles add up: dX = dS·T and dT = dSᵀ·X in the accumulation dtype."""

    def __init__(self, block: Block, needed: Sequence[bool], prescaled: bool) -> None:
        self.block, self.needed, self.prescaled = block, needed, prescaled
        flags = block.with_tensors(tuple(needed))
        self.flags = flags
        self.scale_needed = prescaled and flags.shared[0]

        def zeros(tensor: Tensor, wanted: bool) -> Tensor | None:
            return torch.zeros_like(tensor, dtype=accumulation_dtype(tensor)) if wanted else None

        self.left = [zeros(t, w or self.scale_needed) for t, w in zip(block.left, flags.left)]
        self.right = [zeros(t, w) for t, w in zip(block.right, flags.right)]
        self.row_values = [zeros(t, w) for t, w in zip(block.row_values, flags.row_values)]
        self.column_values = [zeros(t, w) for t, w in zip(block.column_values, flags.column_values)]
        self.shared = [zeros(t, w) for t, w in zip(block.shared, flags.shared)]

    def start_rows(self, rows: slice) -> None:
        self.current = [None if g is None else g[rows] for g in self.left]

    def add(self, found: Gradients, left: Sequence[Tensor], rows: slice, columns: slice) -> None:
        for k, d_scores in enumerate(found.scores):
            if d_scores is None:
                continue
            if self.current[k] is not None:
                self.current[k].addmm_(d_scores, _wide(self.block.right[k][columns]))
            if self.right[k] is not None:
                self.right[k][columns].addmm_(d_scores.T, left[k])
        for sums, parts, where in (
            (self.row_values, found.row_values, rows),
            (self.column_values, found.column_values, columns),
            (self.shared, found.shared, ...),
        ):
            for total, part in zip(sums, parts):
                if total is not None and part is not None:
                    total[where] += part

    def finish_rows(self, rows: slice) -> None:
        """With z = (scale·x)·t the sums hold dZ·T: dscale = Σ dz·s = ⟨X, dZ·T⟩, and dX =
        scale·dZ·T.
        """
        if not self.prescaled or self.current[0] is None:
            return
        if self.scale_needed:
            self.shared[0] += torch.linalg.vecdot(
                self.current[0], _wide(self.block.left[0][rows])
            ).sum()
        self.current[0].mul_(self.block.shared[0])

    def result(self) -> list[Tensor | None]:
        sums = (*self.left, *self.right, *self.row_values, *self.column_values, *self.shared)
        return [
            s.to(t.dtype) if w else None for s, t, w in zip(sums, self.block.tensors, self.needed)
        ]


def program_for(reduction: Reduction, block: Block) -> Program:
    return (
        fused.PROGRAMS[reduction.fused](reduction, block)
        if reduction.fused
        else Recompute(reduction)
    )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor))


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _tile_size(block: Block, tile_size: int) -> int:
    return tile_size or TILE.get(block.left[0].device.type, TILE["cpu"])


def _row_tiles(
    program: Program, block: Block, tile_size: int
) -> Iterator[tuple[slice, list[Tensor]]]:
    for rows in _slices(block.shape[0], _tile_size(block, tile_size)):
        left = [_wide(x[rows]) for x in block.left]
        yield rows, [left[0] * block.shared[0]] if program.prescaled else left


def _tile(
    block: Block, left: Sequence[Tensor], rows: slice, columns: slice, scratch: Scratch | None
) -> Tile:
    """The tile with its scores in `scratch`, or without scores where there is none."""
    m, n = rows.stop - rows.start, columns.stop - columns.start
    pairs = () if scratch is None else enumerate(zip(left, block.right))
    return Tile(
        tuple(
            torch.mm(x, _wide(t[columns]).T, out=scratch.take(k, m, n, x)) for k, (x, t) in pairs
        ),
        tuple(v[rows] for v in block.row_values),
        tuple(v[columns] for v in block.column_values),
        block.shared,
        None if block.offset is None else block.offset + rows.start - columns.start,
    )


def _where(reduction: Reduction, rows: slice, columns: slice) -> list[slice]:
    return [rows] * len(reduction.rows) + [columns] * len(reduction.columns)


@torch.no_grad()
def top_columns(
    left: Tensor, right: Tensor, k: int, offset: int | None, tile_size: int = 0
) -> Tensor:
    """[b, k] positions of the columns with the highest left·rightᵀ, best first; column i + offset
    is left out.
    """
    block = Block((left,), (right,), offset=offset)
    found = []
    for rows in _slices(len(left), _tile_size(block, tile_size)):
        best, where = (
            left.new_empty(rows.stop - rows.start, 0, dtype=accumulation_dtype(left)),
            None,
        )
        for columns in _slices(len(right), _tile_size(block, tile_size)):
            tile = _tile(block, [_wide(left[rows])], rows, columns, Scratch())
            scores = tile.scores[0].masked_fill_(tile.positive, -torch.inf)
            positions = torch.arange(columns.start, columns.stop, device=left.device).expand(
                len(scores), -1
            )
            best = torch.cat([best, scores], dim=1)
            where = positions if where is None else torch.cat([where, positions], dim=1)
            best, chosen = best.topk(min(k, best.shape[1]), dim=1)
            where = where.gather(1, chosen)
        found.append(where)
    return torch.cat(found)
