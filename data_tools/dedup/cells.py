"""Pairs of similar stored embeddings, searched in cells: each row is compared with the rows of the
cells whose centres are nearest to it.

As SemDeDup (Abbas et al. 2023, arXiv 2303.09540) and NeMo Curator do, centres are fitted to some
rows by K-means and copies are searched within cells. Other than there, a row also looks into cells
beside its own, `probes` in all, because two copies may lie on either side of a border.

Files in the folder of the search:
    centres               float32 [k, D], unit rows
    cells                 of a run of shards: the samples that look into each cell, divided by cell;
                          2 · number, + 1 where the cell is the sample's own
    similar               of some cells: SIMILAR pairs
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlp.data_tools._run.work import Result
from vlp.data_tools.dedup import arrays
from vlp.data_tools.dedup.decision import SIMILAR
from vlp.data_tools.dedup.embedded import Rows
from vlp.data_tools.dedup.hashed import file
from vlp.data_tools.dedup.plan import Plan, Run

if TYPE_CHECKING:
    from torch import Tensor

MOST_MEMBERS = 16_384  # of a cell that are all compared, or eight times as many as a cell has
PASSED_OVER = "not compared: pairs of samples, because too many embeddings are alike"
MOST_SIMILAR = 64  # pairs that are kept of one sample in one block of a cell, the earliest
LEFT_OUT = "not kept: pairs of samples with very many similar ones"
_FITTED = 64  # rows a cell that its centre is fitted to
_BLOCK, _OTHERS = 1024, 8192  # rows on either side of a block of cosines
_SCORES = 1 << 24  # cosines with centres at once


def n_cells(n: int) -> int:
    """How many cells n samples have. A row is then compared with about as many centres as other
    rows; and each cell has the rows that its centre is fitted to.
    """
    return max(1, min(round(2 * n**0.5), n // _FITTED))


@dataclass(frozen=True)
class FitCentres:
    """The work before all others: the cells' centres, by K-means of FAISS."""

    folder: Path
    plan: Plan
    rows: Rows

    def __call__(self, _: None) -> Result:
        from vlp.eval.search import nearest

        fitted_to = self._fitted_to()
        # Most may be zeros, of pictures that do not open: one cell then compares all with all.
        centres = np.zeros((1, self.rows.width), np.float32)
        if 1 < self.plan.n_cells <= len(fitted_to):
            index = nearest.inverted_file(fitted_to, self.plan.n_cells)
            centres = index.quantizer.reconstruct_n(0, self.plan.n_cells)
        arrays.save(self.folder / "centres.npy", centres)
        return {"counts": {"samples read": len(fitted_to)}}

    def _fitted_to(self) -> np.ndarray:
        """Rows evenly spread over all, no more than there is memory for."""
        plan = self.plan
        n_that_fit = plan.memory // (8 * self.rows.width)
        n_rows = min(plan.n, _FITTED * plan.n_cells, max(plan.n_cells, n_that_fit))
        places = np.unique(np.linspace(0, plan.n - 1, n_rows).astype(np.int64))
        rows = self.rows.gathered(places).astype(np.float32)
        return rows[rows.any(1) & np.isfinite(rows).all(1)]


