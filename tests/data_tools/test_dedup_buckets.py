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

from tests.data_tools.dedup_search import as_exact, flipped, random_prints, search, unit_rows
from vlp.data_tools._run.work import Pool
from vlp.data_tools.dedup import alike, arrays, bands
from vlp.data_tools.dedup.bands import Bands
from vlp.data_tools.dedup.near import FINGERPRINT, Limits
from vlp.data_tools.dedup.near import decide as decide_exactly
from vlp.data_tools.dedup.plan import BYTES_A_ROW, Division, planned

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
