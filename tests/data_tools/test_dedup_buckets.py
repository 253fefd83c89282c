"""The search of `vlp data dedup` in buckets: equal to the comparison of all with all, resumable, of
bounded size.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from vlp.data_tools._run.work import Pool
from vlp.data_tools.dedup import arrays, cells
from vlp.data_tools.dedup.decision import Copies, decide
from vlp.data_tools.dedup.embedded import Rows
from vlp.data_tools.dedup.near import FINGERPRINT, Limits
from vlp.data_tools.dedup.near import decide as decide_exactly
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
    n_cells: int = 4,
    probes: int = 4,
    processes: int = 1,
) -> tuple[Copies, Search]:
    """What the stages find in shards of so many samples."""
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

    division = Division(rows_at_once * BYTES_A_ROW, n_cells, probes)
    made = planned(folder / "search", len(prints), n_fixed, limits, division)
    stages = Search(folder / "search", paths, sizes, made, Pool(processes))
    copies = stages.copies(rows)
    assert copies is not None
    return copies, stages


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


CASES = [(seed, distance) for seed in range(3) for distance in (0, 1, 4, 8)]


def test_random_sets_are_decided_as_by_comparing_all(tmp_path: Path) -> None:
    n_dropped = 0
    for seed, distance in CASES:
        rng = np.random.default_rng(seed)
        n = int(rng.integers(150, 300))
        prints = random_prints(rng, n)
        limits = Limits(distance, 1.0, keep_copies=seed == 2)
        n_fixed = seed * n // 5
        sizes = np.diff([0, *np.sort(rng.integers(0, n + 1, 3)), n]).tolist()
        copies, _ = search(
            tmp_path / f"{seed}_{distance}",
            prints,
            sizes,
            limits,
            n_fixed=n_fixed,
            rows_at_once=[n, n // 2, n // 3][seed],
        )
        expected, _ = decide_exactly(prints, [], n_fixed, limits)
        assert as_exact(copies, n, n_fixed, limits).tolist() == expected.tolist(), (seed, distance)
        n_dropped += int((expected >= 0).sum())
    assert n_dropped > 500


def unit_rows(rng: np.random.Generator, n: int, width: int = 8) -> np.ndarray:
    """Rows around a few centres: chains of similar ones, and rows of zeros."""
    centres = rng.normal(size=(max(1, n // 8), width))
    rows = centres[rng.integers(0, len(centres), n)] + 0.2 * rng.normal(size=(n, width))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[rng.random(n) < 0.03] = 0
    return rows.astype(np.float16)


@pytest.mark.parametrize("keep_copies", [False, True])
def test_embeddings_in_cells_are_decided_as_by_comparing_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_copies: bool
) -> None:
    # Several blocks a cell.
    monkeypatch.setattr(cells, "_BLOCK", 16)
    monkeypatch.setattr(cells, "_OTHERS", 24)
    n_by_hash = n_by_cosine = 0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        n, n_fixed = 250, 100
        prints, rows = random_prints(rng, n), unit_rows(rng, n)
        limits = Limits([4, -1, 0][seed], 0.95, keep_copies)
        # All cells are looked into: nothing is missed.
        copies, _ = search(
            tmp_path / str(seed), prints, [100, 0, 150], limits, n_fixed=n_fixed,
            rows_at_once=120, embeddings=rows, n_cells=3, probes=3,
        )  # fmt: skip
        expected, cosines = decide_exactly(prints, [rows[:100], rows[100:]], n_fixed, limits)
        found = as_exact(copies, n, n_fixed, limits)
        assert ((found >= 0) == (expected >= 0)).all(), seed
        by_hash = np.isnan(cosines) & (expected >= 0)
        assert (found[by_hash] == expected[by_hash]).all()
        n_by_hash += int(by_hash.sum())
        n_by_cosine += int((~np.isnan(cosines)).sum())
    assert n_by_hash > 20 and n_by_cosine > 50
