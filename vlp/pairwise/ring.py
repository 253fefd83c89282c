"""Reductions whose columns travel from neighbour to neighbour: O(b·D) memory for any group.

Blocks of b columns go round the ring of the group. Each rank's rows meet every block once in
forward; the next block is already on its way while the current one is computed. In backward the
blocks go round once more, and with each block travels the gradient of its columns, to which every
rank adds its part.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlp import dist
from vlp.pairwise import tiled
from vlp.pairwise.execution import Execution, full_precision, restorer
from vlp.pairwise.reduction import Block, Reduction, empty_statistic, merge, widened
from vlp.pairwise.tiled import Kept


class Ring(torch.autograd.Function):
    """(this rank's rows and columns) -> row statistics [b] and partial column statistics [n].

    As the gathered form returns them: rows complete, columns of the group in group order as far as
    this rank's rows go.
    """

    @staticmethod
    def forward(
        ctx: Any, reduction: Reduction, block: Block, execution: Execution, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        reduction, execution = _for_ring(reduction, execution)
        ctx.reduction, ctx.execution, ctx.restore = reduction, execution, restorer(block)
        group, n_row_kinds = execution.group, len(reduction.rows)
        implementation = execution.implementation
        assert implementation is not None  # `_for_ring` has chosen one
        n_rows, device = block.shape[0], block.left[0].device

        # No tile is kept for backward: memory must not grow with the group.
        rows = [empty_statistic(kind, n_rows, device) for kind in reduction.rows]
        columns: list[list[Any]] = [[None] * group.size for _ in reduction.columns]
        for owner, visitor in _visitors(block, group):
            with full_precision(block):
                statistics = implementation.reduce(reduction, visitor, Kept(0), execution.tile_size)

            # Rows meet every block, so their statistics merge; a block's columns come once.
            rows = [
                merge(kind, total, part)
                for kind, total, part in zip(reduction.rows, rows, statistics)
            ]
            for parts, part in zip(columns, statistics[n_row_kinds:]):
                parts[owner] = part

        # In group order, as the gathered form has them.
        results = (*rows, *(torch.cat(parts) for parts in columns))
        ctx.save_for_backward(*tensors, *results)
        return results

    @staticmethod
    @dist.first_order
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        block, statistics = ctx.restore(ctx.saved_tensors)
        reduction, execution, n_columns = ctx.reduction, ctx.execution, block.shape[1]
        needed = ctx.needs_input_grad[3:]  # after reduction, block, execution

        # Every rank computes every travelling gradient: a neighbour may need what this rank does
        # not.
        computed = block.with_tensors(needed)
        computed = replace(
            computed,
            right=(True,) * len(computed.right),
            column_values=(True,) * len(computed.column_values),
        )

        staying: list[Any] | None = None
        travelling: dist.Shift | None = None
        for owner, visitor in _visitors(block, execution.group):
            visited = slice(owner * n_columns, (owner + 1) * n_columns)
            with full_precision(block):
                gradients = execution.implementation.gradients(
                    reduction,
                    visitor,
                    _of_columns(reduction, statistics, visited),
                    _of_columns(reduction, upstream, visited),
                    Kept(0),
                    computed.tensors,
                    execution.tile_size,
                )
            part = block.with_tensors(tuple(gradients))
            staying = _add(staying, (*part.left, *part.row_values, *part.shared))

            # The sums of this block come from the neighbour who had it before; they travelled while
            # this rank computed.
            arrived = None if travelling is None else travelling.wait()
            travelling = dist.Shift(_add(arrived, _travellers(part)), execution.group)

        assert travelling is not None and staying is not None  # a group has at least one rank
        home = travelling.wait()  # one hop more, and each block's gradient is back at its owner
        total = _assemble(block, staying, home)
        return None, None, None, *_narrowed(total, block, needed)


def _visitors(block: Block, group: dist.Group) -> Iterator[tuple[int, Block]]:
    """(owner, this rank's rows against the owner's columns), own columns first.

    While the caller computes, the next block is already on its way.
    """
    current = block
    for hop in range(group.size):
        last = hop == group.size - 1
        moving = None if last else dist.Shift(_travellers(current), group)
        yield (group.index - hop) % group.size, current

        if moving:
            arrived = tuple(moving.wait())
            right, column_values = arrived[: len(block.right)], arrived[len(block.right) :]
            # Columns from elsewhere are nobody's pair here.
            current = replace(block, right=right, column_values=column_values, offset=None)


def _travellers(block: Block) -> tuple[Tensor, ...]:
    return (*block.right, *block.column_values)


def _add(total: Sequence[Any] | None, part: Sequence[Any]) -> list[Any]:
    """Sums in the accumulation dtype, so that a bfloat16 gradient is rounded once a hop at most.

    None among the tensors stands for a gradient that is not needed.
    """
    part = [None if tensor is None else widened(tensor) for tensor in part]
    if total is None:
        return part
    return [new if old is None else old + new for old, new in zip(total, part)]


def _assemble(block: Block, staying: list[Any], home: list[Tensor]) -> Block:
    """The gradients of a block from those that stayed (rows, shared) and those that came home."""
    n_left, n_values, n_right = len(block.left), len(block.row_values), len(block.right)
    return replace(
        block,
        left=tuple(staying[:n_left]),
        row_values=tuple(staying[n_left : n_left + n_values]),
        shared=tuple(staying[n_left + n_values :]),
        right=tuple(home[:n_right]),
        column_values=tuple(home[n_right:]),
    )


def _narrowed(gradients: Block, block: Block, needed: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that autograd asked for, in the dtypes of the block."""
    results = []
    for gradient, tensor, wanted in zip(gradients.tensors, block.tensors, needed):
        missing = gradient is None or not wanted
        results.append(None if missing else gradient.to(tensor.dtype))
    return results


def _of_columns(reduction: Reduction, values: Sequence[Tensor], columns: slice) -> list[Tensor]:
    """The values of all rows, and of these columns of the group."""
    n_row_kinds = len(reduction.rows)
    return [*values[:n_row_kinds], *(value[columns] for value in values[n_row_kinds:])]


def _for_ring(reduction: Reduction, execution: Execution) -> tuple[Reduction, Execution]:
    """The dense reference on a ring is the general path with one tile a block."""
    if execution.implementation is not None:
        return reduction, execution
    one_tile = replace(execution, implementation=tiled, tile_size=sys.maxsize)
    return replace(reduction, fused=""), one_tile
