"""Ranks, groups of ranks, and collectives that differentiate by SUM.

Every collective takes a `Group` and does nothing at size 1. Nothing here trusts a launcher:
`torch.distributed` is asked (under DeepSpeed on CPU, Accelerate reports one process and every rank
as main).

Averaging convention of this project: the average over ranks of what ranks return has exactly the
value and the gradient of the single-process term. The engines (DDP, FSDP, ZeRO) average gradients
over ranks, so a collective's backward must be the SUM of what the ranks ask for:

    all_gather  <->  reduce_scatter (SUM)        all_reduce (SUM)  <->  all_reduce (SUM)
    all_to_all  <->  all_to_all

(A reduce-scatter that averages makes the gathered gradient 1/g of the right one; an all-reduce
whose backward is the identity makes it 1/W.)
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

# Ranks whose sum may be rounded to bf16 at every hop of a ring: off by .4 % at 8, 1 % at 64, 5 % at
# 2,048 (measured). Above, sums travel in float32, twice the bytes, and are rounded once.
ROUNDED_UP_TO = 8

# This process and the others


def initialised() -> bool:
    """Whether this process belongs to an initialised process group."""
    return torch_dist.is_available() and torch_dist.is_initialized()


def rank() -> int:
    return torch_dist.get_rank() if initialised() else 0


def world_size() -> int:
    return torch_dist.get_world_size() if initialised() else 1


def local_rank() -> int:
    """Rank inside this node, as the launcher says; 0 without one."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """How many ranks run on this node, as the launcher says; 1 without one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


# Groups of ranks


@dataclass(frozen=True)
class Group:
    """Some ranks, in order, one of which is this process."""

    ranks: tuple[int, ...] = (0,)
    # torch.distributed.ProcessGroup; None where there is nobody to talk to
    handle: Any = None

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def index(self) -> int:
        """Position of this process in the group."""
        return self.ranks.index(rank())


def world() -> Group:
    """All ranks of the initialised process group, or this process alone."""
    if world_size() == 1:
        return Group((rank(),))
    return Group(tuple(range(world_size())), torch_dist.group.WORLD)


def group_of(handle: Any | None) -> Group:
    """The Group behind a torch ProcessGroup; `world()` for None."""
    if handle is None:
        return world()
    ranks = tuple(torch_dist.get_process_group_ranks(handle))
    # Collectives need this rank's place in the group.
    if rank() not in ranks:
        raise ValueError(
            f"rank {rank()} is not in the process group of ranks {ranks}; pass a group that "
            "contains it"
        )
    return Group(ranks, handle if len(ranks) > 1 else None)


def subgroup(ranks: Sequence[int]) -> Group:
    """A new group of these global ranks, of which this process is one.

    Collective among the members only.
    """
    ranks = tuple(ranks)
    # What needs no new process group gets none.
    if len(ranks) == 1:
        return Group(ranks)
    if ranks == tuple(range(world_size())):
        return world()
    return Group(ranks, torch_dist.new_group(list(ranks), use_local_synchronization=True))


# Objects: slow, for start-up and messages


def barrier(group: Group | None = None) -> None:
    """Wait until every rank of the group is here."""
    group = group or world()
    if group.size > 1:
        torch_dist.barrier(group=group.handle)


def gather_objects(value: Any, group: Group | None = None) -> list[Any]:
    """Every rank's `value` (any picklable object), in group order."""
    group = group or world()
    if group.size == 1:
        return [value]
    values: list[Any] = [None] * group.size
    torch_dist.all_gather_object(values, value, group=group.handle)
    return values


def broadcast_object(value: Any, group: Group | None = None) -> Any:
    """The first rank's `value` on every rank of the group."""
    group = group or world()
    if group.size == 1:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=group.ranks[0], group=group.handle)
    return box[0]


# Tensors, with gradients


def all_gather(value: Tensor, group: Group) -> Tensor:
    """[b, ...] of each rank -> [g·b, ...] in group order. Gradient: reduce-scatter with SUM."""
    return value if group.size == 1 else _AllGather.apply(value, group)


def reduce_scatter(value: Tensor, group: Group) -> Tensor:
    """[g·b, ...] of each rank -> this rank's [b, ...] of their sum. Gradient: all-gather."""
    return value if group.size == 1 else _ReduceScatter.apply(value, group)


