"""Pseudo-random orders whose i-th element is computed, not looked up: permutations, independent
draws, and permutations that keep to a few shards at a time.

Permutations are Feistel networks (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"):
the i-th element is computed, not looked up, so a billion samples cost no memory, no start-up time
and no state to save.
"""

from __future__ import annotations

import numpy as np

from vlp.seeds import derive

_ROUNDS = 6
_GOLDEN_STEP = 0x9E3779B97F4A7C15  # splitmix64's step between two states
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64's finaliser


def permute(n: int, key: int, i: np.ndarray) -> np.ndarray:
    """Elements `i` of the permutation of range(n) that `key` names; int64 like `i`."""
    if n <= 1:
        return np.zeros_like(i)

    # The network permutes the numbers of 2 · half bits, the least such range that holds n.
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    keys = [np.uint64(derive(key, "round", r)) for r in range(_ROUNDS)]

    # Walk on from numbers ≥ n until back within n: fewer than four walks on average.
    result = np.array(i, np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():
        result[outside] = _feistel(result[outside], half, keys)
        outside = result >= n
    return result.astype(np.int64)


def _feistel(x: np.ndarray, half: int, keys: list[np.uint64]) -> np.ndarray:
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)

    left, right = x >> shift, x & mask
    for key in keys:
        left, right = right, left ^ (_scramble(right + key) & mask)
    return left << shift | right


def _scramble(x: np.ndarray) -> np.ndarray:
    """A hash of uint64 numbers: the finaliser of splitmix64."""
    for multiplier in _MULTIPLIERS:
        x = (x ^ (x >> np.uint64(29))) * np.uint64(multiplier)
    return x ^ (x >> np.uint64(32))


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
    within their window. `runs` [n shards] is the number of samples of each shard.
    """

    def __init__(self, runs: np.ndarray, width: int, key: int) -> None:
        order = permute(len(runs), derive(key, "shards"), np.arange(len(runs)))

        # All of these [n shards], in the order of reading: the first sample's number, the number of
        # samples, and how many samples are read with the shard's last one.
        self.firsts = (np.cumsum(runs) - runs)[order]
        self.sizes = runs[order]
        self.ends = np.cumsum(self.sizes)

        last = len(runs) - 1
        last_shards = [*range(width - 1, last, width), last]  # of each window
        self.window_ends = self.ends[last_shards]
        self.key = key

    def __call__(self, i: np.ndarray) -> np.ndarray:
        """Elements `i` of the permutation."""
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
