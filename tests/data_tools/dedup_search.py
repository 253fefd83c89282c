"""The search of `vlp data dedup` in buckets on made-up shards, and what it decides of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vlp.data_tools._run.work import Pool
from vlp.data_tools.dedup import arrays
from vlp.data_tools.dedup.decision import Copies, decide
from vlp.data_tools.dedup.embedded import Rows
from vlp.data_tools.dedup.near import FINGERPRINT, Limits
from vlp.data_tools.dedup.plan import BYTES_A_ROW, Division, planned
from vlp.data_tools.dedup.stages import Search
from vlp.data_tools.dedup.survey import prints_file


def search(
    folder: Path,
    prints: np.ndarray,
    sizes: list[int],
    limits: Limits,
    *,
    n_fixed: int = 0,
    rows_at_once: int = 10**6,
    embeddings: np.ndarray | None = None,
    rows_a_cell: int = 30,
    probes: int = 4,
    pool: Pool | None = None,
) -> tuple[Any, Search]:
    """What the stages find in shards of so many samples: (Copies or None, the stages)."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum(sizes)
    paths = [prints_file(folder, number) for number in range(len(sizes))]
    for path, low, high in zip(paths, [0, *ends], ends):
        arrays.save(path, prints[low:high])
    rows = None
    if embeddings is not None:
        files = [folder / f"{number}.safetensors" for number in range(len(sizes))]
        for file, low, high in zip(files, [0, *ends], ends):
            save_file({"image": embeddings[low:high]}, file)
        rows = Rows(files, sizes, embeddings.shape[1])

    division = Division(rows_at_once * BYTES_A_ROW, rows_a_cell, probes)
    made = planned(folder / arrays.SEARCH_FOLDER, len(prints), n_fixed, limits, division)
    stages = Search(folder / arrays.SEARCH_FOLDER, paths, sizes, made, pool or Pool())
    return stages.copies(rows), stages


def as_exact(copies: Copies, n: int, n_fixed: int, limits: Limits) -> np.ndarray:
    """For each sample what it is a copy of."""
    dropped = decide(copies, n_fixed, limits.keep_copies)
    copy_of = np.full(n, -1)
    copy_of[dropped["sample"]] = dropped["copy_of"]
    return copy_of


def flipped(hashes: np.ndarray, n_bits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Hashes with so many bits turned."""
    turned = hashes.copy()
    for i, n in enumerate(n_bits.tolist()):
        for bit in rng.choice(64, n, replace=False).tolist():
            turned[i] ^= np.uint64(1 << bit)
    return turned


def random_prints(rng: np.random.Generator, n: int) -> np.ndarray:
    """Copies in chains, equal ones, equal hashes of other colors, pictures that do not open."""
    prints = np.zeros(n, FINGERPRINT)
    base = rng.integers(0, 2**64, max(1, n // 6), np.uint64)
    hashes = base[rng.integers(0, len(base), n)]
    prints["hash"] = flipped(hashes, rng.integers(0, 6, n) * rng.integers(0, 2, n), rng)
    prints["grid"] = 12 * rng.integers(0, 3, (n, 1)) + rng.integers(0, 2, (n, 1)) * (
        rng.integers(0, 4, (n, 48))
    )
    prints["seen"] = rng.random(n) < 0.95
    return prints


def unit_rows(rng: np.random.Generator, n: int, width: int = 8) -> np.ndarray:
    """Rows around a few centres: chains of similar ones, and rows of zeros."""
    centres = rng.normal(size=(max(1, n // 8), width))
    rows = centres[rng.integers(0, len(centres), n)] + 0.2 * rng.normal(size=(n, width))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[rng.random(n) < 0.03] = 0
    return rows.astype(np.float16)
