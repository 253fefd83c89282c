"""The search of `vlp data dedup` in cells of embeddings: equal to the comparison of all with all,
at a cost a row that does not grow with them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data_tools.dedup_search import as_exact, random_prints, search, unit_rows
from vlp.data_tools.dedup import arrays, cells, tree
from vlp.data_tools.dedup.near import FINGERPRINT, Limits
from vlp.data_tools.dedup.near import decide as decide_exactly


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
            rows_at_once=120, embeddings=rows, rows_a_cell=60, probes=99,
        )  # fmt: skip
        expected, cosines = decide_exactly(prints, [rows[:100], rows[100:]], n_fixed, limits)
        found = as_exact(copies, n, n_fixed, limits)
        assert ((found >= 0) == (expected >= 0)).all(), seed
        by_hash = np.isnan(cosines) & (expected >= 0)
        assert (found[by_hash] == expected[by_hash]).all()
        n_by_hash += int(by_hash.sum())
        n_by_cosine += int((~np.isnan(cosines)).sum())
    assert n_by_hash > 20 and n_by_cosine > 50


def odd_rows() -> dict[str, np.ndarray]:
    """Rows that no model of ours gives, float16."""
    rng = np.random.default_rng(1)
    unlike = rng.normal(size=(60, 16))
    unlike /= np.linalg.norm(unlike, axis=1, keepdims=True)
    copied = np.repeat(unlike, 2, 0).astype(np.float16)
    damaged = copied.copy()
    # In the first shard, before all others.
    damaged[[0, 7, 11]] = [[np.nan], [np.inf], [0]]
    return {
        "short": copied * np.float16(0.5),
        "long": copied * np.float16(8),
        "damaged": damaged,
        "one number": np.where(rng.random((50, 1)) < 0.5, 1, -1).astype(np.float16),
    }


@pytest.mark.parametrize("cosine", [0.95, 1.0])
def test_rows_of_any_length_are_compared_by_their_cosine(tmp_path: Path, cosine: float) -> None:
    for name, rows in odd_rows().items():
        n = len(rows)
        prints = np.zeros(n, FINGERPRINT)
        limits = Limits(-1, cosine, False)
        expected = by_cosine(rows, cosine)
        assert 20 < expected.sum() < n, name

        exactly, _ = decide_exactly(prints, [rows[:40], rows[40:]], 0, limits)
        copies, _ = search(
            tmp_path / name, prints, [40, n - 40], limits, embeddings=rows, probes=99
        )
        assert ((exactly >= 0) == expected).all(), name
        assert ((as_exact(copies, n, 0, limits) >= 0) == expected).all(), name


def by_cosine(rows: np.ndarray, cosine: float) -> np.ndarray:
    """Which rows are copies of one that stays before them; those that are no direction are none."""
    is_copy = np.zeros(len(rows), bool)
    for i, row in enumerate(rows.astype(np.float64)):
        for other in rows[:i][~is_copy[:i]].astype(np.float64):
            lengths = np.linalg.norm(row) * np.linalg.norm(other)
            if 0 < lengths < np.inf and row @ other / lengths >= cosine - 1e-7:
                is_copy[i] = True
    return is_copy


def alike_rows(rng: np.random.Generator, n: int) -> np.ndarray:
    """Rows that all differ and are all copies of one another."""
    return (0.25 + 0.01 * rng.normal(size=(n, 16))).astype(np.float16)


def test_a_crowd_of_similar_embeddings_keeps_few_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "MOST_SIMILAR", 5)
    rows = alike_rows(np.random.default_rng(0), 400)
    limits = Limits(-1, 0.95, False)
    prints = np.zeros(400, FINGERPRINT)
    copies, stages = search(tmp_path, prints, [400], limits, embeddings=rows, rows_a_cell=400)
    assert as_exact(copies, 400, 0, limits).tolist() == [-1] + [0] * 399
    assert len(copies.similar) < 400 * 5
    # But for a few that are equal in float16.
    assert 0.99 < stages.counts[cells.LEFT_OUT] / (394 * 395 // 2) <= 1


def test_a_crowded_cell_is_compared_with_those_that_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One picture in many shades, others between: the same is dropped, without all pairs."""
    monkeypatch.setattr(cells, "_BLOCK", 32)
    monkeypatch.setattr(cells, "MOST_MEMBERS", 60)
    rng = np.random.default_rng(0)
    rows = unit_rows(rng, 300, 16)
    is_alike = rng.random(300) < 0.7
    rows[is_alike] = alike_rows(rng, int(is_alike.sum()))
    limits = Limits(-1, 0.95, False)
    prints = np.zeros(300, FINGERPRINT)
    copies, stages = search(tmp_path, prints, [300], limits, embeddings=rows, rows_a_cell=400)
    expected, _ = decide_exactly(prints, [rows], 0, limits)
    assert 200 < (expected >= 0).sum() < 290
    assert ((as_exact(copies, 300, 0, limits) >= 0) == (expected >= 0)).all()
    assert stages.counts[cells.PASSED_OVER] > 300 * 200


