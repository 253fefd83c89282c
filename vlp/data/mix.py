"""Which sample stands at which row of which step: a pure function of (seed, step), in constant
memory.

What is drawn are units (`vlp.data.units`) of G rows: a sample, one of its captions, or G samples of
one origin, which stand next to each other in their batch. Units of all steps are numbered: draw =
step · B/G + position. Without weights an epoch is one pseudo-random permutation of all N units of
all sources, cut into whole batches; what remains at its end is left out (other units each epoch).
With weights every source runs through permutations of its own, one after another, and the draws are
dealt to the sources so evenly that among any first n draws each source has its share, to within one
draw a source. A source whose share of a batch is a whole number of draws has exactly that many in
every batch: 8 of 256 for 1/32. With `replacement` a draw is any unit (of its source, with weights),
independent of all others.

Where shards are fetched whole (`Source.window`), a permutation keeps to a window of them at a time
(`Windows`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from vlp.data.permutation import Windows, permute, uniform
from vlp.data.sources import Source
from vlp.data.units import CaptionsOfSamples, Origins, Samples, Units
from vlp.seeds import derive
from vlp.types import Sample


class Mixture:
    """Several sources as one numbered collection: sample_id counts through the sources in order.

    Drawn are single samples, or with `together` = G > 1 groups of G of one origin, or with
    `every_caption` captions.
    """

    def __init__(
        self,
        sources: list[Source],
        weights: list[float | None],
        *,
        seed: int,
        shuffle: bool = True,
        together: int = 1,
        every_caption: bool = False,
        replacement: bool = False,
    ) -> None:
        if any(w is None for w in weights) and any(w is not None for w in weights):
            raise ValueError(
                f"weights are {weights}: give every source a weight, or none (every sample once an epoch)"
            )
        self.sources, self.seed, self.shuffle = sources, seed, shuffle
        self.together, self.every_caption, self.replacement = together, every_caption, replacement
        self.firsts = np.cumsum([0, *map(len, sources)])
        self.n_samples = int(self.firsts[-1])
        self.shares = (
            None if weights[0] is None else [Fraction(w).limit_denominator(10**6) for w in weights]
        )
        self.units = [_units(source, together, every_caption, shuffle) for source in sources]
        self._check()
        self.n_units = sum(map(len, self.units))
        width = max(source.window for source in sources)
        runs = (
            [_runs(source, units) for source, units in zip(sources, self.units)]
            if width
            else [None] * len(sources)
        )
        whole = np.concatenate(runs) if width and self.shares is None else None
        # Stream 0 is all sources together, stream s + 1 is source s: (units of each shard, shards
        # in a window).
        self._shards = [(whole, width)] + [
            (own if s.window else None, s.window) for s, own in zip(sources, runs)
        ]
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
        return self.n_units // (size // self.together)

    def identity(self) -> dict[str, Any]:
        """What the order depends on besides sources, weights, seed and shuffle; JSON-able. A
        resumed run compares it.
        """
        return {"together": self.together, "replacement": self.replacement}

    def batch(self, step: int, size: int) -> np.ndarray:
        """Sample ids [size] of one step's global batch, int64; size is a multiple of G."""
        return self._rows(step, size)[0]

    def captions(self, step: int, size: int) -> np.ndarray | None:
        """Which caption of its sample stands in each row [size] of a step, where captions are drawn
        by themselves.
        """
        return self._rows(step, size)[1] if self.every_caption else None

    def replacements(self, sample_id: int, step: int, row: int, batch: np.ndarray) -> Iterator[int]:
        """Stand-ins for a sample that cannot be read: others of its origin, then of its source, not
        in the batch while there are such.

        Rows of one batch try different stand-ins (those at positions row, row + B, … of a
        permutation), so that ranks need not know of each other's losses to avoid using one twice.
        """
        s = self.source_of(sample_id)
        n, first = self.sources[s].reserve or len(self.sources[s]), int(self.firsts[s])
        key, present = derive(self.seed, "replace", step, s), set(batch.tolist())
        others = [
            int(first + i)
            for i in self.units[s].others(sample_id - first)
            if first + i not in present
        ]
        own = first + permute(n, key, np.arange(row, min(n, row + 64 * len(batch)), len(batch)))
        yield from others[row % self.together :: self.together]
        yield from (int(i) for i in own if int(i) not in present)
        for wanted in (
            True,
            False,
        ):  # a source hardly larger than the batch: share, and at last repeat
            for i in range(n):
                candidate = first + int(permute(n, key, np.array([i]))[0])
                if (candidate not in present) == wanted and candidate != sample_id:
                    yield candidate

    def prepare(self, ids: np.ndarray) -> None:
        """Let the sources fetch what these samples need, without waiting."""
        for s, source in enumerate(self.sources):
            if source.window:
                source.prepare(
                    ids[(ids >= self.firsts[s]) & (ids < self.firsts[s + 1])] - self.firsts[s]
                )

    def ahead(self, size: int) -> int:
        """How many steps of `size` rows lie between a sample and the one a window later; 0 where
        nothing is fetched.
        """
        pairs = zip(self.sources, self.units)
        spans = [
            s.window * len(units) * self.together / len(s.runs) for s, units in pairs if s.window
        ]
        return max(1, int(max(spans) / size)) if spans else 0

    def _check(self) -> None:
        for s, (source, units) in enumerate(zip(self.sources, self.units)):
            if not len(units):
                raise ValueError(
                    f"data.together is {self.together}, but no origin in source {s} has as many samples; variations of one "
                    'origin follow one another and share the "origin" of their JSON. Set together lower, or leave it out'
                )
            if source.reserve and (
                self.replacement or (self.shares is None and len(self.sources) > 1)
            ):
                raise ValueError(
                    f"source {s} is a stream, read in its own order: give every source a weight, and leave data.replacement out"
                )
            if self.replacement and source.window:
                raise ValueError(
                    f"data.replacement draws from all of a source at any time, but source {s} fetches whole shards in turn; "
                    "copy it to a local disk (source shards), or leave replacement out"
                )

    def _rows(self, step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        n = size // self.together
        sample, caption = np.empty((2, n, self.together), np.int64)
        for s, (mine, number, rounds) in enumerate(self._drawn(step, n)):
            own, caption[mine] = self.units[s].rows(number, derive(self.seed, "unit", s), rounds)
            sample[mine] = self.firsts[s] + own
        return sample.ravel(), caption.ravel()

    def _drawn(self, step: int, n: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each source: which of the step's n draws are its own, the units drawn, and the round
        of each.
        """
        position = np.arange(n)
        if self.shares is not None:
            for s, (mine, count) in enumerate(self._deal(step, n)):
                yield mine, *self._order(s + 1, len(self.units[s]), count[mine])
            return
        epoch, step = divmod(step, self.n_units // n)
        number, rounds = self._order(0, self.n_units, epoch * self.n_units + step * n + position)
        first = 0
        for units in self.units:
            mine = (first <= number) & (number < first + len(units))
            yield mine, number[mine] - first, rounds[mine]
            first += len(units)

    def _order(self, stream: int, n: int, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Elements `count` of a stream's endless sequence of n units, and the round of each: its
        epoch, else itself.
        """
        if self.replacement:
            return uniform(n, derive(self.seed, "draw", stream), count), count
        number, epoch = np.empty_like(count), count // n
        for e in np.unique(epoch):
            now = epoch == e
            number[now] = self._permuted(n, int(e), stream, count[now] % n)
        return number, epoch

    def _permuted(self, n: int, epoch: int, stream: int, i: np.ndarray) -> np.ndarray:
        if not self.shuffle or self.sources[max(0, stream - 1)].reserve:  # one that cannot jump
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

    def _deal(self, step: int, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each source: which of the step's n draws are its own, and how many it had before each
        draw.
        """
        before = (step * n + np.arange(n)).astype(
            object
        )  # Python integers: products exceed 64 bits
        after, left = before + 1, sum(self.shares)
        result: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        # Each takes its part of what those before it left, so only where these took whole numbers
        # is its own exact.
        for s in sorted(
            range(len(self.shares)),
            key=lambda s: (self.shares[s] / sum(self.shares) * n).denominator > 1,
        ):
            part = self.shares[s] / left
            mine_before = before * part.numerator // part.denominator
            mine_after = after * part.numerator // part.denominator
            result[s] = (mine_after > mine_before).astype(bool), mine_before.astype(np.int64)
            before, after, left = before - mine_before, after - mine_after, left - self.shares[s]
        return [result[s] for s in range(len(self.shares))]


def _units(source: Source, together: int, every_caption: bool, shuffle: bool) -> Units:
    if together > 1:
        return Origins(source, together, shuffle)
    return CaptionsOfSamples(source) if every_caption else Samples(source)


def _runs(source: Source, units: Units) -> np.ndarray:
    """Units of each shard; a source without shards counts as runs of ten thousand."""
    if source.window:
        return np.diff(units.before(np.cumsum([0, *source.runs])))
    n = len(units)
    return np.array([10_000] * (n // 10_000) + ([n % 10_000] if n % 10_000 else []), np.int64)
