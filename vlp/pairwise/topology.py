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
from functools import lru_cache
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
            return Rotation(n_ranks, size, seed).partition(step)
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


@dataclass(frozen=True)
class Rotation:
    """Partitions into groups of `size`, in whose course every two ranks share a group.

    A group is two half groups, and the half groups meet as teams do in a round-robin tournament:
    2·W/g − 1 rounds, at most twice the least possible (W−1)/(g−1). Where g is odd, each group also
    takes one rank that sits out the tournament; those ranks meet one another in a tournament of
    their own, after it: about 1 + 1/g times as many rounds. The first partition is contiguous; the
    seed orders the others. Nothing is stored: a partition costs O(W).
    """

    n_ranks: int
    size: int
    seed: int = 0

    def __len__(self) -> int:
        return sum(self._n_rounds())

    def partition(self, step: int) -> Partition:
        """The groups at a step; the cycle starts again after `len` steps."""
        round_number = _order(len(self), self.seed)[step % len(self)]
        for n_players, n_rounds in zip(self._tournaments(), self._n_rounds()):
            if round_number < n_rounds:
                return self._round(n_players, round_number)
            round_number -= n_rounds
        raise AssertionError("a cycle is the sum of its tournaments")

    def _tournaments(self) -> list[int]:
        """How many ranks take part in each tournament: all, then those that have not met, …

        A tournament of `size` ranks or fewer is a single group; one rank a group meets nobody.
        """
        n_players = [self.n_ranks]
        while self.size > 1 and self.size % 2 and n_players[-1] > self.size:
            # Rounded up, so that groups are full: whoever is added meets others a second time.
            n_groups = n_players[-1] // self.size
            n_strangers = n_groups + self.size // 2
            n_players.append(-(-n_strangers // self.size) * self.size)
        return n_players

    def _n_rounds(self) -> list[int]:
        single = self.size in (1, self.n_ranks)
        return [1 if single else 2 * (n // self.size) - 1 for n in self._tournaments()]

    def _round(self, n_players: int, number: int) -> Partition:
        """One round: the tournament's players in groups, the other ranks as neighbours."""
        players = self._players(n_players)
        taking_part = set(players)
        others = [rank for rank in range(self.n_ranks) if rank not in taking_part]

        groups = _round_robin(players, self.size, number)
        groups += [others[first : first + self.size] for first in range(0, len(others), self.size)]
        return tuple(sorted(tuple(sorted(group)) for group in groups))

    def _players(self, n_players: int) -> list[int]:
        """The ranks of a tournament; of a later one first those that have not met one another."""
        players = list(range(self.n_ranks))
        for n_next in self._tournaments()[1:]:
            if len(players) == n_players:
                break
            halves, singles = _sides(players, self.size)
            met = [rank for half in halves[:-1] for rank in half]
            players = [*singles, *halves[-1], *met][:n_next]
        return players


@lru_cache(maxsize=8)
def _order(n_rounds: int, seed: int) -> tuple[int, ...]:
    """Round numbers of a cycle by place; round 0, the contiguous one, stays first."""
    later = random.Random(seed).sample(range(1, n_rounds), n_rounds - 1)
    return (0, *later)


def _sides(players: list[int], size: int) -> tuple[list[list[int]], list[int]]:
    """The half groups of a tournament, 2·W/g of them, and the ranks that sit out where g is odd."""
    half = size // 2
    halves, singles = [], []
    for first in range(0, len(players), size):
        group = players[first : first + size]
        halves += [group[:half], group[half : 2 * half]]
        singles += group[2 * half :]

    # So that in round 0 the two halves of a contiguous group meet (see `_round_robin`).
    outer, inner = halves[0::2], halves[1::2]
    return [inner[0], *outer[1:], *reversed(inner[1:]), outer[0]], singles


def _round_robin(players: list[int], size: int, number: int) -> list[list[int]]:
    """The groups of one round of the circle method: the last half group stands still, and in round
    t meets number t; of the others t + j meets t − j.

    A rank that sits out stays at its j, and so meets all halves but the last.
    """
    halves, singles = _sides(players, size)
    n_moving = len(halves) - 1
    groups = [halves[number] + halves[-1]]
    for j in range(1, len(halves) // 2):
        groups.append(halves[(number + j) % n_moving] + halves[(number - j) % n_moving])

    # One for each group; where g is even there is none.
    for group, single in zip(groups, singles):
        group.append(single)
    return groups
