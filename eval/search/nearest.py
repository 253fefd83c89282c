"""The nearest of stored unit rows by the cosine: exact in blocks, or by an index of FAISS."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vlp import log
from vlp.files import replacing

EXACT_UP_TO = 1_000_000  # rows, where the method is left open
LISTS_SEARCHED = 16  # of an inverted file: cells whose rows are compared with a query
FITTED = 64  # rows a cell that its centres are fitted to
_LINKS, _EFFORT = 32, 128  # of HNSW: neighbours a node, and nodes kept open while it searches

Blocks = Iterable[tuple[int, np.ndarray]]  # (number of its first row, rows [n, D])


def exact(
    query: np.ndarray,  # [b, D]
    blocks: Blocks,
    of_rows: np.ndarray,  # [b] the queries' own numbers; -1: of none
    top: int,
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """(scores, numbers) [b, top] of the nearest rows of all blocks, by falling score.

    Memory O(b·(D + BLOCK + top)): a block is compared, and what is best so far stays.
    """
    import torch

    x = torch.from_numpy(query).to(device)
    query_numbers = torch.from_numpy(of_rows).to(device)
    best = torch.full((len(x), top), -torch.inf, device=device)
    numbers = torch.full((len(x), top), -1, dtype=torch.int64, device=device)
    for first, rows in blocks:
        y = torch.from_numpy(np.array(rows)).to(device).float()
        places = first + torch.arange(len(y), device=device)

        # Neither itself nor rows of zeros: pictures that did not open, samples without a caption.
        excluded = (query_numbers.unsqueeze(1) == places) | ~y.any(1)
        scores = (x @ y.T).masked_fill(excluded, -torch.inf)
        joined = torch.cat([best, scores], 1)
        joined_numbers = torch.cat([numbers, places.expand(len(x), -1)], 1)
        best, kept = joined.topk(top, 1)
        numbers = joined_numbers.gather(1, kept)

    numbers = numbers.masked_fill(best == -torch.inf, -1)
    return best.cpu().numpy(), numbers.cpu().numpy()


def inverted_file(fitted_to: np.ndarray, n_cells: int) -> Any:
    """An empty index of `n_cells` cells, whose centres are fitted to rows [n, D]."""
    faiss = import_faiss()
    width, inner = fitted_to.shape[1], faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, n_cells, inner)
    index.nprobe = min(LISTS_SEARCHED, n_cells)
    index.train(fitted_to)
    return index


def graph(width: int, top: int) -> Any:
    """An empty graph (HNSW) that is to give the nearest `top`."""
    faiss = import_faiss()
    index = faiss.IndexHNSWFlat(width, _LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = _EFFORT
    index.hnsw.efSearch = max(_EFFORT, 2 * top)
    return index


def write_index(index: Any, blocks: Blocks, path: Path) -> None:
    """Fill an empty index with all rows and write it, whole or not at all; raises ValueError."""
    faiss = import_faiss()

    # Under the rows' own numbers; rows of zeros get no place, or they would be found at score 0.
    numbered = faiss.IndexIDMap2(index)
    for first, rows in blocks:
        whole = np.asarray(rows, np.float32)
        has_row = whole.any(1)
        numbered.add_with_ids(whole[has_row], first + np.flatnonzero(has_row))

    with replacing(path) as temporary:
        try:
            faiss.write_index(numbered, os.fspath(temporary))
        except RuntimeError as error:  # FAISS's one kind, such as for a full disk
            raise ValueError(f"{path} cannot be written: {str(error)[:200]}") from None


def read_index(path: Path) -> Any:
    """The index of a file; None where there is none, or one that is damaged, which is said."""
    if not path.exists():
        return None
    try:
        return import_faiss().read_index(str(path))
    except RuntimeError as error:  # FAISS's one kind, also of a file that goes meanwhile
        if path.exists():
            log.warn(f"{path} is damaged ({str(error)[:200]}); it is built again")
        return None


def import_faiss() -> Any:
    """FAISS, an optional dependency; raises ValueError where it is not installed."""
    try:
        import faiss
    except ImportError:
        raise ValueError(
            "FAISS is not installed; install it with pip install 'vlp[mine]'"
        ) from None
    return faiss
