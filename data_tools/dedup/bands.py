"""Hashes within a few bits of one another, found without comparing all with all.

A hash is cut into m blocks. Two hashes that differ in at most d bits differ in at most d blocks, so
they agree in m − d of them (pigeonhole principle). For each choice of m − d blocks the hashes are
sorted by their bits there, and only those that agree in all of these are compared: no pair is
missed, as in Manku, Jain and Das Sarma, "Detecting Near-Duplicates for Web Crawling" (WWW 2007).
More blocks mean more sorts, C(m, d), and fewer pairs that agree by chance.

The choices are grouped by their first block, which is one of the first d + 1. So d + 1 copies of
the hashes, each divided by the value of one block, are all that has to be shuffled between
processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import comb

import numpy as np

BITS = 64
LARGEST = 4096  # hashes that agree in one choice and are all compared with each other
# Of a row in one sort, and of a pair, measured; real hashes agree more often than random ones do.
_SORT_NS, _PAIR_NS, _SKEW = 60, 20, 4
_MOST_BLOCKS = 12
_MOST_PART_BITS = 12


@dataclass(frozen=True)
class Bands:
    """How hashes of 64 bits are cut, for a distance of at most `distance` bits."""

    distance: int
    n_blocks: int

    @classmethod
    def cheapest(cls, distance: int, n: int) -> Bands:
        """The number of blocks for which n hashes take the least time."""
        return min(
            (cls(distance, n_blocks) for n_blocks in range(distance + 1, _MOST_BLOCKS + 1)),
            key=lambda bands: bands.cost_ns(n),
        )

    def cost_ns(self, n: int) -> float:
        """Nanoseconds to sort and to compare n random hashes on one core."""
        n_sorts = comb(self.n_blocks, self.distance)
        n_key_bits = BITS * (self.n_blocks - self.distance) / self.n_blocks
        pairs_a_sort = _SKEW * n * n / 2 / 2**n_key_bits
        return n_sorts * (n * _SORT_NS + pairs_a_sort * _PAIR_NS)

    @property
    def firsts(self) -> range:
        """The blocks by whose values hashes are divided."""
        return range(self.distance + 1)

    @cached_property
    def edges(self) -> list[int]:
        """The first bit of each block, and the end of the last."""
        return [round(BITS * i / self.n_blocks) for i in range(self.n_blocks + 1)]

    def n_parts(self, block: int) -> int:
        """Into how many parts hashes are divided by a block's value."""
        return 1 << min(self._n_bits(block), _MOST_PART_BITS)

    def parts(self, hashes: np.ndarray, block: int) -> np.ndarray:
        """The part that each hash belongs to, by the first bits of the block."""
        n_bits_left = max(0, self._n_bits(block) - _MOST_PART_BITS)
        return self._values(hashes, block) >> np.uint64(n_bits_left)

    def pairs(
        self, hashes: np.ndarray, first: int, most_rows: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """(places i, places j, pairs passed over) of hashes within `distance` bits of one another
        that agree in block `first` and in no earlier choice of blocks: over all `firsts` each pair
        comes once. The hashes differ. Sorts at most about `most_rows` of them at a time.
        """
        n_further = self.n_blocks - self.distance - 1
        n_passes = max(1, -(-len(hashes) // most_rows))
        for further in combinations(range(first + 1, self.n_blocks), n_further):
            choice = (first, *further)
            keys = self._keys(hashes, choice)
            for number in range(n_passes):
                places = np.arange(len(hashes))
                if n_passes > 1:
                    places = np.flatnonzero(_spread(keys) % np.uint64(n_passes) == number)
                for i, j, n_passed_over in _agreeing(keys[places], places):
                    is_near = self._near_here_first(hashes[i] ^ hashes[j], choice)
                    yield i[is_near], j[is_near], n_passed_over

    def _n_bits(self, block: int) -> int:
        return self.edges[block + 1] - self.edges[block]

    def _values(self, hashes: np.ndarray, block: int) -> np.ndarray:
        """The bits of one block, uint64 [n]."""
        mask = np.uint64((1 << self._n_bits(block)) - 1)
        return (hashes >> np.uint64(self.edges[block])) & mask

    def _keys(self, hashes: np.ndarray, choice: tuple[int, ...]) -> np.ndarray:
        """The bits of the chosen blocks side by side."""
        keys = np.zeros(len(hashes), np.uint64)
        for block in choice:
            keys = (keys << np.uint64(self._n_bits(block))) | self._values(hashes, block)
        return keys

    def _near_here_first(self, differing: np.ndarray, choice: tuple[int, ...]) -> np.ndarray:
        """Which pairs, by their differing bits, are near and agree in no earlier choice."""
        is_near = np.bitwise_count(differing) <= self.distance
        # Agreeing in a further block before the last, they agree in an earlier choice as well.
        for block in set(range(choice[-1])) - set(choice):
            is_near &= self._values(differing, block) != 0
        return is_near


def _spread(keys: np.ndarray) -> np.ndarray:
    """Numbers by which keys fall into passes evenly, however alike they are."""
    return (keys * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)


def _agreeing(keys: np.ndarray, places: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """(places i, places j, pairs passed over) of all pairs of equal keys."""
    if len(keys) < 2:
        return
    keys, order = _in_order(keys)
    places = places[order]

    # Sorted, equal keys lie side by side: neighbours one step apart, then two, until none are.
    at = np.flatnonzero(keys[1:] == keys[:-1])
    for step in range(1, LARGEST):
        if not len(at):
            return
        yield places[at], places[at + step], 0
        at = at[at < len(keys) - step - 1]
        at = at[keys[at] == keys[at + step + 1]]

    # What is left would take the square of its number.
    if len(at):
        yield places[:0], places[:0], _n_further_apart(keys[at])


def _n_further_apart(keys: np.ndarray) -> int:
    """Pairs of equal keys that are LARGEST steps or more apart, by the keys of those that have
    one exactly so far.
    """
    _, sizes = np.unique(keys, return_counts=True)
    return int((sizes * (sizes + 1) // 2).sum())


def _in_order(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(keys, places) sorted."""
    n_place_bits = max(1, int(len(keys) - 1).bit_length())
    if int(keys.max()).bit_length() + n_place_bits > BITS:
        order = np.argsort(keys, kind="stable")
        return keys[order], order

    # numpy sorts plain numbers ten times as fast as it sorts their places.
    shift = np.uint64(n_place_bits)
    packed = np.sort((keys << shift) | np.arange(len(keys), dtype=np.uint64))
    order = (packed & np.uint64((1 << n_place_bits) - 1)).astype(np.int64)
    return packed >> shift, order
