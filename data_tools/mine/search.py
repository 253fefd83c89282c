"""The nearest samples of each sample by the cosine of stored embeddings: exact in blocks, or by an
index of FAISS.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vlp.data_tools.mine.store import Store, save

if TYPE_CHECKING:
    from vlp.data_tools._run.work import Result

Side = Literal["image", "text"]
Method = Literal["exact", "ivf", "hnsw"]
N_QUERIES = 1024  # rows whose neighbours are searched at once
EXACT_UP_TO = 1_000_000  # samples, where the method is left open
LISTS_SEARCHED = 16  # of an inverted file: cells whose samples are compared with a query
_LINKS, _EFFORT = 32, 128  # of HNSW: neighbours a node, and nodes kept open while it searches
_FITTED = 64  # samples a cell that its centres are fitted to


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
        alike = np.zeros((n, top), np.float32)
        own = np.zeros(n, np.float32)

        for i in range(0, n, N_QUERIES):
            rows = slice(i, min(i + N_QUERIES, n))
            query = np.asarray(queries[rows], np.float32)
            of_rows = self.store.first(shard) + np.arange(rows.start, rows.stop)
            scores[rows], numbers[rows] = self._nearest(query, of_rows, top)

            # What a sample scores with its own entry of the searched side, and texts with texts.
            own[rows] = (query * self.store.gathered(of_rows, self.searched)).sum(1)
            texts = self.store.gathered(of_rows, "text")
            others = self.store.gathered(np.maximum(numbers[rows], 0), "text")
            alike[rows] = np.einsum("nd,nkd->nk", texts, others)

        has_row = np.asarray(queries).any(1)
        numbers[~has_row] = -1
        path = self.folder / f"{shard:05d}_neighbours.npz"
        save(path, numbers=numbers, scores=scores, own=own, alike=alike)
        n_without = int((~has_row).sum())
        return {"counts": {"samples read": n, f"samples without an {self.query}": n_without}}

    def _nearest(
        self, query: np.ndarray, of_rows: np.ndarray, top: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(scores, numbers) of the `top` nearest samples but itself, by falling score; −1: none."""
        if self.method == "exact":
            return exact(query, self.store.blocks(self.searched), of_rows, top, self.device)
        scores, numbers = _index(self).search(query, top + 1)
        return without_itself(scores, numbers, of_rows, top)

    def __hash__(self) -> int:
        # A process keeps the index of one search.
        return hash((self.store.embeddings, self.searched, self.method, self.cells))


def exact(
    query: np.ndarray,  # [b, D]
    blocks: Iterator[tuple[int, np.ndarray]],
    of_rows: np.ndarray,  # [b] the queries' own numbers
    top: int,
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """(scores, numbers) [b, top] of the nearest rows of all blocks, by falling score.

    Memory O(b·(D + BLOCK + top)): a block is compared, and what is best so far stays.
    """
    import torch

    x = torch.from_numpy(query).to(device)
    own = torch.from_numpy(of_rows).to(device)
    best = torch.full((len(x), top), -torch.inf, device=device)
    numbers = torch.full((len(x), top), -1, dtype=torch.int64, device=device)
    for first, rows in blocks:
        y = torch.from_numpy(np.array(rows)).to(device).float()
        places = first + torch.arange(len(y), device=device)

        # Neither itself nor rows of zeros: pictures that did not open, samples without a caption.
        excluded = (own.unsqueeze(1) == places) | ~y.any(1)
        scores = (x @ y.T).masked_fill(excluded, -torch.inf)
        joined = torch.cat([best, scores], 1)
        joined_numbers = torch.cat([numbers, places.expand(len(x), -1)], 1)
        best, kept = joined.topk(top, 1)
        numbers = joined_numbers.gather(1, kept)

    numbers = numbers.masked_fill(best == -torch.inf, -1)
    return best.cpu().numpy(), numbers.cpu().numpy()


def without_itself(
    scores: np.ndarray, numbers: np.ndarray, of_rows: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first `top` of `top` + 1 neighbours, without the sample itself."""
    is_itself = numbers == of_rows[:, None]
    # Where it was not found, the last is one too many.
    is_itself[~is_itself.any(1), -1] = True
    return scores[~is_itself].reshape(-1, top), numbers[~is_itself].reshape(-1, top)


@lru_cache(maxsize=1)
def _index(search: Search) -> FaissIndex:
    return FaissIndex(search)


class FaissIndex:
    """An index of FAISS over all rows of one side: memory 4·D bytes a sample, and links of HNSW."""

    def __init__(self, search: Search) -> None:
        self.faiss = import_faiss()
        self.store, self.side = search.store, search.searched
        width, inner = self.store.width, self.faiss.METRIC_INNER_PRODUCT
        if search.method == "hnsw":
            self.index = self.faiss.IndexHNSWFlat(width, _LINKS, inner)
            self.index.hnsw.efConstruction = _EFFORT
            self.index.hnsw.efSearch = max(_EFFORT, 2 * search.top)
        else:
            centres = self.faiss.IndexFlatIP(width)
            self.index = self.faiss.IndexIVFFlat(centres, width, search.cells, inner)
            self.index.nprobe = min(LISTS_SEARCHED, search.cells)
            self.index.train(self._spread(_FITTED * search.cells))

        # Rows of zeros get no place: FAISS would find them at score 0.
        self.numbers: list[np.ndarray] = []
        for first, rows in self.store.blocks(self.side):
            whole = np.asarray(rows, np.float32)
            has_row = whole.any(1)
            self.index.add(whole[has_row])
            self.numbers.append(first + np.flatnonzero(has_row))

    def search(self, query: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores, numbers) [b, n]; −1 where fewer were found."""
        scores, places = self.index.search(query, n)
        numbers = self._all_numbers[np.maximum(places, 0)]
        return scores, np.where(places >= 0, numbers, -1)

    @cached_property
    def _all_numbers(self) -> np.ndarray:
        return np.concatenate(self.numbers)

    def _spread(self, n: int) -> np.ndarray:
        """Up to `n` rows, evenly spread over all."""
        places = np.unique(np.linspace(0, self.store.n - 1, min(n, self.store.n)).astype(np.int64))
        rows = self.store.gathered(places, self.side)
        return rows[rows.any(1)]


def import_faiss() -> Any:
    """FAISS, an optional dependency; raises ValueError where it is not installed."""
    try:
        import faiss
    except ImportError:
        raise ValueError(
            "FAISS is not installed; install it with pip install 'vlp[mine]', or search with "
            "--index exact"
        ) from None
    return faiss