def test_equal_embeddings_are_compared_once_and_decided_exactly(tmp_path: Path) -> None:
    """Some of the equal ones go by their hash, which must not save the others."""
    n, n_by_cosine = 300, 0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        prints, rows = random_prints(rng, n), unit_rows(rng, n)
        is_equal = rng.random(n) < 0.6
        rows[is_equal] = rows[rows.any(1)][0]
        limits = Limits(4, 0.95, keep_copies=seed == 2)
        copies, _ = search(
            tmp_path / str(seed), prints, [150, 150], limits, n_fixed=30 * seed, embeddings=rows,
            rows_a_cell=1000,
        )  # fmt: skip
        pieces = [rows[: 30 * seed], rows[30 * seed :]]
        expected, cosines = decide_exactly(prints, pieces, 30 * seed, limits)
        decided = as_exact(copies, n, 30 * seed, limits)
        assert ((decided >= 0) == (expected >= 0)).all(), seed
        assert len(copies.equal) > n / 2 and len(copies.similar) < n
        n_by_cosine += int((~np.isnan(cosines)).sum())
    assert n_by_cosine > 100


def rows_of(rng: np.random.Generator, n: int, width: int = 32) -> np.ndarray:
    """Random unit rows, every tenth a copy of the one before at a cosine of .95 to 1."""
    rows = rng.normal(size=(n, width))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    noise = rng.normal(size=(n // 10, width)) * rng.uniform(0, 0.3, (n // 10, 1)) / width**0.5
    rows[9::10] = rows[8::10] + noise
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def test_a_row_is_compared_with_as_many_rows_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "BRANCHES", 6)
    monkeypatch.setattr(cells, "_FITTED", 16)
    compared, limits = [], Limits(-1, 0.95, False)
    for n in (1500, 12_000):
        rows = rows_of(np.random.default_rng(0), n)
        copies, stages = search(
            tmp_path / str(n), np.zeros(n, FINGERPRINT), [n // 2, n // 2], limits,
            embeddings=rows, rows_a_cell=50, probes=8,
        )  # fmt: skip
        paths = [stages.folder / f"{run}_cells.npy" for run in ("00000",)]
        visits, starts = arrays.part_of_all(paths, 0, len(arrays.sizes(paths)))
        is_own = np.add.reduceat(visits % 2, starts[:-1])
        compared.append(float((np.diff(starts) * is_own).sum() / n))
        assert is_own.max() < 4 * 50

        # Of the pairs nearly all are found, each by the one rule.
        found = set(zip(copies.similar["earlier"].tolist(), copies.similar["later"].tolist()))
        expected = {
            (i - 1, i) for i in range(9, n, 10) if rows[i].astype(float) @ rows[i - 1] >= 0.951
        }
        assert len(expected) > n / 12
        assert len(expected - found) <= 0.01 * len(expected)
    # Eight times the rows, at least one level more: the old cells took 2.8 times as many.
    assert compared[1] < 1.25 * compared[0] < 8 * 50 * 1.6


def test_rows_that_cannot_be_divided_are_one_cell() -> None:
    rng = np.random.default_rng(0)
    rows = np.concatenate([alike_rows(rng, 300), rows_of(rng, 300, 16)])
    rows[300:400] = rows[399]
    made = tree.fitted(np.arange(600), rows.__getitem__, 20, 0.95)
    descent = tree.Descent(made, 8, "cpu")
    own = descent.cells(torch.from_numpy(rows).float(), 4)[:, 0]
    sizes = np.bincount(own, minlength=made.n_cells)
    # The crowd, the equal ones, and the others in cells of their own.
    *others, n_equal, n_alike = np.sort(sizes).tolist()
    assert n_alike >= 300 and 100 <= n_equal < 140
    assert max(others) < 60 and made.n_cells >= 8
