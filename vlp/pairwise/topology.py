"""Topologies: which ranks share candidates, and how embeddings travel between them.

A topology is one value of a configuration: `auto`, `local`, `global`, `ring`, or a mapping `{group:
8, layout: contiguous, exchange: gather}`. With groups of g ranks a row's candidates are the n = g·b
columns of its group; g = 1 is `local`, g = W is `global` (M2-Encoder's grouped aggregation, arXiv
2401.15896).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

from vlp import schema
from vlp.schema import did_you_mean

Partition = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Topology:
    """Groups of ranks that share candidates. `group: 0` means all ranks."""

    group: int = 0  # ranks a group; must divide the number of ranks
    # contiguous: neighbours, so inside a node; strided: one of every W/g; alternating: another
    # partition every step, so that over one cycle every pair of ranks meets
    layout: Literal["contiguous", "strided", "alternating"] = "contiguous"
    # gather: all candidates at once, O(n·D) memory; ring: block by block between neighbours, O(b·D)
    exchange: Literal["gather", "ring"] = "gather"

    def __post_init__(self) -> None:
        if self.group < 0:
            raise ValueError(f"group: {self.group} ranks; give at least 1, or 0 for all ranks")

    @classmethod
    def read(cls, value: Any) -> Topology:
        """The topology of `auto | local | global | ring | {group, layout, exchange}`.

        ValueError says what is known.
        """
        if isinstance(value, Topology):
            return value
        if isinstance(value, Mapping):
            return schema.parse(Topology, dict(value), ("topology",))
        if not isinstance(value, str) or value not in NAMED:
            hint = did_you_mean(str(value), [*NAMED, "{group: g, layout: …, exchange: …}"])
            raise ValueError(f"topology: found {value!r}{hint}")
        return NAMED[value]

    def to_config(self) -> dict[str, Any]:
        """The mapping that `read` takes."""
        return {"group": self.group, "layout": self.layout, "exchange": self.exchange}

    def group_size(self, n_ranks: int) -> int:
        """g for a run of `n_ranks` ranks; ValueError names the divisors when g is not one."""
        size = self.group or n_ranks

        # Groups of unequal size would give rows unequal numbers of candidates.
        if n_ranks % size:
            divisors = [d for d in range(1, n_ranks + 1) if n_ranks % d == 0]
            raise ValueError(
                f"topology: groups of {size} do not divide {n_ranks} ranks; choose group from "
                f"{divisors}"
            )
        return size

    def partition(self, n_ranks: int, step: int = 0, seed: int = 0) -> Partition:
        """The groups of positions 0..n_ranks−1 at this step.

        A function of (seed, step) alone, so the same on every rank.
        """
        size = self.group_size(n_ranks)
        if self.layout == "alternating":
            cycle = rotation(n_ranks, size, seed)
            return cycle[step % len(cycle)]
        return contiguous(n_ranks, size) if self.layout == "contiguous" else strided(n_ranks, size)


NAMED = {
    # global: a grouping changes the objective, so it is never chosen for the user
    "auto": Topology(),
    "local": Topology(group=1),
    "global": Topology(),
    "ring": Topology(exchange="ring"),
}


def contiguous(n_ranks: int, size: int) -> Partition:
    """{0..g−1}, {g..2g−1}, …"""
    return tuple(tuple(range(first, first + size)) for first in range(0, n_ranks, size))


def strided(n_ranks: int, size: int) -> Partition:
    """{0, W/g, 2W/g, …}, {1, …}, …"""
    n_groups = n_ranks // size
    return tuple(tuple(range(first, n_ranks, n_groups)) for first in range(n_groups))


@cache
def rotation(n_ranks: int, size: int, seed: int = 0) -> tuple[Partition, ...]:
    """Partitions into groups of `size`, in whose course every two ranks share a group.

    Greedy: each partition fills its groups with the ranks that have met each other least; at least
    (W−1)/(g−1) partitions are needed, and a few more are used. The first is contiguous; the seed
    orders the others.
    """
    # One rank a group meets nobody, one group everybody.
    first = contiguous(n_ranks, size)
    if size in (1, n_ranks):
        return (first,)

    order = random.Random(seed).sample(range(n_ranks), n_ranks)
    cycle = [first]
    strangers = [set(range(n_ranks)) - set(first[rank // size]) for rank in range(n_ranks)]

    while any(strangers):
        partition = _next_partition(order, size, strangers)
        cycle.append(partition)
        for group in partition:
            for rank in group:
                strangers[rank] -= set(group)
    return tuple(cycle)


def _next_partition(order: list[int], size: int, strangers: list[set[int]]) -> Partition:
    """A partition whose groups hold ranks that have met each other least so far."""

    def n_strangers(rank: int) -> int:
        return len(strangers[rank])

    # Whoever still has most to meet chooses first: that keeps the cycle short.
    free = sorted(order, key=n_strangers, reverse=True)

    groups = []
    while free:
        group = [free.pop(0)]
        while len(group) < size:
            best = max(free, key=partial(_n_new, group, strangers))
            free.remove(best)
            group.append(best)
        groups.append(tuple(sorted(group)))
    return tuple(sorted(groups))


def _n_new(group: list[int], strangers: list[set[int]], rank: int) -> int:
    """How many of the group this rank has not met."""
    return sum(rank in strangers[mate] for mate in group)
