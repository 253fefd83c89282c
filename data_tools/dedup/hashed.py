"""Near fingerprints in stages of bounded memory: sort runs of shards, group ranges of hashes,
compare what agrees in blocks.

Files in the folder of the search, NNNNN the number of a run, a range, or a job:
    run, run_members      a run's different fingerprints in order, each with the number of its
                          first sample, and (that number, the number of another sample of it)
    prints, members       the same of all samples whose hash lies in a range
    hashes                the different hashes of a range, and where their fingerprints lie
    leaders               of its crowds, the places of those that the others are compared with
    bandB                 (hash, its place), divided by the value of block B
    alike, near           pairs of near fingerprints: of one hash, and of two
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from vlp.data_tools._run.work import Result
from vlp.data_tools.dedup import arrays
from vlp.data_tools.dedup.alike import (
    HASH,
    PASSED_OVER,
    ROW,
    alike_colors,
    hashes_of,
    of_one_hash,
    of_two_hashes,
)
from vlp.data_tools.dedup.plan import Plan, Run

# Two near fingerprints: the numbers of their first samples, and their places among all in order.
PAIR = np.dtype(
    [("earlier", "<i8"), ("later", "<i8"), ("earlier_place", "<i8"), ("later_place", "<i8")]
)
# The end of the last range. No number of 64 bits lies behind it.
END = 1 << 64
_RANGE_SHIFT = 40  # a place: the number of its range above these bits, the place in it below
_DTYPES = {"prints": ROW, "hashes": HASH, "leaders": np.dtype("<i8")}
_CROWD = 1 << 39  # in a place: it is one among the leaders of the range's crowds
_SPREAD = 256  # hashes looked at for each range's edge


def file(folder: Path, number: int, kind: str) -> Path:
    """One of the search's files."""
    return folder / f"{number:05d}_{kind}.npy"


@dataclass(frozen=True)
class Sort:
    """The work on a run: its different fingerprints in order."""

    folder: Path
    prints: list[Path]  # of each shard

    def __call__(self, run: Run) -> Result:
        prints = arrays.joined(self.prints[shard] for shard in run.shards)
        opened = np.flatnonzero(prints["seen"])
        rows = np.empty(len(opened), ROW)
        rows["hash"] = prints["hash"][opened].byteswap()
        rows["grid"] = prints["grid"][opened]
        rows["number"] = run.first + opened

        different, members = each_once(rows)
        arrays.save(file(self.folder, run.number, "run"), different)
        arrays.save(file(self.folder, run.number, "run_members"), members)
        return {"counts": {"samples read": len(prints)}, "prints": len(different)}


