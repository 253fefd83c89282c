"""Reductions over the candidates of a group of ranks, differentiable in everything.

Each rank owns b rows and brings its own b columns; the columns of the whole group, n = g·b, are its
candidates.

gather (one tower moves): the columns' tensors are gathered; each rank streams its b × n tiles once,
which gives its rows' statistics and PARTIAL column statistics. These go to the columns' owners (n
numbers), where they are merged; in backward the owners send the columns' upstream weights back by
the same way, each rank computes the gradients of its rows and partial gradients of all n columns,
and the latter are reduce-scattered with SUM.

ring: the same, but blocks of b columns travel from neighbour to neighbour, the next in flight while
the current one is computed, and in backward once more, each with its gradient: O(b·D) memory
instead of O(n·D).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlp import dist
from vlp.pairwise import dense
from vlp.pairwise.execution import Execution, full_precision, restorer
from vlp.pairwise.reduction import (
    SUM,
    Block,
    Reduction,
    logsumexp,
)
from vlp.pairwise.ring import Ring
from vlp.pairwise.tiled import Kept


def reduce(reduction: Reduction, block: Block, execution: Execution) -> tuple[Tensor, ...]:
    """Statistics of this rank's rows [b], then of its own columns [b], over all rows and columns of
    the group.

    `block` holds this rank's rows and its own columns; `block.offset` is 0 where the pair of row i
    is column i, None where columns are no one's pair. Gradients follow the convention of
    `vlp.dist`: what this rank's columns receive is the sum over the group.
    """
    n_rows = len(reduction.rows)
    if execution.ring and execution.group.size > 1:
        found = Ring.apply(reduction, block, execution, *block.tensors)
    else:
        found = _gathered(reduction, block, execution)
    columns = [
        _to_owners(kind, part, execution.group)
        for kind, part in zip(reduction.columns, found[n_rows:])
    ]
    return (*found[:n_rows], *columns)


def _gathered(reduction: Reduction, block: Block, execution: Execution) -> tuple[Tensor, ...]:
    group, own = execution.group, block.right[0].shape[0]
    whole = replace(
        block,
        right=_gather_once(block.right, group),
        column_values=_gather_once(block.column_values, group),
        offset=None if block.offset is None else block.offset + group.index * own,
    )
    if execution.implementation is None:
        return dense.reduce(reduction, whole)
    return _Local.apply(reduction, whole, execution, *whole.tensors)


def _gather_once(tensors: tuple[Tensor, ...], group: dist.Group) -> tuple[Tensor, ...]:
    """Gather each distinct tensor once, however often it appears."""
    gathered = {id(t): dist.all_gather(t, group) for t in {id(t): t for t in tensors}.values()}
    return tuple(gathered[id(t)] for t in tensors)


def _to_owners(kind: str, partial: Tensor, group: dist.Group) -> Tensor:
    """[n] partial column statistics of each rank -> [b] statistics of this rank's own columns."""
    if group.size == 1:
        return partial
    if kind == SUM:
        return dist.reduce_scatter(partial, group)
    return logsumexp(dist.all_to_all(partial, group).view(group.size, -1), dim=0)


class _Local(torch.autograd.Function):
    """One block, all of whose columns are here."""

    @staticmethod
    def forward(
        ctx: Any, reduction: Reduction, block: Block, execution: Execution, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.reduction, ctx.execution, ctx.restore = reduction, execution, restorer(block)
        ctx.kept = Kept(execution.memory_budget if any(ctx.needs_input_grad) else 0)
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
        needed = ctx.needs_input_grad[3:]
        with full_precision(block):
            found = ctx.execution.implementation.gradients(
                ctx.reduction,
                block,
                statistics,
                list(upstream),
                ctx.kept,
                needed,
                ctx.execution.tile_size,
            )
        return (None, None, None, *found)