@dataclass(frozen=True)
class Assign:
    """The work on a run: the cells that each sample looks into."""

    folder: Path
    plan: Plan
    rows: Rows

    def __call__(self, run: Run) -> Result:
        import torch

        device = _device()
        centres = torch.from_numpy(np.array(arrays.load(self.folder / "centres.npy"))).to(device)
        cells, visits = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        first = run.first
        for shard in run.shards:
            of_shard = self.rows.of_shard(shard)
            block = max(1, _SCORES // len(centres))
            for start in range(0, len(of_shard), block):
                rows = _on(device, of_shard[start : start + block])
                of_rows, numbers = self._nearest(rows, centres)
                cells.append(of_rows.ravel())
                visits.append(_visits(first + start + numbers, of_rows.shape[1]))
            first += len(of_shard)

        path = file(self.folder, run.number, "cells")
        arrays.save_divided(path, np.concatenate(cells), len(centres), np.concatenate(visits))
        return {"counts": {"samples read": first - run.first}}

    def _nearest(self, rows: Tensor, centres: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(the cells of each row that is not zeros, the nearest first; places of these rows)."""
        n_probes = min(self.plan.probes, len(centres))
        nearest = (rows @ centres.T).topk(n_probes, 1).indices.cpu().numpy()
        has_row = rows.any(1).cpu().numpy()
        return nearest[has_row], np.flatnonzero(has_row)


def _visits(numbers: np.ndarray, n_probes: int) -> np.ndarray:
    """What is kept for each cell of each sample: the first is its own."""
    is_own = np.arange(n_probes) == 0
    return (2 * numbers[:, None] + is_own).ravel()


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
        similar = [np.empty(0, SIMILAR)]
        paths = [file(self.folder, run, "cells") for run in range(self.n_runs)]
        for cell in range(low, high):
            visits = np.concatenate([arrays.part(path, cell, cell + 1) for path in paths])
            counts["samples read"] += len(visits)
            similar += self._of_cell(visits, counts)
        arrays.save(file(self.folder, number, "similar"), np.concatenate(similar))
        return {"counts": counts}

    def _of_cell(self, visits: np.ndarray, counts: Counter[str]) -> Iterator[np.ndarray]:
        numbers, is_own = visits >> 1, visits % 2 == 1
        members = numbers[is_own]
        device = _device()
        if len(members) > self._most_members:
            leaders = self._leaders(members, device)
            counts[PASSED_OVER] += len(numbers) * (len(members) - len(leaders))
            members = leaders
        for low in range(0, len(members), _OTHERS):
            of_members = members[low : low + _OTHERS]
            y = _on(device, self.rows.gathered(of_members)).T
            for start in range(0, len(numbers), _BLOCK):
                block = slice(start, start + _BLOCK)
                x = _on(device, self.rows.gathered(numbers[block]))
                scores = (x @ y).cpu().numpy()

                # Two samples of the cell meet once, with the earlier one as the member.
                is_other = of_members < numbers[block, None]
                is_other |= ~is_own[block, None] & (of_members != numbers[block, None])
                is_similar = (scores >= self.plan.cosine) & is_other
                is_similar &= self.plan.matters(np.minimum(of_members, numbers[block, None]))
                _leave_out(is_similar, counts)
                row, column = np.nonzero(is_similar)
                yield _pairs(numbers[block][row], of_members[column], scores[row, column])

    @property
    def _most_members(self) -> int:
        return max(MOST_MEMBERS, 8 * self.plan.n // self.plan.n_cells)

    def _leaders(self, members: np.ndarray, device: str) -> np.ndarray:
        """The members of a crowded cell that are no copies of one of these before them: of a
        picture that comes a million times all pairs would take hours.
        """
        leaders = members[:0]
        for start in range(0, len(members), _BLOCK):
            block = members[start : start + _BLOCK]
            x = _on(device, self.rows.gathered(block))
            is_copy = np.zeros(len(block), bool)
            for low in range(0, len(leaders), _OTHERS):
                y = _on(device, self.rows.gathered(leaders[low : low + _OTHERS]))
                is_copy |= (x @ y.T >= self.plan.cosine).any(1).cpu().numpy()

            # Within the block a leader must be known before those behind it are compared.
            within = (x @ x.T >= self.plan.cosine).tril(-1).cpu().numpy()
            for place in np.flatnonzero(within.any(1) & ~is_copy):
                is_copy[place] = bool((within[place] & ~is_copy).any())
            leaders = np.concatenate([leaders, block[~is_copy]])[: self._most_members]
        return leaders


def _leave_out(is_similar: np.ndarray, counts: Counter[str]) -> None:
    """Keep the first MOST_SIMILAR of each row: a crowd of n would have n² pairs."""
    n_similar = is_similar.sum(1)
    for row in np.flatnonzero(n_similar > MOST_SIMILAR):
        is_similar[row] &= np.cumsum(is_similar[row]) <= MOST_SIMILAR
        counts[LEFT_OUT] += int(n_similar[row]) - MOST_SIMILAR


def _pairs(numbers: np.ndarray, others: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    pairs = np.empty(len(numbers), SIMILAR)
    pairs["earlier"], pairs["later"] = np.minimum(numbers, others), np.maximum(numbers, others)
    pairs["cosine"] = cosines
    return pairs


def _device() -> str:
    from vlp.joining import local_device

    return local_device("auto", shared=True)


def _on(device: str, rows: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(np.array(rows)).to(device).float()
