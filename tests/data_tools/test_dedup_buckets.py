"""The search of `vlp data dedup` in buckets: equal to the comparison of all with all, resumable, of
bounded size.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from vlp.data_tools._run.work import Pool
from vlp.data_tools.dedup import alike, arrays, bands, cells, tree
from vlp.data_tools.dedup.bands import Bands
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


def test_bands_give_each_near_pair_once() -> None:
    n_pairs = 0
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**64, 40, np.uint64)
    hashes = np.unique(flipped(base[rng.integers(0, 40, 200)], rng.integers(0, 7, 200), rng))
    bits = np.unpackbits((hashes[:, None] ^ hashes)[..., None].view(np.uint8), axis=2)
    differing = bits.sum(2)
    for distance, n_blocks, most_rows in (
        (1, 2, 999),
        (4, 5, 60),
        (4, 7, 999),
        (4, 8, 60),
        (8, 9, 9),
    ):
        cut = Bands(distance, n_blocks)
        pairs = [
            (min(pair), max(pair))
            for first in cut.firsts
            for i, j, _ in cut.pairs(hashes, first, most_rows)
            for pair in zip(i.tolist(), j.tolist())
        ]
        near = np.argwhere(np.triu(differing <= distance, 1)).tolist()
        assert sorted(pairs) == sorted(map(tuple, near)), (distance, n_blocks)
        n_pairs += len(pairs)
    assert n_pairs > 500


def test_more_samples_are_cut_into_more_blocks() -> None:
    n_blocks = [Bands.cheapest(4, n).n_blocks for n in (10**4, 10**6, 10**8, 5 * 10**9)]
    assert n_blocks == sorted(n_blocks) and n_blocks[0] < n_blocks[-1]
    # Ten times the samples cost little more than ten times the time.
    assert Bands.cheapest(4, 10**9).cost_ns(10**9) < 30 * Bands.cheapest(4, 10**8).cost_ns(10**8)


def test_equal_pictures_of_many_shards_take_one_row(tmp_path: Path) -> None:
    prints = np.zeros(500, FINGERPRINT)
    prints["seen"] = True
    limits = Limits(4, 1.0, False)
    copies, stages = search(tmp_path, prints, [100] * 5, limits, rows_at_once=100)
    assert as_exact(copies, 500, 0, limits).tolist() == [-1] + [0] * 499
    assert len(arrays.load(stages.folder / "00000_prints.npy")) == 1
    assert not len(copies.near) and not +stages.counts


def test_a_crowd_of_one_hash_is_compared_with_those_that_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blank pictures in many shades: the same is dropped, from far fewer pairs."""
    rng = np.random.default_rng(0)
    n = 1000
    prints = np.zeros(n, FINGERPRINT)
    prints["seen"] = True
    prints["grid"] = np.tile(rng.integers(0, 90, (n, 3)), 16)
    limits = Limits(4, 1.0, False)
    monkeypatch.setattr(alike, "MOST_ALIKE", n)
    every, _ = search(tmp_path / "every", prints, [n], limits)
    expected, _ = decide_exactly(prints, [], 0, limits)

    monkeypatch.setattr(alike, "MOST_ALIKE", 50)
    few, stages = search(tmp_path / "few", prints, [n], limits)
    assert 100 < (expected >= 0).sum() < n
    assert as_exact(every, n, 0, limits).tolist() == expected.tolist()
    assert ((as_exact(few, n, 0, limits) >= 0) == (expected >= 0)).all()
    assert len(few.near) < len(every.near) / 3 and not +stages.counts

    # Few of near hashes, one of them before all others, are compared with those that stay.
    prints["hash"][::100] = 1
    expected, _ = decide_exactly(prints, [], 0, limits)
    beside, _ = search(tmp_path / "beside", prints, [n], limits)
    same = (as_exact(beside, n, 0, limits) >= 0) == (expected >= 0)
    assert same.mean() > 0.98

    # Beyond a number of those that stay, what is passed over is counted.
    monkeypatch.setattr(alike, "MOST_LEADERS", 10)
    _, stages = search(tmp_path / "fewer", prints, [n], limits)
    assert stages.counts[alike.PASSED_OVER] > 1000


