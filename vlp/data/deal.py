"""Draws dealt to sources by their weights, in closed form: whose a draw is, and how many its source
had before it, follow from the draw's number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_INT64_MAX = 2**63 - 1


class Deal:
    """Draws dealt so evenly that of any first n no source lacks a whole draw of its share; one that
    takes what others left has less than a draw too many for each of them.

    The sources take turns: each takes its part of what those before it left, ⌊x · share / left⌋ of
    the first x draws. So its count is a chain of floors, and draw x belongs to the source whose
    count grows with it. Sources whose share of a batch of `n_draws` is a whole number come first,
    because only what whole numbers leave is exact: they have as many in every batch. So the order
    is one of the batch's size, too.
    """

    def __init__(self, shares: Sequence[Fraction], n_draws: int) -> None:
        self.n_draws = n_draws
        total = sum(shares, Fraction())

        def fills_no_whole_draws(s: int) -> bool:
            return (shares[s] / total * n_draws).denominator > 1

        # (source, numerator and denominator of its part of what is left), in the order of turns.
        self.turns: list[tuple[int, int, int]] = []
        left = total
        for s in sorted(range(len(shares)), key=fills_no_whole_draws):
            part = shares[s] / left
            self.turns.append((s, part.numerator, part.denominator))
            left -= shares[s]

    def __call__(self, first: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the draws `first` … `first` + n − 1: the source [n], and how many draws that source
        had before [n], int64.
        """
        source = np.empty(n, np.int64)
        count = np.empty(n, np.int64)

        # The draws that are left to the sources still to come: how many there were before these,
        # and how many of these there are before each, and with it.
        base = first
        before = np.arange(n)
        after = before + 1

        for s, numerator, denominator in self.turns:
            # The number of a draw times a numerator exceeds 64 bits. The quotient at the first draw
            # is of Python's integers, once; from there on the numbers are small.
            taken, rest = divmod(base * numerator, denominator)
            if denominator * (n + 1) > _INT64_MAX:  # of fractions of many digits they are not
                before, after = before.astype(object), after.astype(object)

            taken_before = (rest + before * numerator) // denominator
            taken_after = (rest + after * numerator) // denominator
            is_its = (taken_after > taken_before).astype(bool)
            source[is_its] = s
            count[is_its] = (taken + taken_before[is_its]).astype(np.int64)

            base -= taken
            before = before - taken_before
            after = after - taken_after
        return source, count

    def in_lanes(self, draws: np.ndarray, n_lanes: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each draw [n], and which draw of its source it is [n], int64, where each
        lane (`vlp.data.lanes`) deals its own draws.

        draws: their numbers, those of a lane following one another. A batch of `n_draws`, which
        the lanes divide, holds draws that follow one another in the deal, and is as even; all draws
        up to one are a stretch of the deal for each lane, and off by as much for each.
        """
        sources = np.empty_like(draws)
        numbers = np.empty_like(draws)
        turns, lanes = np.divmod(draws, n_lanes)
        for lane in np.unique(lanes).tolist():
            here = np.flatnonzero(lanes == lane)

            # A lane begins where the one before it ends its first batch. So what the lanes deal for
            # one batch is always consecutive.
            begin = lane * self.n_draws // n_lanes
            of_lane, count = self(begin + int(turns[here[0]]), len(here))
            sources[here] = of_lane
            # Numbered as draws are, so that no two lanes have one.
            numbers[here] = (count - self._before(begin)[of_lane]) * n_lanes + lane
        return sources, numbers

    def _before(self, first: int) -> np.ndarray:
        """How many of the first draws up to number `first` each source had, int64 [sources]."""
        counts = np.empty(len(self.turns), np.int64)
        left = first
        for s, numerator, denominator in self.turns:
            counts[s] = left * numerator // denominator
            left -= int(counts[s])
        return counts
