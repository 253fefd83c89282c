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
from typing import Protocol

import torch
from torch import Tensor

from vlp import dist
from vlp.pairwise import reduction

CHUNK = 2**20  # rows of all ranks that travel at a time when the table is made whole


class Whole(Protocol):
    """A whole table, [samples, c]: a tensor, or one whose rows are read when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, samples: slice, /) -> Tensor: ...


class Table:
    """[samples, c] float32, `fill` being the c numbers of a sample not met yet.

    samples: how many the run's index has; None: room is made as ids come, by doubling, for which
    every step waits for the device. Of what `read` and `write` take, only the first dimension is
    this rank's b rows; both are collective.
    """

    def __init__(self, fill: Sequence[float], samples: int | None) -> None:
        self.fill = torch.tensor(fill, dtype=torch.float32)
        self.samples = samples or 0
        self.grows = samples is None

    def place(self, ranks: dist.Group) -> None:
        """Make room for this rank's share, all of it new. Before anything else."""
        self.ranks = ranks
        self.own = self.fill.repeat(self._n_rows(), 1)

    def read(self, ids: Tensor) -> Tensor:
        """ids: [b] int64 -> [b, c], the numbers of this rank's rows, from their owners."""
        self.own = self.own.to(ids.device)
        all_ids = dist.all_gather(ids, self.ranks)
        self._check(all_ids)

        # Each rank fills in the samples it owns; the others' rows are zeros, so that the sum of all
        # ranks is the owner's.
        owned = all_ids % self.ranks.size == self.ranks.index
        rows = torch.where(owned, all_ids // self.ranks.size, 0)
        values = torch.where(owned.unsqueeze(1), self.own[rows], 0)
        return dist.reduce_scatter(values, self.ranks)

    def write(self, ids: Tensor, values: Tensor) -> None:
        """Store [b, c] values of this rank's rows at their owners.

        Of a sample that comes twice the last row counts, and rows that are not finite are left out:
        a bad step would spoil their samples for the whole run.
        """
        all_ids = dist.all_gather(ids, self.ranks)
        values = dist.all_gather(values.detach().float(), self.ranks)

        # By place, with all that is not stored here at the end. A stable sort: the last row of a
        # sample stays the last of its run.
        stored = values.isfinite().all(1) & (all_ids % self.ranks.size == self.ranks.index)
        places = torch.where(stored, all_ids // self.ranks.size, len(self.own))
        places, order = places.sort(stable=True)
        last_of_run = torch.searchsorted(places, places, right=True) - 1

        # Every row stores what the last one of its sample says: which of them comes first on a
        # device then makes no difference. What is not stored here repeats the first place, and
        # where nothing is, place 0 keeps its numbers.
        source = torch.where(places < len(self.own), last_of_run, last_of_run[0])
        target, new = places[source], values[order[source]]
        nothing = target == len(self.own)
        target = torch.where(nothing, 0, target)
        self.own.index_copy_(0, target, torch.where(nothing.unsqueeze(1), self.own[target], new))

    def whole(self) -> Tensor:
        """[samples, c] on the CPU of the first rank, in the order of ids; [0, c] on the others.

        Collective. In blocks, and to the first rank alone: no GPU holds more than its own rows, and
        the first rank's host no more than a block beside the table.
        """
        n_ranks, n_rows = self.ranks.size, self._n_rows()
        first = self.ranks.index == 0
        result = self.fill.new_empty(self.samples if first else 0, len(self.fill))

        n_block = max(1, CHUNK // n_ranks)
        for start in range(0, n_rows, n_block):
            stop = min(start + n_block, n_rows)
            parts = dist.to_first(self.own[start:stop], self.ranks)

            # Sample id = row·W + rank. The last ranks may hold a row more than there are samples.
            block = result[start * n_ranks : stop * n_ranks]
            for owner, part in enumerate(parts):
                places = block[owner::n_ranks]
                places.copy_(part[: len(places)])
        return result

    def rows(self) -> Tensor:
        """[ceil(samples / W), c], what this rank keeps: row i is of sample i·W + rank. The last
        ranks may hold a row more than there are samples.
        """
        return self.own[: self._n_rows()]

    def load(self, whole: Whole) -> None:
        """Take this rank's share of a whole table, which every rank must bring. Collective.

        Only the share is copied: of a table that `checkpoint.load` maps from its file, or finds in
        parts, a rank holds nothing else.
        """
        lengths = dist.gather_objects(len(whole), self.ranks)
        if len(set(lengths)) > 1:
            raise ValueError(
                f"state of {lengths} samples on the ranks: give every rank the whole, as the first "
                "one saved it"
            )
        if not self.grows and len(whole) != self.samples:
            raise ValueError(
                f"state of {len(whole)} samples, but this run has {self.samples}: the ids mean "
                "other samples; go on with the same data, or start anew with init_from"
            )

        self.samples = len(whole)
        self.place(self.ranks)
        share = whole[self.ranks.index :: self.ranks.size]
        self.own[: len(share)].copy_(share)

    def _n_rows(self) -> int:
        """Rows of a rank: samples / W, rounded up."""
        return -(-self.samples // self.ranks.size)

    def _check(self, ids: Tensor) -> None:
        """Refuse ids outside a known number of samples, make room where it is not known."""
        # The loader's ids are below it, and asking a device for them would make the host wait.
        if not self.grows and reduction.on_device(ids):
            return

        # An id beyond a known number of samples is an error of the data, no reason to grow.
        lowest, highest = ids.aminmax()
        if lowest < 0 or (not self.grows and highest >= self.samples):
            raise ValueError(
                f"sample_id: found {lowest} to {highest}, but samples is {self.samples}; raise it"
            )
        self._make_room(int(highest) + 1)

    def _make_room(self, samples: int) -> None:
        self.samples = max(self.samples, samples)
        n_missing = self._n_rows() - len(self.own)
        if n_missing > 0:
            n_new = max(n_missing, len(self.own))  # doubling: ids may come one by one
            self.own = torch.cat([self.own, self.fill.to(self.own).repeat(n_new, 1)])


@dataclass(frozen=True)
class Write:
    """A term's update of a table: rows that are stored if the step counts."""

    table: Table
    ids: Tensor  # [b]
    values: Tensor  # [b, c]

    def apply(self, counts: Tensor) -> None:
        """Store the rows where the step `counts`, [] bool. Collective."""
        # A table leaves out rows that are not finite. All rows of a bad step are: an infinite row
        # may leave other rows' sums finite and wrong.
        self.table.write(self.ids, torch.where(counts, self.values, torch.nan))