def hash_ranges(folder: Path, n_runs: int, n_rows: int, rows_at_once: int) -> list[int]:
    """The first hash of each range, and END: about as many rows in each as memory allows."""
    n_ranges = max(1, -(-n_rows // rows_at_once))
    spread = [np.empty(0, np.uint64)]
    for number in range(n_runs):
        hashes = arrays.load(file(folder, number, "run"))["hash"]
        # Of each run in proportion to its size.
        n_looked_at = -(-_SPREAD * n_ranges * len(hashes) // max(1, n_rows))
        places = np.linspace(0, max(0, len(hashes) - 1), n_looked_at).astype(np.int64)
        spread.append(hashes[places])

    in_order = np.sort(np.concatenate(spread))
    steps = np.arange(1, n_ranges) * len(in_order) // n_ranges
    inner = set(in_order[steps].tolist()) - {0}
    return [0, *sorted(inner), END]


@dataclass(frozen=True)
class Group:
    """The work on a range of hashes: equal fingerprints of all runs, pairs of one hash, bands."""

    folder: Path
    plan: Plan
    n_runs: int

    def __call__(self, item: tuple[int, int, int]) -> Result:
        number, low, high = item
        runs = (arrays.load(file(self.folder, run, "run")) for run in range(self.n_runs))
        rows = np.concatenate([_between(run, low, high) for run in runs])
        prints, members = each_once(rows)
        hashes = hashes_of(prints)

        counts: Counter[str] = Counter({"samples read": len(rows)})
        places = number << _RANGE_SHIFT
        leaders: dict[int, np.ndarray] = {}
        alike = [
            _pairs(prints["number"][i], i + places, prints["number"][j], j + places, self.plan)
            for i, j in of_one_hash(prints, hashes, leaders, counts)
        ]
        for kind, array in (
            ("prints", prints),
            ("members", members),
            ("hashes", _with_crowds(hashes, leaders)),
            ("leaders", np.concatenate([np.empty(0, np.int64), *leaders.values()])),
            ("alike", np.concatenate([np.empty(0, PAIR), *alike])),
        ):
            arrays.save(file(self.folder, number, kind), array)
        self._save_bands(number, hashes["hash"])
        return {"counts": counts}

    def _save_bands(self, number: int, hashes: np.ndarray) -> None:
        places = np.arange(len(hashes), dtype=np.uint64) + np.uint64(number << _RANGE_SHIFT)
        rows = np.stack([hashes, places], 1)
        bands = self.plan.bands
        for block in self.plan.blocks:
            parts = bands.parts(hashes, block)
            path = file(self.folder, number, f"band{block}")
            arrays.save_divided(path, parts, bands.n_parts(block), rows)


def _with_crowds(hashes: np.ndarray, leaders: dict[int, np.ndarray]) -> np.ndarray:
    """HASHes whose crowds name the places of their leaders among all leaders."""
    hashes = hashes.copy()
    start = 0
    for number, of_crowd in leaders.items():
        hashes["first"][number] = _CROWD + start
        hashes["n"][number] = len(of_crowd)
        start += len(of_crowd)
    return hashes


def _between(rows: np.ndarray, low: int, high: int) -> np.ndarray:
    """The rows of hashes from low to below high, of a file in order."""
    start = np.searchsorted(rows["hash"], np.uint64(low))
    stop = np.searchsorted(rows["hash"], np.uint64(high - 1), "right")
    return np.array(rows[start:stop])


def each_once(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the different fingerprints of rows in order, each with its first number; [m, 2] that number
    and each further one). Among equal ones, `rows` must rise in number.
    """
    order = np.argsort(rows["hash"], kind="stable")
    hashes = rows["hash"][order]
    is_as_before = np.zeros(len(rows), bool)
    is_as_before[1:] = hashes[1:] == hashes[:-1]

    # Few hashes come more than once, and only of those all bytes are compared.
    in_tie = is_as_before | np.append(is_as_before[1:], False)
    tied = order[in_tie]
    texts = _texts(rows[tied])
    order[in_tie] = tied[np.argsort(texts, kind="stable")]
    rows = rows[order]
    is_as_before[1:] &= (rows["grid"][1:] == rows["grid"][:-1]).all(1)

    firsts = np.flatnonzero(~is_as_before)
    group = np.cumsum(~is_as_before) - 1
    numbers = rows["number"]
    of_further = numbers[firsts][group[is_as_before]]
    return rows[firsts], np.stack([of_further, numbers[is_as_before]], 1)


def _texts(rows: np.ndarray) -> np.ndarray:
    """Hash and colors as texts of bytes, which sort as fingerprints do."""
    # The end mark: numpy takes zeros at the end of a text away.
    whole = np.empty(len(rows), [("hash", ">u8"), ("grid", "u1", 48), ("end", "u1")])
    whole["hash"], whole["grid"], whole["end"] = rows["hash"], rows["grid"], 1
    return whole.view(f"S{whole.dtype.itemsize}")


def _pairs(
    numbers: np.ndarray,
    places: np.ndarray,
    others: np.ndarray,
    other_places: np.ndarray,
    plan: Plan,
) -> np.ndarray:
    """Pairs of fingerprints, the earlier one first; those that decide nothing are left out."""
    swapped = numbers > others
    pairs = np.empty(len(numbers), PAIR)
    pairs["earlier"], pairs["later"] = np.minimum(numbers, others), np.maximum(numbers, others)
    pairs["earlier_place"] = np.where(swapped, other_places, places)
    pairs["later_place"] = np.where(swapped, places, other_places)
    return pairs[plan.matters(pairs["earlier"])]


@dataclass(frozen=True)
class Compare:
    """The work on some values of one block: near fingerprints of two hashes."""

    folder: Path
    plan: Plan
    n_ranges: int

    def __call__(self, item: tuple[int, int, int, int]) -> Result:
        number, block, low, high = item
        bands = (file(self.folder, i, f"band{block}") for i in range(self.n_ranges))
        rows = np.concatenate([arrays.part(band, low, high) for band in bands])
        hashes = np.ascontiguousarray(rows[:, 0])
        places = rows[:, 1].astype(np.int64)
        del rows

        counts: Counter[str] = Counter({"samples read": len(hashes)})
        near: list[np.ndarray] = [np.empty(0, PAIR)]
        for left, right in self._near_hashes(hashes, places, block, counts):
            near += self._alike(left, right, counts)
        arrays.save(file(self.folder, number, "near"), np.concatenate(near))
        return {"counts": counts}

    def _near_hashes(
        self, hashes: np.ndarray, places: np.ndarray, block: int, counts: Counter[str]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The places of near hashes, pair by pair; of many pairs as many at a time as memory has
        room for.
        """
        left, right = [places[:0]], [places[:0]]
        n_pairs = 0
        for i, j, n_passed_over in self.plan.bands.pairs(hashes, block, self.plan.rows_at_once):
            counts[PASSED_OVER] += n_passed_over
            left.append(places[i])
            right.append(places[j])
            n_pairs += len(i)
            # No more often: each look at colors opens the files of all ranges. No later: of a
            # hundred thousand hashes that are all near, the pairs are a billion.
            if n_pairs >= self.plan.rows_at_once:
                yield np.concatenate(left), np.concatenate(right)
                left, right, n_pairs = [places[:0]], [places[:0]], 0
        yield np.concatenate(left), np.concatenate(right)

    def _alike(
        self, left: np.ndarray, right: np.ndarray, counts: Counter[str]
    ) -> Iterator[np.ndarray]:
        """PAIRs of alike fingerprints of pairs of hashes, which are named by their places."""
        for i, j in of_two_hashes(self._hashes(left), self._hashes(right), counts):
            i, j = self._places(i), self._places(j)
            prints, others = self._rows("prints", i), self._rows("prints", j)
            alike = alike_colors(prints["grid"].astype(np.int16), others["grid"])
            prints, others = prints[alike], others[alike]
            yield _pairs(prints["number"], i[alike], others["number"], j[alike], self.plan)

    def _hashes(self, places: np.ndarray) -> np.ndarray:
        """HASHes, with the places of their fingerprints among all."""
        hashes = self._rows("hashes", places)
        hashes["first"] += places >> _RANGE_SHIFT << _RANGE_SHIFT
        return hashes

    def _places(self, places: np.ndarray) -> np.ndarray:
        """Places of fingerprints among all, in place of those of leaders."""
        of_crowd = np.flatnonzero(places & _CROWD)
        if len(of_crowd):
            wanted = places[of_crowd]
            places[of_crowd] = self._rows("leaders", wanted ^ _CROWD)
            places[of_crowd] += wanted >> _RANGE_SHIFT << _RANGE_SHIFT
        return places

    def _rows(self, kind: str, places: np.ndarray) -> np.ndarray:
        """The rows of the ranges' files at some places among all."""
        ranges = places >> _RANGE_SHIFT
        in_range = places & ((1 << _RANGE_SHIFT) - 1)
        rows = np.empty(len(places), _DTYPES[kind])
        for number in np.unique(ranges).tolist():
            here = ranges == number
            path = file(self.folder, number, kind)
            rows[here] = _mapped(path, path.stat().st_mtime_ns)[in_range[here]]
        return rows


# Each keeps a file open.
@lru_cache(maxsize=256)
def _mapped(path: Path, mtime_ns: int) -> np.ndarray:
    return arrays.load(path)
