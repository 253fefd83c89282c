"""Pairs of similar stored embeddings, searched in cells: each row is compared with the rows of the
cells whose centres are nearest to it.

As SemDeDup (Abbas et al. 2023) and NeMo Curator do, centres are fitted to some rows by K-means and
copies are searched within cells. Other than there, a row also looks into the `probes` nearest cells
beside its own, because two copies may lie on either side of a border.

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
        centres = np.array(arrays.load(self.folder / "centres.npy"))
        centres_t = torch.from_numpy(centres).to(device).T
        n_probes = min(self.plan.probes, len(centres))
        block = max(1, _SCORES // len(centres))

        cells = [np.empty(0, np.int64)]
        visits = [np.empty(0, np.int64)]
        n = 0
        for shard in run.shards:
            of_shard = self.rows.of_shard(shard)
            for start in range(0, len(of_shard), block):
                rows = _on(device, of_shard[start : start + block])
                nearest = (rows @ centres_t).topk(n_probes, 1).indices.cpu().numpy()
                has_row = rows.any(1).cpu().numpy()
                numbers = run.first + n + start + np.flatnonzero(has_row)
                cells.append(nearest[has_row].ravel())
                # The first is the nearest: its own.
                is_own = np.zeros((len(numbers), n_probes), np.int64)
                is_own[:, 0] = 1
                visits.append((2 * numbers[:, None] + is_own).ravel())
            n += len(of_shard)

        path = file(self.folder, run.number, "cells")
        arrays.save_divided(path, np.concatenate(cells), len(centres), np.concatenate(visits))
        return {"counts": {"samples read": n}}


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
