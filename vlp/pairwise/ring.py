"""A reduction whose columns travel from neighbour to neighbour."""

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
from vlp.pairwise.reduction import Block, Reduction, accumulation_dtype, empty_statistic, merge
from vlp.pairwise.tiled import Kept


class Ring(torch.autograd.Function):
    """Blocks of columns travel; this rank's rows meet each of them once in forward and once in
    backward.

    Returns total row statistics [b] and partial column statistics [n] in group order, as the
    gathered form does.
    """

    @staticmethod
    def forward(
        ctx: Any, reduction: Reduction, block: Block, execution: Execution, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        reduction, execution = _for_ring(reduction, execution)
        ctx.reduction, ctx.execution, ctx.restore = reduction, execution, restorer(block)
        n_rows = len(reduction.rows)
        rows = [
            empty_statistic(kind, block.shape[0], block.left[0].device) for kind in reduction.rows
        ]
        columns: list[list[Any]] = [[None] * execution.group.size for _ in reduction.columns]
        for owner, visitor in _visitors(block, execution.group):
            with full_precision(block):
                found = execution.implementation.reduce(
                    reduction, visitor, Kept(0), execution.tile_size
                )
            rows = [merge(kind, old, new) for kind, old, new in zip(reduction.rows, rows, found)]
            for parts, part in zip(columns, found[n_rows:]):
                parts[owner] = part
        statistics = (*rows, *(torch.cat(parts) for parts in columns))
        ctx.save_for_backward(*tensors, *statistics)
        return statistics

    @staticmethod
    @dist.first_order
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        block, statistics = ctx.restore(ctx.saved_tensors)
        reduction, execution, n_columns = ctx.reduction, ctx.execution, block.shape[1]
        # Every rank computes every travelling gradient: a neighbour may need what this rank does
        # not.
        wanted = block.with_tensors(ctx.needs_input_grad[3:])
        wanted = replace(
            wanted,
            right=(True,) * len(wanted.right),
            column_values=(True,) * len(wanted.column_values),
        )
        staying, travelling = None, None
        for owner, visitor in _visitors(block, execution.group):
            own = slice(owner * n_columns, (owner + 1) * n_columns)
            with full_precision(block):
                found = execution.implementation.gradients(
                    reduction,
                    visitor,
                    _cut(reduction, statistics, own),
                    _cut(reduction, upstream, own),
                    Kept(0),
                    wanted.tensors,
                    execution.tile_size,
                )
            part = block.with_tensors(tuple(found))
            staying = _add(staying, (*part.left, *part.row_values, *part.shared))
            # The sums of this block come from the neighbour who had it before; they travelled while
            # we computed.
            arrived = None if travelling is None else travelling.wait()
            travelling = dist.Shift(_add(arrived, _travellers(part)), execution.group)
        home = travelling.wait()  # one hop more, and each block's gradient is back at its owner
        total = _assemble(block, staying, home)
        return (
            None,
            None,
            None,
            *(
                g.to(t.dtype) if wanted and g is not None else None
                for g, t, wanted in zip(total.tensors, block.tensors, ctx.needs_input_grad[3:])
            ),
        )


def _visitors(block: Block, group: dist.Group) -> Iterator[tuple[int, Block]]:
    """(owner, this rank's rows against the owner's columns), own columns first; the next block is
    already on its way.
    """
    current = block
    for hop in range(group.size):
        moving = dist.Shift(_travellers(current), group) if hop < group.size - 1 else None
        yield (group.index - hop) % group.size, current
        if moving:
            arrived = tuple(moving.wait())
            right, values = arrived[: len(block.right)], arrived[len(block.right) :]
            current = replace(
                block, right=right, column_values=values, offset=None
            )  # strangers: nobody's pair


def _travellers(block: Block) -> tuple[Tensor, ...]:
    return (*block.right, *block.column_values)


def _assemble(block: Block, staying: list[Tensor | None], home: list[Tensor]) -> Block:
    n_left, n_values, n_right = len(block.left), len(block.row_values), len(block.right)
    return replace(
        block,
        left=tuple(staying[:n_left]),
        row_values=tuple(staying[n_left : n_left + n_values]),
        shared=tuple(staying[n_left + n_values :]),
        right=tuple(home[:n_right]),
        column_values=tuple(home[n_right:]),
    )


def _add(
    total: Sequence[Tensor | None] | None, part: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Sums in the accumulation dtype, so that a bfloat16 gradient is rounded once a hop at most."""
    part = [None if p is None else p.to(accumulation_dtype(p)) for p in part]
    return part if total is None else [p if t is None else t + p for t, p in zip(total, part)]


def _cut(reduction: Reduction, values: Sequence[Tensor], own: slice) -> list[Tensor]:
    n_rows = len(reduction.rows)
    return [*values[:n_rows], *(v[own] for v in values[n_rows:])]


def _for_ring(reduction: Reduction, execution: Execution) -> tuple[Reduction, Execution]:
    """The dense reference on a ring is the general path with one tile a block."""
    if execution.implementation is not None:
        return reduction, execution
    return replace(reduction, fused=""), replace(
        execution, implementation=tiled, tile_size=sys.maxsize
    )
