"""Which sample stands at which row of which step: a pure function of (seed, step), in constant memory.

Rows of all steps are numbered: draw = step · B + row. Without weights an epoch is one pseudo-random permutation of all
samples of all sources, cut into N // B whole batches; its last N mod B samples are left out (other ones each epoch).
With weights every source runs through permutations of its own, one after another, and the draws are dealt to the
sources so evenly that among any first n draws each source has its share, to within one draw a source.

Where shards are fetched whole (`Source.window`), a permutation keeps to a window of them at a time (`Windows`).

Permutations are Feistel networks (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"): the i-th element
is computed, not looked up, so a billion samples cost no memory, no start-up time and no state to save.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from vlp.data.sources import Source
from vlp.seeds import derive
from vlp.types import Sample

_ROUNDS = 6


def permute(n: int, key: int, i: np.ndarray) -> np.ndarray:
    """Elements `i` of the permutation of range(n) that `key` names; int64 like `i`."""
    if n <= 1:
        return np.zeros_like(i)
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    keys = [np.uint64(derive(key, "round", r)) for r in range(_ROUNDS)]
    result = np.array(i, np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():  # the network permutes a power of four ≥ n; walk on until back within n (< 4 walks on average)
        result[outside] = _feistel(result[outside], half, keys)
        outside = result >= n
    return result.astype(np.int64)


def _feistel(x: np.ndarray, half: int, keys: list[np.uint64]) -> np.ndarray:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = x >> shift, x & mask
    for key in keys:
        mixed = right + key
        for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):  # the finaliser of splitmix64
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(multiplier)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
    return left << shift | right


class Windows:
    """A permutation that keeps to a few shards at a time, for data whose shards are fetched whole.

    Shards are permuted; each `width` of them in that order are a window; samples are permuted within their window.
    """

    def __init__(self, runs: np.ndarray, width: int, key: int) -> None:  # runs: samples of each shard
        order = permute(len(runs), derive(key, "shards"), np.arange(len(runs)))
        self.firsts = (np.cumsum(runs) - runs)[order]  # number of each shard's first sample, in the order of reading
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
            place = start + permute(int(self.window_ends[w] - start), derive(self.key, "window", int(w)), i[here] - start)
            shard = np.searchsorted(self.ends, place, side="right")
            result[here] = self.firsts[shard] + place - (self.ends[shard] - self.sizes[shard])
        return result


class Mixture:
    """Several sources as one numbered collection: sample_id counts through the sources in order."""

    def __init__(self, sources: list[Source], weights: list[float | None], *, seed: int, shuffle: bool) -> None:
        if any(w is None for w in weights) and any(w is not None for w in weights):
            raise ValueError(f"weights are {weights}: give every source a weight, or none (every sample once an epoch)")
        self.sources, self.seed, self.shuffle = sources, seed, shuffle
        self.firsts = np.cumsum([0, *map(len, sources)])
        self.n_samples = int(self.firsts[-1])
        self.shares = None if weights[0] is None else [Fraction(w).limit_denominator(10**6) for w in weights]
        width = max(source.window for source in sources)
        whole = np.concatenate([_runs(source) for source in sources]) if width and self.shares is None else None
        # Stream 0 is all sources together, stream s + 1 is source s: (samples of each shard, shards in a window).
        self._shards = [(whole, width)] + [(_runs(source), source.window) if source.window else (None, 0) for source in sources]
        self._windows: dict[int, Windows] = {}

    def read(self, sample_id: int) -> Sample:
        """The sample with this number; raises OSError or ValueError where it cannot be read."""
        s = self.source_of(sample_id)
        return replace(self.sources[s][sample_id - int(self.firsts[s])], sample_id=sample_id)

    def source_of(self, sample_id: int) -> int:
        """The position of the source that a sample belongs to."""
        return int(np.searchsorted(self.firsts, sample_id, side="right")) - 1

    def steps_per_epoch(self, size: int) -> int:
        """Batches of `size` rows that an epoch gives."""
        return self.n_samples // size

    def identity(self) -> dict[str, Any]:
        """What the order depends on besides sources, weights, seed and shuffle; JSON-able. A resumed run compares it."""
        return {}

    def batch(self, step: int, size: int) -> np.ndarray:
        """Sample ids [size] of one step's global batch, int64."""
        if self.shares is None:
            epoch, position = divmod(step, self.steps_per_epoch(size))
            return self._permuted(self.n_samples, epoch, 0, position * size + np.arange(size))
        draws = step * size + np.arange(size)
        result = np.empty(size, np.int64)
        for s, (mine, count) in enumerate(self._deal(draws)):
            n = len(self.sources[s])
            for epoch in range(int(count[mine].min()) // n, int(count[mine].max()) // n + 1) if mine.any() else ():
                now = mine & (count // n == epoch)
                result[now] = self.firsts[s] + self._permuted(n, epoch, s + 1, count[now] % n)
        return result

    def replacements(self, sample_id: int, step: int, row: int, batch: np.ndarray) -> Iterator[int]:
        """Stand-ins for a sample that cannot be read: others of its source, not in the batch while there are such.

        Rows of one batch try different stand-ins (those at positions row, row + B, … of a permutation), so that ranks
        need not know of each other's losses to avoid using one twice.
        """
        s = self.source_of(sample_id)
        n, first = len(self.sources[s]), int(self.firsts[s])
        key, present = derive(self.seed, "replace", step, s), set(batch.tolist())
        own = first + permute(n, key, np.arange(row, min(n, row + 64 * len(batch)), len(batch)))
        yield from (int(i) for i in own if int(i) not in present)
        for wanted in (True, False):  # a source hardly larger than the batch: share, and at last repeat
            for i in range(n):
                candidate = first + int(permute(n, key, np.array([i]))[0])
                if (candidate not in present) == wanted and candidate != sample_id:
                    yield candidate

    def prepare(self, ids: np.ndarray) -> None:
        """Let the sources fetch what these samples need, without waiting."""
        for s, source in enumerate(self.sources):
            if source.window:
                source.prepare(ids[(ids >= self.firsts[s]) & (ids < self.firsts[s + 1])] - self.firsts[s])

    def ahead(self, size: int) -> int:
        """How many steps of `size` rows lie between a sample and the one a window later; 0 where nothing is fetched."""
        spans = [source.window * len(source) / len(_runs(source)) for source in self.sources if source.window]
        return max(1, int(max(spans) / size)) if spans else 0

    def _permuted(self, n: int, epoch: int, stream: int, i: np.ndarray) -> np.ndarray:
        if not self.shuffle:
            return i
        key = derive(self.seed, "order", stream, epoch)
        runs, width = self._shards[stream]
        if runs is None:
            return permute(n, key, i)
        if key not in self._windows:
            if len(self._windows) > 2 * len(self._shards):  # epochs that are over
                self._windows.clear()
            self._windows[key] = Windows(runs, width, key)
        return self._windows[key](i)

    def _deal(self, draws: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each source: which draws are its own, and how many it had before each draw."""
        before, after = draws.astype(object), draws.astype(object) + 1  # Python integers: products exceed 64 bits
        left = sum(self.shares)
        for share in self.shares:
            part = share / left if left else Fraction(0)
            mine_before = before * part.numerator // part.denominator
            mine_after = after * part.numerator // part.denominator
            yield (mine_after > mine_before).astype(bool), mine_before.astype(np.int64)
            before, after, left = before - mine_before, after - mine_after, left - share


def _runs(source: Source) -> np.ndarray:
    """Samples of each shard; a source without shards counts as runs of ten thousand."""
    if source.window:
        return source.runs
    n = len(source)
    return np.array([10_000] * (n // 10_000) + ([n % 10_000] if n % 10_000 else []), np.int64)
