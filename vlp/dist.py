"""Exchanges between ranks: objects, and tensors by collectives that differentiate by SUM.

Every collective takes a `Group` (vlp.groups) and does nothing at size 1.

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
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from vlp import log
from vlp.groups import (
    Group,
    apart,
    group_of,
    initialised,
    is_main,
    local_rank,
    local_world_size,
    rank,
    split,
    within,
    world,
    world_size,
)

# Ranks whose sum may be rounded to bf16 at every hop of a ring: off by .4 % at 8, 1 % at 64, 5 % at
# 2,048 (measured). Above, sums travel in float32, twice the bytes, and are rounded once.
ROUNDED_UP_TO = 8

__all__ = [
    "Gathering", "Group", "Shift", "all_gather", "all_reduce", "all_to_all", "apart", "await_all",
    "barrier", "broadcast_object", "control_handle", "exchange_rows", "first_order",
    "gather_objects", "group_of", "initialised", "is_main", "local_rank", "local_world_size",
    "rank", "reduce_scatter", "set_control", "split", "to_all", "to_first", "within", "world",
    "world_size",
]  # fmt: skip

_SAY_EVERY_S = 60  # between the lines of a rank that waits

# Objects: slow, for start-up and messages


_control: Any = None  # process group for objects of the world; None: the world's own


def set_control(handle: Any | None) -> None:
    """Let objects and barriers of the world go over this process group of all ranks (gloo), which
    needs no GPU and has a limit of time of its own.
    """
    global _control
    _control = handle


def control_handle(group: Group) -> Any:
    """The process group over which objects of `group` travel."""
    if group.point_to_point:
        raise ValueError(f"ranks {group.ranks} share a communicator, which carries tensors only")
    of_world = _control is not None and group.handle is torch_dist.group.WORLD
    return _control if of_world else group.handle


def barrier(group: Group | None = None) -> None:
    """Wait until every rank of the group is here."""
    group = group or world()
    if group.size > 1:
        torch_dist.barrier(group=control_handle(group))


def await_all(doing: str) -> None:
    """Wait until every rank is here, however long the slowest is `doing` something; says every
    minute what is waited for. Collective over the world.

    A rank that dies ends the wait with an error. Signals are served meanwhile, which a plain
    barrier would not do.
    """
    if world_size() == 1:
        return
    work = torch_dist.barrier(group=control_handle(world()), async_op=True)

    started = said = time.monotonic()
    pause_s = 0.001
    while not work.is_completed():
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.1)

        # The first two ranks: one of them waits, whichever rank is late.
        now = time.monotonic()
        if now - said > _SAY_EVERY_S and rank() < 2:
            said = now
            log.warn(f"waiting for {doing} since {(now - started) / 60:.0f} min")
    work.wait()  # raises what went wrong


def gather_objects(value: Any, group: Group | None = None) -> list[Any]:
    """Every rank's `value` (any picklable object), in group order."""
    group = group or world()
    if group.size == 1:
        return [value]
    values: list[Any] = [None] * group.size
    torch_dist.all_gather_object(values, value, group=control_handle(group))
    return values


def broadcast_object(value: Any, group: Group | None = None) -> Any:
    """The first rank's `value` on every rank of the group."""
    group = group or world()
    if group.size == 1:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=group.ranks[0], group=control_handle(group))
    return box[0]


# Tensors through the CPU


def to_first(value: Tensor, group: Group) -> list[Tensor]:
    """Every rank's `value`, of one shape, on the CPU of the group's first rank; [] on the others.

    Over gloo wherever there is such a group: no GPU holds what is gathered. Not differentiable.
    """
    value = value.detach()
    if group.size == 1:
        return [value.cpu()]

    # A caller's own NCCL group knows GPUs only.
    handle = control_handle(group)
    on_gpu = torch_dist.get_backend(handle) == "nccl"
    sent = value.contiguous() if on_gpu else value.contiguous().cpu()
    first = group.index == 0
    parts = [torch.empty_like(sent) for _ in group.ranks] if first else None
    torch_dist.gather(sent, parts, dst=group.ranks[0], group=handle)
    return [part.cpu() for part in parts or ()]


def to_all(value: Tensor, group: Group) -> Tensor:
    """[...] of each rank, of one shape and on the CPU -> [g, ...] on every rank, on the CPU.

    Over gloo wherever there is such a group. Not differentiable.
    """
    handle = control_handle(group)
    sent = value.cuda() if torch_dist.get_backend(handle) == "nccl" else value
    gathered = sent.new_empty(group.size * sent.numel())
    torch_dist.all_gather_into_tensor(gathered, sent.flatten(), group=handle)
    return gathered.cpu().view(group.size, *sent.shape)