def test_hashes_that_agree_too_often_are_passed_over_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bands, "LARGEST", 30)
    prints = np.zeros(200, FINGERPRINT)
    prints["seen"] = True
    prints["hash"] = np.random.default_rng(0).integers(0, 2**20, 200, np.uint64)
    limits = Limits(1, 1.0, False)
    _, stages = search(tmp_path, prints, [200], limits)
    # By the bytes turned round, all 200 agree in one of two halves: steps of 30 and more are left.
    assert stages.counts[alike.PASSED_OVER] == 170 * 171 // 2


def test_pairs_of_hashes_that_are_all_near_fit_into_memory(tmp_path: Path) -> None:
    """A million pairs of hashes, whose colors differ: 100 MB at once."""
    rng = np.random.default_rng(0)
    chosen = [1 << first | 1 << second for first in range(64) for second in range(first)]
    prints = np.zeros(1500, FINGERPRINT)
    prints["hash"] = rng.choice(np.array(chosen, np.uint64), 1500, replace=False)
    prints["grid"] = rng.integers(0, 256, (1500, 48))
    prints["seen"] = True

    tracemalloc.start()
    try:
        copies, stages = search(
            tmp_path, prints, [1500], Limits(4, 1.0, False), rows_at_once=20_000
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(copies.near) == 0 and not stages.counts[alike.PASSED_OVER]
    assert peak < 3 * 20_000 * BYTES_A_ROW


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


def outputs(folder: Path) -> dict[str, bytes]:
    """What the stages wrote, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("_search/*"))}


def material(seed: int = 0) -> dict[str, Any]:
    """Arguments of `search` whose stages have several jobs each."""
    rng = np.random.default_rng(seed)
    return {
        "prints": random_prints(rng, 120),
        "sizes": [40, 0, 50, 30],
        "limits": Limits(1, 0.95, False),
        "n_fixed": 40,
        "rows_at_once": 60,
        "embeddings": unit_rows(rng, 120),
    }


def test_a_search_that_stops_at_any_file_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full at one file after the other; then there is room again."""
    search(tmp_path / "whole", **material())
    expected = outputs(tmp_path / "whole")
    save = arrays.save
    n_stops = 0

    def stop(path: Path, array: np.ndarray) -> None:
        # The search's files only, in the order in which it writes them.
        nonlocal n_left
        if path.parent.name == arrays.SEARCH_FOLDER:
            n_left -= 1
            if n_left < 0:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, array)

    n_files = sum(name.endswith(".npy") for name in expected)
    for n_left in range(0, n_files, 6):
        folder = tmp_path / f"stopped{n_left}"
        monkeypatch.setattr(arrays, "save", stop)
        with pytest.raises(OSError, match="No space left on device"):
            search(folder, **material())
        monkeypatch.setattr(arrays, "save", save)
        search(folder, **material())
        assert outputs(folder) == expected
        n_stops += 1
    assert n_stops > 5


def test_two_machines_find_what_one_does(tmp_path: Path) -> None:
    search(tmp_path / "whole", **material())
    n_calls = 0
    copies = None
    while copies is None:
        part = n_calls % 2 + 1
        copies, _ = search(tmp_path / "parts", **material(), pool=Pool(1, part, 2))
        n_calls += 1
    # Each stage needs both.
    assert n_calls > 5
    assert outputs(tmp_path / "parts") == outputs(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    search(tmp_path / "whole", **material())
    search(tmp_path / "two", **material(), pool=Pool(2))
    assert outputs(tmp_path / "two") == outputs(tmp_path / "whole")


def test_a_plan_that_is_damaged_or_of_other_samples_is_refused(tmp_path: Path) -> None:
    limits, division = Limits(4, 1.0, False), Division(10**9, 0, 1)
    made = planned(tmp_path, 10, 2, limits, division)
    assert planned(tmp_path, 10, 2, limits, division) == made

    delete = f"delete the folder {re.escape(str(tmp_path))}"
    for n, n_fixed in ((9, 2), (10, 3)):
        with pytest.raises(ValueError, match=r"among 10 samples, 2 of .*delete the"):
            planned(tmp_path, n, n_fixed, limits, division)
    for text in ("", "[]", '{"n": 10}'):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ValueError, match=delete):
            planned(tmp_path, 10, 2, limits, division)


