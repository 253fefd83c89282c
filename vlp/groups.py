"""This process among the others, and groups of ranks, of which it is one.

Nothing here trusts a launcher: `torch.distributed` is asked (under DeepSpeed on CPU, Accelerate
reports one process and every rank as main). All of it is also found in `vlp.dist`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as torch_dist

# This process and the others


def initialised() -> bool:
    """Whether this process belongs to an initialised process group."""
    return torch_dist.is_available() and torch_dist.is_initialized()


def rank() -> int:
    return torch_dist.get_rank() if initialised() else 0


def world_size() -> int:
    return torch_dist.get_world_size() if initialised() else 1


def local_rank() -> int:
    """Rank inside this node, as the launcher or SLURM says; 0 without one."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


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
    # The handle belongs to more ranks than these: they send to one another (see `within`).
    point_to_point: bool = False

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


def split(partition: Sequence[Sequence[int]]) -> Group:
    """The group of this process among groups of global ranks, each with a communicator of its own.

    Collective over ALL ranks, which must bring the same partition: on NCCL a new communicator is
    cut out of the world's, so that a rank that stayed away would leave the others waiting. Call it
    at start, never in the middle of a run.
    """
    joined: Group | None = None
    for members in partition:
        ranks = tuple(members)

        # What needs no new communicator gets none.
        if len(ranks) == world_size():
            return world()
        handle = torch_dist.new_group(list(ranks)) if len(ranks) > 1 else None
        if rank() in ranks:
            joined = Group(ranks, handle)

    if joined is None:
        raise ValueError(f"rank {rank()} is in none of the groups {partition}")
    return joined


def apart() -> Group:
    """All ranks, with a communicator of their own: what travels over it does not queue behind other
    exchanges of the world. Collective, as `split` is.
    """
    if world_size() == 1:
        return world()
    return Group(world().ranks, torch_dist.new_group())


def within(parent: Group, positions: Sequence[int]) -> Group:
    """The ranks at these positions of `parent`, which use the parent's communicator.

    Nothing is created, so that groups may change at every step: the members send to one another
    directly, with the bytes of a gather or a scatter. Only they take part.
    """
    members = tuple(parent.ranks[position] for position in positions)
    if len(members) == 1:
        return Group(members)
    if members == parent.ranks:
        return parent
    return Group(members, parent.handle, point_to_point=True)