# Tensors, with gradients


def all_gather(value: Tensor, group: Group, begun: Gathering | None = None) -> Tensor:
    """[b, ...] of each rank -> [g·b, ...] in group order. Gradient: reduce-scatter with SUM.

    begun: the exchange of `value` in this group, where it is under way or over.
    """
    if group.size == 1:
        return value
    if begun is None:
        return _AllGather.apply(value, group)
    return _AllGatherBegun.apply(value, begun, group)


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
    bits = bits.contiguous()
    arrived = bits.new_empty(sum(receive), *bits.shape[1:])
    if group.point_to_point:
        _swap(bits.split(send), arrived.split(receive), group)
    else:
        torch_dist.all_to_all_single(arrived, bits, receive, send, group=group.handle)
    return arrived.view(value.dtype)


class Gathering:
    """[b, ...] of each rank on its way to [g·b, ...] in group order, while this rank computes.

    Every rank of the group begins it at the same place among its exchanges. Not differentiable:
    `all_gather` takes it over, and has the gradient.
    """

    def __init__(self, value: Tensor, group: Group) -> None:
        self.sent = value.detach().contiguous()  # held until the transfer is over
        n_rows = group.size * self.sent.shape[0]
        self.received = self.sent.new_empty(n_rows, *self.sent.shape[1:])

        if group.point_to_point:
            parts = self.received.chunk(group.size)
            self.works = _swapping([self.sent] * group.size, parts, group)
            return
        work = torch_dist.all_gather_into_tensor(
            self.received, self.sent, group=group.handle, async_op=True
        )
        assert work is not None  # None is for ranks outside the group
        self.works = [work]

    def wait(self) -> Tensor:
        """The rows of all ranks, which nobody may change in place."""
        for work in self.works:
            work.wait()
        self.works = []
        return self.received


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
    return Gathering(value, group).wait()


def _scatter_sum(value: Tensor, group: Group) -> Tensor:
    if group.point_to_point:
        # Summed by the receiver, so half precision is rounded once instead of at every hop.
        return _exchange(value, group).unflatten(0, (group.size, -1)).sum(0, dtype=value.dtype)

    # A ring adds one rank after another, and would round each time.
    in_half = value.dtype in (torch.bfloat16, torch.float16)
    wide = value.float() if in_half and group.size > ROUNDED_UP_TO else value

    result = wide.new_empty(wide.shape[0] // group.size, *wide.shape[1:])
    torch_dist.reduce_scatter_tensor(result, wide.contiguous(), group=group.handle)
    return result.to(value.dtype)


def _sum(value: Tensor, group: Group) -> Tensor:
    if group.point_to_point:
        return _gather(value.unsqueeze(0), group).sum(0, dtype=value.dtype)

    # torch reduces in place, and the value belongs to the caller's graph.
    result = value.contiguous().clone()
    torch_dist.all_reduce(result, group=group.handle)
    return result


def _exchange(value: Tensor, group: Group) -> Tensor:
    value = value.contiguous()
    result = torch.empty_like(value)
    if group.point_to_point:
        _swap(value.chunk(group.size), result.chunk(group.size), group)
    else:
        torch_dist.all_to_all_single(result, value, group=group.handle)
    return result


def _swap(outgoing: Sequence[Tensor], arriving: Sequence[Tensor], group: Group) -> None:
    """Send block k to member k, and let its block for this rank arrive in `arriving[k]`."""
    for work in _swapping(outgoing, arriving, group):
        work.wait()


def _swapping(
    outgoing: Sequence[Tensor], arriving: Sequence[Tensor], group: Group
) -> list[torch_dist.Work]:
    """`_swap` under way: what is still to be waited for."""
    operations = []
    for member, sent, received in zip(group.ranks, outgoing, arriving):
        if member == rank():
            received.copy_(sent)
            continue
        # Of nothing both sides know that it does not come.
        if sent.numel():
            operations.append(torch_dist.P2POp(torch_dist.isend, sent, member, group.handle))
        if received.numel():
            operations.append(torch_dist.P2POp(torch_dist.irecv, received, member, group.handle))

    # In one batch, so that no pair of ranks waits for another's turn.
    return torch_dist.batch_isend_irecv(operations) if operations else []


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


class _AllGatherBegun(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, begun: Gathering, group: Group) -> Tensor:
        ctx.group = group
        # A tensor of its own for each that takes it over: autograd marks it as this call's.
        return begun.wait().detach()

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        of_value, of_group = _AllGather.backward(ctx, gradient)
        return of_value, None, of_group


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
