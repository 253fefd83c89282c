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


def permute(n: int, key: int, i: np.ndarray) -> np.ndarray:
    """Elements `i` of the permutation of range(n) that `key` names; int64 like `i`."""
    if n <= 1:
        return np.zeros_like(i)
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    keys = [np.uint64(derive(key, "round", r)) for r in range(_ROUNDS)]
    result = np.array(i, np.uint64)
    outside = np.ones(len(result), bool)
    # the network permutes a power of four ≥ n; walk on until back within n (< 4 walks on average)
    while outside.any():
        result[outside] = _feistel(result[outside], half, keys)
        outside = result >= n
    return result.astype(np.int64)


def _feistel(x: np.ndarray, half: int, keys: list[np.uint64]) -> np.ndarray:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = x >> shift, x & mask
    for key in keys:
        left, right = right, left ^ (_scramble(right + key) & mask)
    return left << shift | right


def _scramble(x: np.ndarray) -> np.ndarray:
    """A hash of uint64 numbers: the finaliser of splitmix64."""
    for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        x = (x ^ (x >> np.uint64(29))) * np.uint64(multiplier)
    return x ^ (x >> np.uint64(32))


def uniform(n: int, key: int, i: np.ndarray) -> np.ndarray:
    """Draws `i` of the sequence of independent uniform numbers in range(n) that `key` names; int64
    like `i`.
    """
    steps = i.astype(np.uint64) * np.uint64(
        0x9E3779B97F4A7C15
    )  # splitmix64's, so that neighbouring draws differ in all bits
    return (_scramble(_scramble(steps + np.uint64(key))) % np.uint64(n)).astype(np.int64)


class Windows:
    """A permutation that keeps to a few shards at a time, for data whose shards are fetched whole.

    Shards are permuted; each `width` of them in that order are a window; samples are permuted
    within their window.
    """

    def __init__(
        self, runs: np.ndarray, width: int, key: int
    ) -> None:  # runs: samples of each shard
        order = permute(len(runs), derive(key, "shards"), np.arange(len(runs)))
        self.firsts = (np.cumsum(runs) - runs)[
            order
        ]  # number of each shard's first sample, in the order of reading
        self.ends = np.cumsum(runs[order])
        self.window_ends = self.ends[[*range(width - 1, len(runs) - 1, width), len(runs) - 1]]
        self.sizes, self.key = runs[order], key

    def __call__(self, i: np.ndarray) -> np.ndarray:
        """Elements `i` of the permutation."""
        window = np.searchsorted(self.window_ends, i, side="right")
        result = np.empty_like(i)
        for w in np.unique(window):
            start = self.window_ends[w - 1] if w else 0
            here = window == w
            place = start + permute(
                int(self.window_ends[w] - start),
                derive(self.key, "window", int(w)),
                i[here] - start,
            )
            shard = np.searchsorted(self.ends, place, side="right")
            result[here] = self.firsts[shard] + place - (self.ends[shard] - self.sizes[shard])
        return result
