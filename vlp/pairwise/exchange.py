"""Reductions over the candidates of a group of ranks, differentiable in everything.

Each rank owns b rows and brings its own b columns; the columns of the whole group, n = g·b, are its
candidates. In the gathered form, which this file holds, one tower moves:

    forward    gather the columns' tensors of the group: b → n columns
               stream the b × n tiles once: statistics of b rows, and PARTIAL ones of n columns
               send the latter to the columns' owners, where they are merged: n numbers
    backward   the owners send the columns' upstream weights back by the same way: n numbers
               stream the tiles again: gradients of b rows, and partial ones of n columns
               reduce-scatter the latter with SUM: n → b columns

With upstream weights of its own for foreign columns a rank would get the right loss, and gradients
that are 15 % wrong; hence the way back. With `exchange: ring` columns travel instead (`ring.py`):
the same statistics in O(b·D) memory instead of O(n·D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlp import dist
from vlp.pairwise import dense
from vlp.pairwise.execution import Execution, full_precision, restorer
from vlp.pairwise.reduction import SUM, Block, Reduction, logsumexp
from vlp.pairwise.ring import Ring
from vlp.pairwise.tiled import Kept

# How tensors of this rank's columns become those of the group.
Gather = Callable[[Tensor, dist.Group], Tensor]


def reduce(
    reduction: Reduction, block: Block, execution: Execution, gather: Gather = dist.all_gather
) -> tuple[Tensor, ...]:
    """Statistics of this rank's rows [b], then of its own columns [b], over the whole group.

    `block` holds this rank's rows and its own columns; `block.offset` is 0 where the pair of row i
    is column i, None where columns are no one's pair. Gradients follow the convention of
    `vlp.dist`: what this rank's columns receive is the sum over the group.
    """
    group, n_row_kinds = execution.group, len(reduction.rows)

    if execution.ring and group.size > 1:
        statistics = Ring.apply(reduction, block, execution, *block.tensors)
    else:
        statistics = _gathered(reduction, block, execution, gather)

    # Rows are complete; columns have met this rank's rows only.
    rows, partial_columns = statistics[:n_row_kinds], statistics[n_row_kinds:]
    columns = [
        _to_owners(kind, partial, group)
        for kind, partial in zip(reduction.columns, partial_columns)
    ]
    return (*rows, *columns)


def _gathered(
    reduction: Reduction, block: Block, execution: Execution, gather: Gather
) -> tuple[Tensor, ...]:
    """Row statistics [b] and partial column statistics [n] against the gathered columns."""
    group = execution.group

    # The pair of this rank's row i is now column i of this rank's part of the columns.
    offset = block.offset
    if offset is not None:
        offset += group.index * block.right[0].shape[0]

    # From here on the block is against the columns of all the group.
    whole = replace(
        block,
        right=_gather_once(block.right, group, gather),
        column_values=_gather_once(block.column_values, group, gather),
        offset=offset,
    )
    # Autograd finds its own way through the dense reference.
    if execution.implementation is None:
        return dense.reduce(reduction, whole)
    return _Local.apply(reduction, whole, execution, *whole.tensors)


def _gather_once(
    tensors: tuple[Tensor, ...], group: dist.Group, gather: Gather
) -> tuple[Tensor, ...]:
    """Gather each distinct tensor once, however often it appears."""
    distinct = {id(tensor): tensor for tensor in tensors}
    gathered = {key: gather(tensor, group) for key, tensor in distinct.items()}
    return tuple(gathered[id(tensor)] for tensor in tensors)


def _to_owners(kind: str, partial: Tensor, group: dist.Group) -> Tensor:
    """[n] partial column statistics of each rank -> [b] statistics of this rank's own columns."""
    # Alone, they are whole already.
    if group.size == 1:
        return partial
    if kind == SUM:
        return dist.reduce_scatter(partial, group)

    # A log-sum-exp is no sum: the owner needs every rank's part.
    parts = dist.all_to_all(partial, group).view(group.size, -1)  # [g, b]
    return logsumexp(parts, dim=0)


class _Local(torch.autograd.Function):
    """One block, all of whose columns are here."""

    @staticmethod
    def forward(
        ctx: Any, reduction: Reduction, block: Block, execution: Execution, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.reduction, ctx.execution, ctx.restore = reduction, execution, restorer(block)

        # Tiles are kept for a backward only: evaluation pays no memory.
        ctx.kept = Kept(execution.memory_budget if any(ctx.needs_input_grad) else 0)
        assert execution.implementation is not None  # the dense reference has no need of this
        with full_precision(block):
            statistics = execution.implementation.reduce(
                reduction, block, ctx.kept, execution.tile_size
            )
        ctx.save_for_backward(*tensors, *statistics)
        return tuple(statistics)

    @staticmethod
    @dist.first_order
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        block, statistics = ctx.restore(ctx.saved_tensors)
        needed = ctx.needs_input_grad[3:]  # after reduction, block, execution

        with full_precision(block):
            gradients = ctx.execution.implementation.gradients(
                ctx.reduction,
                block,
                statistics,
                list(upstream),
                ctx.kept,
                needed,
                ctx.execution.tile_size,
            )
        return (None, None, None, *gradients)
