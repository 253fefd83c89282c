"""The nearest samples of each sample by the cosine of stored embeddings: exact in blocks, or by an
index of FAISS.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vlp.data_tools._run.arrays import save
from vlp.data_tools.mine.store import Store
from vlp.eval.search import nearest

if TYPE_CHECKING:
    from vlp.data_tools._run.work import Result

Side = Literal["image", "text"]
Method = Literal["exact", "ivf", "hnsw"]
INDEX_FILE = "_index.faiss"  # in the output's folder, as long as it is searched
N_QUERIES = 1024  # rows whose neighbours are searched at once


@dataclass(frozen=True)
class Search:
    """The work on one shard: its samples' neighbours, in a file beside the mark."""

    store: Store
    folder: Path
    query: Side
    searched: Side
    top: int
    method: Method = "exact"
    cells: int = 0
    device: str = "cpu"

    def __call__(self, job: tuple[int, Path]) -> Result:
        shard, _ = job
        queries = self.store.rows(shard, self.query)
        n, top = len(queries), min(self.top, self.store.n - 1)
        numbers = np.full((n, top), -1, np.int64)
        scores = np.full((n, top), -np.inf, np.float32)
        caption_cosines = np.zeros((n, top), np.float32)
        positive_scores = np.zeros(n, np.float32)

        for i in range(0, n, N_QUERIES):
            rows = slice(i, min(i + N_QUERIES, n))
            query = np.asarray(queries[rows], np.float32)
            of_rows = self.store.first(shard) + np.arange(rows.start, rows.stop)
            scores[rows], numbers[rows] = self._nearest(query, of_rows, top)

            # What a sample scores with its own entry of the searched side, and texts with texts.
            positive_scores[rows] = (query * self.store.gathered(of_rows, self.searched)).sum(1)
            texts = self.store.gathered(of_rows, "text")
            for k, others in enumerate(np.maximum(numbers[rows], 0).T):
                # One rank at a time, so that no [b, N, D] is held.
                caption_cosines[rows, k] = (texts * self.store.gathered(others, "text")).sum(1)

        has_row = np.asarray(queries).any(1)
        numbers[~has_row] = -1
        path = self.folder / f"{shard:05d}_neighbours.npz"
        save(
            path,
            numbers=numbers,
            scores=scores,
            positive_scores=positive_scores,
            caption_cosines=caption_cosines,
        )
        n_without = int((~has_row).sum())
        return {"counts": {"samples read": n, f"samples without an {self.query}": n_without}}

    def _nearest(
        self, query: np.ndarray, of_rows: np.ndarray, top: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(scores, numbers) of the `top` nearest samples but itself, by falling score; −1: none."""
        if self.method == "exact":
            from vlp.joining import local_device

            # In the process that searches: it may have another GPU than the one of the call.
            device = local_device(self.device, shared=True)
            return nearest.exact(query, self.store.blocks(self.searched), of_rows, top, device)
        scores, numbers = _read_index(self.folder / INDEX_FILE).search(query, top + 1)
        return without_itself(scores, numbers, of_rows, top)


def without_itself(
    scores: np.ndarray, numbers: np.ndarray, of_rows: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first `top` of `top` + 1 neighbours, without the sample itself."""
    is_itself = numbers == of_rows[:, None]
    # Where it was not found, the last is one too many.
    is_itself[~is_itself.any(1), -1] = True
    return scores[~is_itself].reshape(-1, top), numbers[~is_itself].reshape(-1, top)


def build_index(search: Search) -> None:
    """Write an index of FAISS over all rows of the searched side into the output's folder, unless a
    call that was stopped has done so: graphs differ from one building to the next. Memory: 4·D
    bytes a sample, and the links of HNSW.
    """
    path = search.folder / INDEX_FILE
    if search.method == "exact" or path.exists():
        return

    store = search.store
    if search.method == "hnsw":
        index = nearest.graph(store.width, search.top)
    else:
        fitted_to = _spread(store, search.searched, nearest.FITTED * search.cells)
        index = nearest.inverted_file(fitted_to, search.cells)
    nearest.write_index(index, store.blocks(search.searched), path)


def _spread(store: Store, side: Side, n: int) -> np.ndarray:
    """Up to `n` rows, evenly spread over all."""
    places = np.unique(np.linspace(0, store.n - 1, min(n, store.n)).astype(np.int64))
    rows = store.gathered(places, side)
    return rows[rows.any(1)]


@lru_cache(maxsize=1)
def _read_index(path: Path) -> Any:
    """The index that `build_index` wrote, read once a process."""
    return nearest.import_faiss().read_index(os.fspath(path))