def test_a_search_begun_with_other_cells_is_refused_and_one_of_hashes_goes_on(
    tmp_path: Path,
) -> None:
    limits, division = Limits(4, 0.95, False), Division(10**9, 0, 16)
    made = planned(tmp_path, 10, 2, limits, division)
    path = tmp_path / "plan.json"
    before = json.loads(path.read_text())
    del before["rows_a_cell"]
    path.write_text(json.dumps(before | {"n_cells": 0}))
    assert planned(tmp_path, 10, 2, limits, division) == made

    path.write_text(json.dumps(before | {"n_cells": 6}))
    with pytest.raises(ValueError, match=r"earlier version, which divided .*: delete the folder"):
        planned(tmp_path, 10, 2, limits, division)


STAGES = ["sort", "group", "compare", "centres", "assign", "cells"]
KINDS = [("run", "sort"), ("near", "compare"), ("cells", "assign"), ("centres", "centres")]
KINDS += [("children", "centres"), ("similar", "cells"), ("equal", "cells")]


def stage_of(path: Path) -> str:
    """The stage that writes a file."""
    return next((stage for kind, stage in KINDS if kind in path.stem), "group")


def test_a_damaged_file_of_the_search_is_named(tmp_path: Path) -> None:
    search(tmp_path, **material())
    folder = tmp_path / arrays.SEARCH_FOLDER
    n_damaged = 0
    for path in sorted(folder.glob("*.npy")):
        # Of no crowd no leader is asked for.
        if "leaders" in path.stem:
            continue
        whole = path.read_bytes()
        marks = {mark: mark.read_bytes() for mark in folder.glob("*_*.json")}
        path.write_bytes(whole[: len(whole) * 2 // 3])
        # Who reads it comes later: the file's own job is done.
        for mark in marks:
            if STAGES.index(mark.stem.split("_")[1]) > STAGES.index(stage_of(path)):
                mark.unlink()
        message = rf"{path.name} is damaged \(.*\); delete the folder {folder}"
        with pytest.raises(ValueError, match=message):
            search(tmp_path, **material())
        path.write_bytes(whole)
        for mark, content in marks.items():
            mark.write_bytes(content)
        n_damaged += 1
    assert n_damaged > 10


@pytest.mark.parametrize("n_samples, n_opening", [([1], 1), ([0, 0], 0), ([3, 0, 2], 0), ([2], 2)])
def test_next_to_nothing_is_searched_as_well(
    tmp_path: Path, n_samples: list[int], n_opening: int
) -> None:
    n = sum(n_samples)
    prints = np.zeros(n, FINGERPRINT)
    prints["seen"][:n_opening] = True
    rows = np.zeros((n, 4), np.float16)
    rows[:n_opening, 0] = 1
    limits = Limits(4, 0.95, False)
    copies, _ = search(tmp_path, prints, n_samples, limits, embeddings=rows)
    assert as_exact(copies, n, 0, limits).tolist() == [-1, 0, 0][:n_opening] + [-1] * (
        n - n_opening
    )


def test_many_files_are_not_open_at_once(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.npy" for i in range(30)]
    for i, path in enumerate(paths):
        arrays.save_divided(path, np.array([0, 1, 1]), 2, np.array([i, 100 + i, 200 + i]))

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = set(map(int, os.listdir("/proc/self/fd")))
    limit = next(n for n in range(10**6) if len(set(range(n)) - opened) == 12)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        whole = arrays.joined(paths)
        parts = [arrays.part(path, 1, 2) for path in paths]
        sizes = arrays.sizes(paths)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert whole.reshape(30, 3).tolist() == [[i, 100 + i, 200 + i] for i in range(30)]
    assert [part.tolist() for part in parts] == [[100 + i, 200 + i] for i in range(30)]
    assert sizes.tolist() == [30, 60]