def all_reduce(value: Tensor, group: Group) -> Tensor:
    """Sum over ranks, on every rank. Gradient: the sum over ranks of the incoming gradients."""
    return value if group.size == 1 else _AllReduce.apply(value, group)


def all_to_all(value: Tensor, group: Group) -> Tensor:
    """[g·b, ...], block k meant for rank k -> [g·b, ...], block k come from rank k.

    Gradient: the way back.
    """
    return value if group.size == 1 else _AllToAll.apply(value, group)


# Tensors, without gradients


def exchange_rows(value: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """Rows that change ranks: receive[k] rows of rank k, rank by rank. Not differentiable.

    The first send[0] rows of `value` go to the group's first rank, the next send[1] to its
    second, …
    """
    if group.size == 1:
        return value

    bits = value.view(torch.uint8) if value.dtype == torch.bool else value  # gloo exchanges no bool
    arrived = bits.new_empty(sum(receive), *bits.shape[1:])
    torch_dist.all_to_all_single(arrived, bits.contiguous(), receive, send, group=group.handle)
    return arrived.view(value.dtype)


class Shift:
    """Tensors on their way to the next rank of a ring, while this rank computes.

    `Shift(tensors, group).wait()` sends to position index + 1 and receives from index − 1. Not
    differentiable: the ring reductions of `vlp.pairwise` circulate values and gradients themselves.
    """

    def __init__(self, tensors: Sequence[Tensor], group: Group) -> None:
        target = group.ranks[(group.index + 1) % group.size]
        source = group.ranks[group.index - 1]

        # Both directions in one batch, so that no rank waits for another's turn.
        self.sent = [tensor.contiguous() for tensor in tensors]  # held until the transfer is over
        self.received = [torch.empty_like(tensor) for tensor in self.sent]
        operations = [
            torch_dist.P2POp(torch_dist.isend, tensor, target, group.handle) for tensor in self.sent
        ]
        operations += [
            torch_dist.P2POp(torch_dist.irecv, tensor, source, group.handle)
            for tensor in self.received
        ]
        self.work = torch_dist.batch_isend_irecv(operations)

    def wait(self) -> list[Tensor]:
        """The tensors of the rank before."""
        for work in self.work:
            work.wait()
        return self.received


# What the differentiable collectives are made of: each is the backward of another


def _gather(value: Tensor, group: Group) -> Tensor:
    result = value.new_empty(group.size * value.shape[0], *value.shape[1:])
    torch_dist.all_gather_into_tensor(result, value.contiguous(), group=group.handle)
    return result


def _scatter_sum(value: Tensor, group: Group) -> Tensor:
    # A ring adds one rank after another, and would round each time.
    in_half = value.dtype in (torch.bfloat16, torch.float16)
    wide = value.float() if in_half and group.size > ROUNDED_UP_TO else value

    result = wide.new_empty(wide.shape[0] // group.size, *wide.shape[1:])
    torch_dist.reduce_scatter_tensor(result, wide.contiguous(), group=group.handle)
    return result.to(value.dtype)


def _sum(value: Tensor, group: Group) -> Tensor:
    # torch reduces in place, and the value belongs to the caller's graph.
    result = value.contiguous().clone()
    torch_dist.all_reduce(result, group=group.handle)
    return result


def _exchange(value: Tensor, group: Group) -> Tensor:
    result = torch.empty_like(value, memory_format=torch.contiguous_format)
    torch_dist.all_to_all_single(result, value.contiguous(), group=group.handle)
    return result


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the backward of an autograd Function whose gradient has no graph.

    With create_graph=True it raises. (torch's once_differentiable returns gradients without a graph
    where the upstream gradient has none: a penalty on the gradient would then be silently
    constant.)
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        # Autograd enables gradients inside a backward only where a graph of it is wanted.
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "create_graph=True: gradients of objectives and of exchanges between ranks cannot "
                "be differentiated again. Call backward or torch.autograd.grad without it, or "
                "write the term in plain torch"
            )
        return backward(ctx, *gradients)

    return checked


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather(value, group)

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _scatter_sum(gradient, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _scatter_sum(value, group)

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gather(gradient, ctx.group), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _sum(value, group)

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(gradient, ctx.group), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _exchange(value, group)

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradient, ctx.group), None
