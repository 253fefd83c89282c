"""Numbers that a term keeps for every sample of the run, sharded over ranks.

Rank r of W keeps the samples r, r + W, r + 2W, …: 4 bytes a number on the one rank that owns the
sample, on the device of the embeddings. `sogclr` and FastCLIP v1 and v3 keep 2 numbers (8 bytes a
sample), `isogclr` and FastCLIP v2 keep 6 (24 bytes): for 400 million samples on 8 ranks .4 GB and
1.2 GB a rank, 3.2 GB and 9.6 GB in a checkpoint.

A step exchanges the rows it needs and nothing else: the ids of all ranks (an all-gather of 8 bytes
a row), the owners' numbers (a reduce-scatter) and the new numbers (an all-gather). A checkpoint
holds the whole table in the order of ids, so that any number of ranks can go on from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlp import dist

CHUNK = 2**20  # rows a rank sends at a time when the table is made whole


class Table:
    """[samples, c] float32, `fill` being the c numbers of a sample not met yet.

    samples: how many the run's index has; None: room is made as ids come, by doubling. Only the
    first dimension of what `read` and `write` take is this rank's b rows; both are collective.
    """

    def __init__(self, fill: Sequence[float], samples: int | None) -> None:
        self.fill, self.samples, self.grows = (
            torch.tensor(fill, dtype=torch.float32),
            samples or 0,
            samples is None,
        )

    def place(self, ranks: dist.Group) -> None:
        """Make room for this rank's share, all of it new. Before anything else."""
        self.ranks = ranks
        self.own = self.fill.repeat(-(-self.samples // ranks.size), 1)

    def read(self, ids: Tensor) -> Tensor:
        """ids: [b] int64 -> [b, c], the numbers of this rank's rows, from their owners."""
        self.own = self.own.to(ids.device)
        every = dist.all_gather(ids, self.ranks)
        self._make_room(every)
        mine = every % self.ranks.size == self.ranks.index
        found = self.own[torch.where(mine, every // self.ranks.size, 0)]
        return dist.reduce_scatter(torch.where(mine.unsqueeze(1), found, 0), self.ranks)

    def write(self, ids: Tensor, values: Tensor) -> None:
        """Store [b, c] values of this rank's rows at their owners. Of a sample that comes twice the
        last row counts, and rows that are not finite are left out: a bad step would spoil their
        samples for the whole run.
        """
        every, values = (
            dist.all_gather(ids, self.ranks),
            dist.all_gather(values.detach().float(), self.ranks),
        )
        finite = values.isfinite().all(1)
        every, values = every[finite], values[finite]
        samples, where = every.unique(return_inverse=True)
        order = torch.arange(len(every), device=every.device)
        last = torch.zeros_like(samples).scatter_reduce_(0, where, order, "amax")
        mine = samples % self.ranks.size == self.ranks.index
        self.own.index_copy_(0, samples[mine] // self.ranks.size, values[last[mine]])

    def whole(self) -> Tensor:
        """[samples, c] on the CPU of the first rank, in the order of ids; [0, c] on the others.
        Collective.
        """
        first = self.ranks.index == 0
        result = self.fill.new_empty(self.samples if first else 0, len(self.fill))
        rows = -(-self.samples // self.ranks.size)
        for start in range(0, rows, CHUNK):
            part = self.own[start : min(start + CHUNK, rows)]
            every = dist.all_gather(part, self.ranks)
            if first:  # sample id = row·W + rank
                in_order = every.view(self.ranks.size, len(part), -1).transpose(0, 1).flatten(0, 1)
                at = start * self.ranks.size
                result[at : at + len(in_order)] = in_order[: self.samples - at]
        return result

    def load(self, whole: Tensor) -> None:
        """Take this rank's share of a whole table, which every rank must bring. Collective."""
        rows = dist.gather_objects(len(whole), self.ranks)
        if len(set(rows)) > 1:
            raise ValueError(
                f"state of {rows} samples on the ranks: give every rank the whole, as the first one saved it"
            )
        if not self.grows and len(whole) != self.samples:
            raise ValueError(
                f"state of {len(whole)} samples, but this run has {self.samples}: the ids mean other samples; go on with "
                "the same data, or start anew with init_from"
            )
        self.samples = len(whole)
        self.place(self.ranks)
        share = whole[self.ranks.index :: self.ranks.size]
        self.own[: len(share)] = share

    def _make_room(self, ids: Tensor) -> None:
        lowest, highest = ids.aminmax()
        if lowest < 0 or (not self.grows and highest >= self.samples):
            raise ValueError(
                f"sample_id: found {lowest} to {highest}, but samples is {self.samples}; raise it"
            )
        self.samples = max(self.samples, int(highest) + 1)
        missing = -(-self.samples // self.ranks.size) - len(self.own)
        if missing > 0:
            self.own = torch.cat(
                [self.own, self.fill.to(self.own).repeat(max(missing, len(self.own)), 1)]
            )


@dataclass(frozen=True)
class Write:
    """What a term returns for a table: rows that are stored if the step counts."""

    table: Table
    ids: Tensor  # [b]
    values: Tensor  # [b, c]

    def apply(self) -> Table:
        self.table.write(self.ids, self.values)
        return self.table
