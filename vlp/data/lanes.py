"""Lanes: parts of every batch that each keep to a part of the shards, so that a node which takes
some lanes fetches their shards only.

With V lanes draw x of a sequence belongs to lane x mod V, and is its draw number ⌊x / V⌋. The rows
of a batch are laid out by lane, so a rank's consecutive rows are of few lanes; with V lanes on W
nodes, W dividing V, of V / W. The order of samples depends on V, and on no number of ranks or
nodes. One lane is the order without lanes.
"""

from __future__ import annotations

import numpy as np


def draws_at(positions: np.ndarray, first: int, n: int, n_lanes: int) -> np.ndarray:
    """Which of the n draws from number `first` on stand at these positions of their batch, int64
    like `positions`.

    Those of lane 0 stand first, in their order, then those of lane 1. As many of each lane where
    n_lanes divides n, else up to one more of some.
    """
    lanes = np.arange(n_lanes)
    firsts = first + (lanes - first) % n_lanes
    sizes = np.maximum(0, -((firsts - first - n) // n_lanes))
    ends = np.cumsum(sizes)

    lane = np.searchsorted(ends, positions, side="right")
    place_in_lane = positions - (ends - sizes)[lane]
    return firsts[lane] + place_in_lane * n_lanes


class Stretches:
    """An order of `n` elements cut into a stretch for each lane, equally long to within one.

    Element ⌊x / V⌋ of the stretch of lane x mod V is the x-th to be drawn. Every other stretch is
    read from its end: neighbours then meet at their common border at one time, where both read one
    shard.
    """

    def __init__(self, n: int, n_lanes: int) -> None:
        self.n_lanes = n_lanes
        lanes = np.arange(n_lanes)
        sizes = n // n_lanes + (lanes < n % n_lanes)
        self.ends = np.cumsum(sizes)
        self.starts = self.ends - sizes

    def positions(self, numbers: np.ndarray) -> np.ndarray:
        """Where in the order the draws of these numbers stand, int64 like `numbers`."""
        turn, lane = np.divmod(numbers, self.n_lanes)
        forwards = self.starts[lane] + turn
        backwards = self.ends[lane] - 1 - turn
        return np.where(lane % 2 == 0, forwards, backwards)

    def window_ends(self, shard_ends: np.ndarray, width: int) -> np.ndarray:
        """Where the windows end: within each stretch, every `width` shards in the order of its
        reading. `shard_ends`: where each shard ends, never falling.
        """
        # Two lanes may share a shard, of which each has a piece.
        borders = np.setdiff1d(self.ends[:-1], shard_ends)
        piece_ends = np.sort(np.concatenate([shard_ends, borders]))
        piece_starts = np.concatenate([[0], piece_ends[:-1]])

        lane = np.searchsorted(self.ends, piece_starts, side="right")
        lane = np.minimum(lane, self.n_lanes - 1)
        n_before = np.searchsorted(lane, lane, side="left")
        n_until = np.searchsorted(lane, lane, side="right")

        place = np.arange(len(lane))
        turn = np.where(lane % 2 == 0, place - n_before, n_until - 1 - place)
        window = turn // width
        is_last = (np.diff(lane) != 0) | (np.diff(window) != 0)
        return piece_ends[np.append(is_last, True)]
