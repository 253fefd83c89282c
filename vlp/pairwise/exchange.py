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

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from vlp import dist
from vlp.pairwise import dense, tiled
from vlp.pairwise.reduction import (
    SUM,
    Block,
    Reduction,
    accumulation_dtype,
    empty_statistic,
    logsumexp,
    merge,
)
from vlp.pairwise.tiled import Kept


class Implementation(Protocol):
    """A way to compute one block: its statistics, and their gradients."""

    def reduce(
        self, reduction: Reduction, block: Block, kept: Kept, tile_size: int = 0
    ) -> list[Tensor]: ...

    def gradients(
        self,
        reduction: Reduction,
        block: Block,
        statistics: list[Tensor],
        upstream: list[Tensor],
        kept: Kept,
        needed: Sequence[bool],
        tile_size: int = 0,
    ) -> list[Tensor | None]: ...


@dataclass(frozen=True)
class Execution:
    """All that `reduce` needs to know besides tensors."""

    group: dist.Group
    ring: bool = False
    implementation: Implementation | None = None  # None: the dense reference
    memory_budget: int = 0  # bytes for tiles kept from forward
    tile_size: int = 0  # 0: the device's default


def reduce(reduction: Reduction, block: Block, execution: Execution) -> tuple[Tensor, ...]:
    """Statistics of this rank's rows [b], then of its own columns [b], over all rows and columns of
    the group.

    `block` holds this rank's rows and its own columns; `block.offset` is 0 where the pair of row i
    is column i, None where columns are no one's pair. Gradients follow the convention of
    `vlp.dist`: what this rank's columns receive is the sum over the group.
    """
    n_rows = len(reduction.rows)
    if execution.ring and execution.group.size > 1:
        found = _Ring.apply(reduction, block, execution, *block.tensors)
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
        ctx.reduction, ctx.execution, ctx.restore = reduction, execution, _restorer(block)
        ctx.kept = Kept(execution.memory_budget if any(ctx.needs_input_grad) else 0)
        with _full_precision(block):
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
        with _full_precision(block):
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


class _Ring(torch.autograd.Function):
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
        ctx.reduction, ctx.execution, ctx.restore = reduction, execution, _restorer(block)
        n_rows = len(reduction.rows)
        rows = [
            empty_statistic(kind, block.shape[0], block.left[0].device) for kind in reduction.rows
        ]
        columns: list[list[Any]] = [[None] * execution.group.size for _ in reduction.columns]
        for owner, visitor in _visitors(block, execution.group):
            with _full_precision(block):
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
            with _full_precision(block):
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


def _restorer(block: Block) -> Any:
    """A function from saved tensors back to (block, statistics): autograd must own the tensors, not
    the block.
    """
    n, spec = len(block.tensors), block.with_tensors((None,) * len(block.tensors))
    return lambda saved: (spec.with_tensors(saved[:n]), list(saved[n:]))


def _full_precision(block: Block) -> torch.autocast:
    """Autocast would turn the float32 products of a tile into bfloat16."""
    return torch.autocast(block.left[0].device.type, enabled=False)
