"""Pairs of fingerprints whose hashes are near, compared by their colors.

A placeholder or a blank page comes a million times in what is crawled, in a million shades: all
pairs of one hash would take the square of that. So at most MOST_ALIKE fingerprints of a hash are
all compared with each other. Of more, each is compared with those before it that stay as far as
they tell, which finds nearly all copies; what is passed over is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator

import numpy as np

from vlp.data_tools.dedup.near import COLORS

# A fingerprint and the number of its first sample. The hash has its bytes turned round: rows then
# sort as the bytes of fingerprints do.
ROW = np.dtype([("hash", "<u8"), ("grid", "u1", 48), ("number", "<i8")])
# A hash, and where its fingerprints lie.
HASH = np.dtype([("hash", "<u8"), ("first", "<i8"), ("n", "<i8")])

MOST_ALIKE = 1024
MOST_LEADERS = 8192  # of those that stay, with how many the later ones are compared
PASSED_OVER = "not compared: pairs, because too many pictures are alike"
_AT_ONCE = 1 << 17  # pairs of grids
_BLOCK = 128
_LAYERS = 2

Pairs = tuple[np.ndarray, np.ndarray]  # places of fingerprints


def hashes_of(prints: np.ndarray) -> np.ndarray:
    """The different hashes, HASH, of fingerprints in order."""
    firsts = np.flatnonzero(np.diff(prints["hash"], prepend=~prints["hash"][:1]))
    hashes = np.empty(len(firsts), HASH)
    hashes["hash"] = prints["hash"][firsts]
    hashes["first"] = firsts
    hashes["n"] = np.diff(firsts, append=len(prints))
    return hashes


def of_one_hash(prints: np.ndarray, hashes: np.ndarray, counts: Counter[str]) -> Iterator[Pairs]:
    """The pairs of alike colors within each hash."""
    few = hashes[hashes["n"] <= MOST_ALIKE]
    ends = few["first"] + few["n"]
    for step in range(1, int(few["n"].max(initial=0))):
        has_more = few["n"] > step
        few, ends = few[has_more], ends[has_more]
        # Each fingerprint of a hash with the one `step` places behind.
        at = _ranges(few["first"], ends - step - few["first"])
        yield from _checked(prints["grid"], at, at + step)

    for one in hashes[hashes["n"] > MOST_ALIKE]:
        first = int(one["first"])
        crowd = prints[first : first + int(one["n"])]
        for i, j in _crowd(crowd, counts):
            yield first + i, first + j


def _crowd(crowd: np.ndarray, counts: Counter[str]) -> Iterator[Pairs]:
    """Each of many fingerprints of one hash with those before it that stay as far as this hash
    tells; and the copies among themselves once more, as if the others were not there, because what
    stays here may be a copy of one of another hash.
    """
    rest = np.argsort(crowd["number"], kind="stable")
    for _ in range(_LAYERS):
        rest = yield from _with_leaders(crowd["grid"], rest, counts)


def _with_leaders(
    grids: np.ndarray, in_order: np.ndarray, counts: Counter[str]
) -> Generator[Pairs, None, np.ndarray]:
    """The pairs of some fingerprints, by their places in order, with those before them that are no
    copies of one before; returns the places of the copies.
    """
    # Sums of the 16 cells, [n, 3]: what differs in these by more, differs by more in all 48.
    sums = grids.reshape(len(grids), -1, 3).sum(1, np.int16)
    leaders = np.empty(0, np.int64)
    copies = [leaders]
    for start in range(0, len(in_order), _BLOCK):
        block = in_order[start : start + _BLOCK]
        is_copy = np.zeros(len(block), bool)
        for low in range(0, len(leaders), _AT_ONCE // _BLOCK):
            others = leaders[low : low + _AT_ONCE // _BLOCK]
            row, column = _between(grids, sums, block, others)
            yield others[column], block[row]
            is_copy[row] = True

        # Within the block a leader must be known before those behind it are compared.
        row, column = _between(grids, sums, block, block)
        row, column = row[column < row], column[column < row]
        yield block[column], block[row]
        for place, earlier in zip(row.tolist(), column.tolist()):
            is_copy[place] |= not is_copy[earlier]

        copies.append(block[is_copy])
        new = block[~is_copy]
        n_free = MOST_LEADERS - len(leaders)
        counts[PASSED_OVER] += len(new[n_free:]) * (len(in_order) - start - len(block))
        leaders = np.concatenate([leaders, new[:n_free]])
    return np.concatenate(copies)


def _between(grids: np.ndarray, sums: np.ndarray, block: np.ndarray, others: np.ndarray) -> Pairs:
    """(places in `block`, places in `others`) of alike fingerprints, by rising places."""
    apart = np.abs(sums[block][:, None] - sums[others]).sum(-1, np.int16)
    row, column = np.nonzero(apart <= COLORS * grids.shape[-1])
    alike = alike_colors(grids[block[row]].astype(np.int16), grids[others[column]])
    return row[alike], column[alike]


def of_two_hashes(
    left: np.ndarray,  # HASH [k]
    right: np.ndarray,  # HASH [k], each near that of `left`
    counts: Counter[str],
) -> Iterator[Pairs]:
    """The places of all pairs of fingerprints of each pair of hashes, about _AT_ONCE at a time."""
    # A few beside a crowd are compared with all of it.
    n_left = np.minimum(left["n"], np.maximum(MOST_ALIKE, MOST_ALIKE**2 // right["n"]))
    n_right = np.minimum(right["n"], np.maximum(MOST_ALIKE, MOST_ALIKE**2 // left["n"]))
    n_pairs = n_left * n_right
    counts[PASSED_OVER] += int((left["n"] * right["n"] - n_pairs).sum())

    for start, stop in _runs(np.cumsum(n_pairs) // _AT_ONCE):
        here = slice(start, stop)
        pair = np.repeat(np.arange(start, stop), n_pairs[here])
        nth = _ranges(np.zeros(stop - start, np.int64), n_pairs[here])
        i = left["first"][pair] + nth // n_right[pair]
        j = right["first"][pair] + nth % n_right[pair]
        yield i, j


def _checked(grids: np.ndarray, i: np.ndarray, j: np.ndarray) -> Iterator[Pairs]:
    for start in range(0, len(i), _AT_ONCE):
        a, b = i[start : start + _AT_ONCE], j[start : start + _AT_ONCE]
        alike = alike_colors(grids[a].astype(np.int16), grids[b])
        yield a[alike], b[alike]


def alike_colors(grids: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether grids, int16, differ by at most COLORS levels in the mean."""
    return np.abs(grids - others).sum(-1) <= COLORS * grids.shape[-1]


def _ranges(firsts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """firsts[0], firsts[0] + 1, … of sizes[0] numbers, then those of the next."""
    ends = np.cumsum(sizes)
    n = int(ends[-1]) if len(ends) else 0
    return np.arange(n) + np.repeat(firsts - (ends - sizes), sizes)


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of each run of equal values."""
    if not len(values):
        return []
    starts = np.flatnonzero(np.diff(values, prepend=values[0] - 1))
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(values)]))
