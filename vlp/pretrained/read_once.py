"""Whole tensors of a checkpoint, of which each rank reads a share from the disk and gets the rest
from the others.

    contents.model = read_once(contents.model)      then tensors by name, as before

Without it W ranks read a checkpoint W times: at 2,048 ranks and 2 GB of weights 4 TB from a file
system that all of them share, while the network between them is idle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vlp import dist
from vlp.pretrained.parts import CheckpointError, dtype_of, rows_of, shape_of

PIECE = 32 * 2**20  # bytes that are exchanged at a time, or one tensor that is larger
_ALIGNED = 16  # a share begins at a multiple of every number's bytes


def read_once(stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same tensors, read as a rank of many reads them; every rank asks for the same names in
    the same order.
    """
    return stored if dist.world_size() == 1 else ReadOnce(stored)


class ReadOnce(Mapping[str, Tensor]):
    """Tensors by name: asking for one is collective, and brings those that follow it along until
    PIECE bytes are together.

    Rows of a tensor are dealt to the ranks in order, and a tensor of fewer rows than ranks goes
    whole to the one that has least to read. A tensor that was brought along is kept until it is
    asked for; asked for again it is read again. Where a rank cannot read its share, CheckpointError
    on all of them.
    """

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self.stored = stored
        self._names = list(stored)
        self._places = {name: place for place, name in enumerate(self._names)}
        self._brought: dict[str, Tensor] = {}
        self._asked: set[str] = set()
        self._group = dist.world()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._brought:
            self._bring(self._together_with(name))
        self._asked.add(name)
        return self._brought.pop(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return shape_of(self.stored, name)

    def dtype(self, name: str) -> torch.dtype:
        return dtype_of(self.stored, name)

    def _together_with(self, name: str) -> list[str]:
        """The names from this one on, as many as are exchanged at once."""
        names, n_bytes = [name], self._n_bytes(name)
        for other in self._names[self._places[name] + 1 :]:
            # A model's order is not that of a file: what was asked for before is wanted no more.
            if other in self._asked:
                continue
            n_bytes += self._n_bytes(other)
            if n_bytes > PIECE or other in self._brought:
                break
            names.append(other)
        return names

    def _bring(self, names: list[str]) -> None:
        """Read this rank's share of tensors, and put them together from all ranks' shares."""
        deal = Deal(self._group.size)
        for name in names:
            deal.add(self.shape(name), self.dtype(name))

        # The last byte tells the others whether the share could be read: no rank waits for one
        # that has raised.
        own = torch.zeros(deal.n_bytes + _ALIGNED, dtype=torch.uint8)
        failure = ""
        try:
            self._read_share(names, deal, own)
        except (OSError, ValueError, RuntimeError) as error:
            failure = f"rank {dist.rank()}: {type(error).__name__}: {error}"
            own[-1] = 1

        shares = dist.to_all(own, self._group)
        if shares[:, -1].any():
            failures = [text for text in dist.gather_objects(failure, self._group) if text]
            raise CheckpointError(
                f"the checkpoint cannot be read as a whole any more ({failures[0]}); is it on a "
                "disk that all machines share, and still there?"
            )
        for place, name in enumerate(names):
            self._brought[name] = deal.whole(place, shares)

    def _read_share(self, names: list[str], deal: Deal, own: Tensor) -> None:
        for place, name in enumerate(names):
            rows = own_rows(self.stored, name, deal, place, self._group.index)
            if rows is not None:
                deal.share(place, self._group.index, own).copy_(rows.reshape(-1))

    def _n_bytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self.dtype(name).itemsize


def own_share(stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Name and rows of what this rank has to read where each tensor is read by all ranks together,
    one at a time; of a tensor of few rows all or nothing. Nothing is exchanged.
    """
    group = dist.world()
    deal = Deal(group.size)
    for place, name in enumerate(stored):
        deal.add(shape_of(stored, name), dtype_of(stored, name))
        rows = own_rows(stored, name, deal, place, group.index)
        if rows is not None:
            yield name, rows


def own_rows(
    stored: Mapping[str, Tensor], name: str, deal: Deal, place: int, rank: int
) -> Tensor | None:
    """The rows of a tensor, at `place` in a deal, that a rank reads; None where it reads none."""
    begin, end = deal.rows(place, rank)
    if begin == end:
        return None
    return rows_of(stored, name, begin, end) if deal.shapes[place] else stored[name]


class Deal:
    """Which rows of tensors each of n ranks reads, and where they lie in its share."""

    def __init__(self, n_ranks: int) -> None:
        self.n_ranks = n_ranks
        self.shapes: list[tuple[int, ...]] = []
        self.dtypes: list[torch.dtype] = []
        self.bounds: list[list[int]] = []  # of each tensor: rank r reads from the r-th row on
        self.offsets: list[list[int]] = []  # and in which byte of its share they begin
        self._filled = [0] * n_ranks  # bytes of each rank's share so far

    @property
    def n_bytes(self) -> int:
        """Bytes of the longest share."""
        return max(self._filled)

    def add(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        n_rows = shape[0] if shape else 1
        if n_rows >= self.n_ranks:
            bounds = [rank * n_rows // self.n_ranks for rank in range(self.n_ranks + 1)]
        else:
            owner = self._filled.index(min(self._filled))
            bounds = [0] * (owner + 1) + [n_rows] * (self.n_ranks - owner)

        self.shapes.append(shape)
        self.dtypes.append(dtype)
        self.bounds.append(bounds)
        self.offsets.append(list(self._filled))
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        for rank in range(self.n_ranks):
            n_bytes = (bounds[rank + 1] - bounds[rank]) * row_bytes
            self._filled[rank] += -(-n_bytes // _ALIGNED) * _ALIGNED

    def rows(self, place: int, rank: int) -> tuple[int, int]:
        """The first row of a tensor that a rank reads, and the one after its last."""
        return self.bounds[place][rank], self.bounds[place][rank + 1]

    def share(self, place: int, rank: int, share: Tensor) -> Tensor:
        """Where a rank's rows of a tensor lie in its share [bytes], as a flat view."""
        begin, end = self.rows(place, rank)
        dtype, first = self.dtypes[place], self.offsets[place][rank]
        n_bytes = (end - begin) * math.prod(self.shapes[place][1:]) * dtype.itemsize
        return share[first : first + n_bytes].view(dtype)

    def whole(self, place: int, shares: Tensor) -> Tensor:
        """A tensor of the shares [ranks, bytes] of all."""
        parts = [self.share(place, rank, shares[rank]) for rank in range(self.n_ranks)]
        return torch.cat(parts).view(self.shapes[place])
