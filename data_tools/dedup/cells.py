"""Pairs of similar stored embeddings, searched in cells: each row is compared with the rows of the
cells whose centres are nearest to it.

As SemDeDup (Abbas et al. 2023, arXiv 2303.09540) and NeMo Curator do, centres are fitted to some
rows by K-means and copies are searched within cells. Other than there, a row also looks into cells
beside its own, `probes` in all, because two copies may lie on either side of a border; and cells
have about `rows_a_cell` rows however many there are, in a tree, so that the cost of a row grows by
one level where the rows become BRANCHES times as many.

Files in the folder of the search:
    centres, children     of the tree (`tree.Tree`)
    cells                 of a run of shards: the samples that look into each cell, divided by cell;
                          2 · number, + 1 where the cell is the sample's own
    similar               of some cells: SIMILAR pairs, between the first samples of equal rows
    equal                 of some cells: int64 [m, 2], the first sample of a row and a further one
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlp.data_tools._run.work import Result
from vlp.data_tools.dedup import arrays
from vlp.data_tools.dedup.decision import SIMILAR
from vlp.data_tools.dedup.embedded import KeptRows, Rows
from vlp.data_tools.dedup.hashed import file
from vlp.data_tools.dedup.near import ROUNDING, unit
from vlp.data_tools.dedup.plan import Plan, Run
from vlp.data_tools.dedup.tree import Descent, Tree, fitted

ROWS_A_CELL = 256  # fewer need more probes for the same share of pairs, and a deeper tree
MOST_MEMBERS = 4096  # of a cell that are all compared; only crowds of alike ones have so many
PASSED_OVER = "not compared: pairs of samples, because too many embeddings are alike"
MOST_SIMILAR = 64  # pairs that are kept of one sample in one block of a cell, the earliest
LEFT_OUT = "not kept: pairs of samples with very many similar ones"
_FITTED = 32  # rows a cell that the tree is fitted to
_BEAM, _LEAST_BEAM = 3, 8  # nodes of a level that rows go down along, for each probe; at least
_BLOCK, _OTHERS = 512, 8192  # rows on either side of a block of cosines
_DESCENDING = 8192  # rows that go down the tree at once


@dataclass(frozen=True)
class FitCentres:
    """The work before all others: the tree of the cells' centres."""

    folder: Path
    plan: Plan
    rows: Rows

    def __call__(self, _: None) -> Result:
        numbers = self._fitted_to()
        rows_a_cell = max(1, len(numbers) * self.plan.rows_a_cell / max(1, self.plan.n))
        tree = fitted(numbers, self.rows.gathered, rows_a_cell, self.plan.cosine)
        arrays.save(self.folder / "children.npy", tree.children)
        arrays.save(self.folder / "centres.npy", tree.centres)
        return {"counts": {"samples read": len(numbers)}}

    def _fitted_to(self) -> np.ndarray:
        """Numbers of rows evenly spread over all, no more than there is memory for."""
        plan = self.plan
        n_rows = min(plan.n, _FITTED * plan.n // plan.rows_a_cell + 1, plan.memory // 16)
        numbers = np.unique(np.linspace(0, max(0, plan.n - 1), n_rows).astype(np.int64))
        # Pictures that do not open have rows of zeros.
        is_row = [_is_row(self.rows.gathered(block)) for block in _blocks(numbers)]
        return numbers[np.concatenate([np.empty(0, bool), *is_row])]


def _blocks(numbers: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(numbers), _DESCENDING):
        yield numbers[start : start + _DESCENDING]


def _is_row(rows: np.ndarray) -> np.ndarray:
    """Which rows may be similar to another: those of finite numbers that are not all zeros."""
    return rows.any(1) & np.isfinite(rows).all(1)


@dataclass(frozen=True)
class Assign:
    """The work on a run: the cells that each sample looks into."""

    folder: Path
    plan: Plan
    rows: Rows

    def __call__(self, run: Run) -> Result:
        device = _device()
        tree = Tree(*(arrays.load(self.folder / f"{name}.npy") for name in ("centres", "children")))
        descent = Descent(tree, max(_LEAST_BEAM, _BEAM * self.plan.probes), device)
        cells, visits = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        first = run.first
        for shard in run.shards:
            of_shard = self.rows.of_shard(shard)
            for places in _blocks(np.arange(len(of_shard))):
                places = places[_is_row(of_shard[places])]
                of_rows = descent.cells(unit(of_shard[places], device), self.plan.probes)

                # What is kept for each cell of a row: the first is its own.
                is_own = np.arange(of_rows.shape[1]) == 0
                of_visits = 2 * (first + places[:, None]) + is_own
                cells.append(of_rows[of_rows >= 0].astype(np.int32))
                visits.append(of_visits[of_rows >= 0])
            first += len(of_shard)

        path = file(self.folder, run.number, "cells")
        arrays.save_divided(path, np.concatenate(cells), tree.n_cells, np.concatenate(visits))
        return {"counts": {"samples read": first - run.first}}


@dataclass(frozen=True)
class SearchCells:
    """The work on some cells: the pairs of similar samples in each."""

    folder: Path
    plan: Plan
    rows: Rows
    n_runs: int

    def __call__(self, item: tuple[int, int, int]) -> Result:
        number, low, high = item
        counts: Counter[str] = Counter()
        paths = [file(self.folder, run, "cells") for run in range(self.n_runs)]
        visits, starts = arrays.part_of_all(paths, low, high)
        counts["samples read"] = len(visits)

        similar, equal = [np.empty(0, SIMILAR)], [np.empty((0, 2), np.int64)]
        most_rows = max(1, self.plan.memory // (8 * self.rows.width))
        for first, end, n_visits in arrays.even_parts(np.diff(starts), most_rows):
            # Cells that follow one another are near each other: the same samples look into them.
            rows: Rows | KeptRows = self.rows
            if n_visits <= most_rows:
                rows = self.rows.kept(np.unique(visits[starts[first] : starts[end]] >> 1))
            for cell in range(first, end):
                of_cell = visits[starts[cell] : starts[cell + 1]]
                of_cell, further = _without_equal(of_cell, rows)
                equal.append(further)
                similar += self._of_cell(of_cell, rows, counts)
        arrays.save(file(self.folder, number, "equal"), np.concatenate(equal))
        arrays.save(file(self.folder, number, "similar"), np.concatenate(similar))
        return {"counts": counts}

    def _of_cell(
        self, visits: np.ndarray, rows: Rows | KeptRows, counts: Counter[str]
    ) -> Iterator[np.ndarray]:
        numbers, is_own = visits >> 1, visits % 2 == 1
        members = numbers[is_own]
        device = _device()
        if len(members) > MOST_MEMBERS:
            leaders = self._leaders(members, rows, device)
            counts[PASSED_OVER] += len(numbers) * (len(members) - len(leaders))
            members = leaders
        for low in range(0, len(members), _OTHERS):
            of_members = members[low : low + _OTHERS]
            y = unit(rows.gathered(of_members), device).T
            for start in range(0, len(numbers), _BLOCK):
                block = slice(start, start + _BLOCK)
                scores = unit(rows.gathered(numbers[block]), device) @ y
                places = (scores >= self.plan.cosine - ROUNDING).nonzero()
                cosines = scores[places[:, 0], places[:, 1]].cpu().numpy()
                row, column = places.cpu().numpy().T

                # Two samples of the cell meet once, with the earlier one as the member.
                one, other = numbers[block][row], of_members[column]
                is_pair = (other < one) | (~is_own[block][row] & (other != one))
                is_pair &= self.plan.matters(np.minimum(one, other))
                is_pair[is_pair] = _first_ones(row[is_pair], counts)
                yield _pairs(one[is_pair], other[is_pair], cosines[is_pair])

    def _leaders(self, members: np.ndarray, rows: Rows | KeptRows, device: str) -> np.ndarray:
        """The members of a crowded cell that are no copies of one of these before them: of a
        picture that comes a million times all pairs would take hours.
        """
        leaders = members[:0]
        for start in range(0, len(members), _BLOCK):
            block = members[start : start + _BLOCK]
            x = unit(rows.gathered(block), device)
            is_copy = np.zeros(len(block), bool)
            for low in range(0, len(leaders), _OTHERS):
                y = unit(rows.gathered(leaders[low : low + _OTHERS]), device)
                is_copy |= (x @ y.T >= self.plan.cosine - ROUNDING).any(1).cpu().numpy()

            # Within the block a leader must be known before those behind it are compared.
            within = (x @ x.T >= self.plan.cosine - ROUNDING).tril(-1).cpu().numpy()
            for place in np.flatnonzero(within.any(1) & ~is_copy):
                is_copy[place] = bool((within[place] & ~is_copy).any())
            leaders = np.concatenate([leaders, block[~is_copy]])[:MOST_MEMBERS]
        return leaders


def _without_equal(visits: np.ndarray, rows: Rows | KeptRows) -> tuple[np.ndarray, np.ndarray]:
    """(the visits without those whose row an earlier one has; of these the cell's own samples, each
    behind the first sample of its row, int64 [m, 2]): a picture that comes a million times is
    compared once.
    """
    numbers, is_own = visits >> 1, visits % 2 == 1
    digests = [
        np.empty(0, np.uint64),
        *(_digests(rows.gathered(part)) for part in _blocks(numbers)),
    ]
    # Rounding may give equal rows other cells, so the cell's own ones stand for no visitor.
    keys = 2 * np.concatenate(digests) + is_own.astype(np.uint64)
    _, firsts, of_visits = np.unique(keys, return_index=True, return_inverse=True)
    firsts = firsts[of_visits]

    # Rows of one digest are compared, or a collision would drop a sample.
    is_further = firsts != np.arange(len(visits))
    for block in _blocks(np.flatnonzero(is_further)):
        one, other = rows.gathered(numbers[block]), rows.gathered(numbers[firsts[block]])
        is_further[block] = (one == other).all(1)
    of_cell = is_further & is_own
    return visits[~is_further], np.stack([numbers[firsts[of_cell]], numbers[of_cell]], 1)


def _digests(rows: np.ndarray) -> np.ndarray:
    """A number of each row, uint64 [n], that equal rows share: its bits times odd numbers."""
    factors = np.random.default_rng(0).integers(0, 2**63, rows.shape[1], np.uint64) * 2 + 1
    return (rows.view(np.uint16) * factors).sum(1)


def _first_ones(rows: np.ndarray, counts: Counter[str]) -> np.ndarray:
    """Which pairs, by the places of their rows, which rise, are of the first MOST_SIMILAR of a row:
    a crowd of n would have n² pairs.
    """
    nth = np.arange(len(rows)) - np.searchsorted(rows, rows)
    is_kept = nth < MOST_SIMILAR
    counts[LEFT_OUT] += int((~is_kept).sum())
    return is_kept


def _pairs(numbers: np.ndarray, others: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    pairs = np.empty(len(numbers), SIMILAR)
    pairs["earlier"], pairs["later"] = np.minimum(numbers, others), np.maximum(numbers, others)
    pairs["cosine"] = cosines
    return pairs


def _device() -> str:
    from vlp.joining import local_device

    return local_device("auto", shared=True)
