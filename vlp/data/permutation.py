"""Pseudo-random orders whose i-th element is computed, not looked up: permutations, independent
draws, and permutations that keep to a few shards at a time.

Permutations are Feistel networks (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"):
the i-th element is computed, not looked up, so a billion samples cost no memory, no start-up time
and no state to save.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from vlp.data.lanes import Stretches
from vlp.seeds import derive

_ROUNDS = 6
_GOLDEN_STEP = 0x9E3779B97F4A7C15  # splitmix64's step between two states
# Of splitmix64's finaliser, as numpy's numbers: of few elements a conversion would cost as much as
# the arithmetic.
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFT, _LAST_SHIFT = np.uint64(29), np.uint64(32)


def permute(n: int, key: int, i: np.ndarray) -> np.ndarray:
    """Elements `i` of the permutation of range(n) that `key` names; int64 like `i`."""
    if n <= 1:
        return np.zeros_like(i)

    numbers = i.astype(np.uint64)
    return _walked(numbers, np.uint64(n), np.uint64(_half(n)), _round_keys(key))


def permute_each(
    sizes: Sequence[int], keys: Sequence[int], which: np.ndarray, i: np.ndarray
) -> np.ndarray:
    """Elements `i` [k] of several permutations: element i[j] of that of range(sizes[which[j]]) that
    keys[which[j]] names; int64 [k].

    Equal to `permute` of each by itself. Of a few elements each, a call a permutation would cost as
    much as all of them together do here.
    """
    halves = np.array([_half(n) for n in sizes], np.uint64)
    round_keys = np.stack([_round_keys(key) for key in keys], axis=1)  # [rounds, permutations]
    bounds = np.array(sizes, np.uint64)[which]
    return _walked(i.astype(np.uint64), bounds, halves[which], round_keys[:, which])


def _half(n: int) -> int:
    """Half the bits of the numbers that the network permutes, the least such range that holds n."""
    return max(1, (int(n - 1).bit_length() + 1) // 2)


@lru_cache(maxsize=1024)
def _round_keys(key: int) -> np.ndarray:
    """The keys of a network's rounds, uint64 [rounds]."""
    return np.array([derive(key, "round", r) for r in range(_ROUNDS)], np.uint64)


def _walked(
    x: np.ndarray, n: np.ndarray | np.uint64, half: np.ndarray | np.uint64, keys: np.ndarray
) -> np.ndarray:
    """The numbers `x` [k] permuted below `n`, int64; n, half and each of `keys` are one for all
    numbers, or [k].
    """
    # Walk on from numbers ≥ n until back within n: fewer than four walks on average.
    result = np.empty(len(x), np.int64)
    places = np.arange(len(x))
    while len(places):
        x = _feistel(x, half, keys)
        outside = x >= n
        inside = ~outside
        result[places[inside]] = x[inside]

        places, x = places[outside], x[outside]
        if isinstance(n, np.ndarray) and isinstance(half, np.ndarray):
            n, half, keys = n[outside], half[outside], keys[:, outside]
    return result


def _feistel(x: np.ndarray, half: np.ndarray | np.uint64, keys: np.ndarray) -> np.ndarray:
    one = np.uint64(1)
    mask = (one << half) - one

    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_scramble(right + key) & mask)
    return left << half | right


def _scramble(x: np.ndarray) -> np.ndarray:
    """A hash of uint64 numbers: the finaliser of splitmix64."""
    for multiplier in _MULTIPLIERS:
        mixed = x >> _SHIFT
        mixed ^= x
        mixed *= multiplier
        x = mixed
    return x ^ (x >> _LAST_SHIFT)


def uniform(n: int, key: int, i: np.ndarray) -> np.ndarray:
    """Draws `i` of the sequence of independent uniform numbers in range(n) that `key` names; int64
    like `i`.
    """
    # Spread first: neighbouring draws would otherwise differ in their last bits only.
    states = i.astype(np.uint64) * np.uint64(_GOLDEN_STEP)
    hashes = _scramble(_scramble(states + np.uint64(key)))
    return (hashes % np.uint64(n)).astype(np.int64)


class Windows:
    """A permutation that keeps to a few shards at a time, for data whose shards are fetched whole.

    Shards are permuted; each `width` of them in that order are a window; samples are permuted
    within their window. `runs` [n shards] is the number of samples of each shard. With lanes
    (`vlp.data.lanes`) each has windows of its own, in its stretch of the shards.
    """

    def __init__(self, runs: np.ndarray, width: int, key: int, n_lanes: int = 1) -> None:
        order = permute(len(runs), derive(key, "shards"), np.arange(len(runs)))

        # All of these [n shards], in the order of reading: the first sample's number, the number of
        # samples, and how many samples are read with the shard's last one.
        self.firsts = (np.cumsum(runs) - runs)[order]
        self.sizes = runs[order]
        self.ends = np.cumsum(self.sizes)

        self.stretches = Stretches(int(self.ends[-1]), n_lanes)
        self.window_ends = self.stretches.window_ends(self.ends, width)
        self.key = key

    def __call__(self, i: np.ndarray) -> np.ndarray:
        """Elements `i` of the permutation."""
        i = self.stretches.positions(i)
        window = np.searchsorted(self.window_ends, i, side="right")
        result = np.empty_like(i)
        for w in np.unique(window):
            start = self.window_ends[w - 1] if w else 0
            size = int(self.window_ends[w] - start)
            here = window == w
            key = derive(self.key, "window", int(w))
            # In the order of reading.
            place = start + permute(size, key, i[here] - start)

            shard = np.searchsorted(self.ends, place, side="right")
            shard_start = self.ends[shard] - self.sizes[shard]
            result[here] = self.firsts[shard] + place - shard_start
        return result
