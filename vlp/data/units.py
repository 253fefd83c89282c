"""What is drawn at once from a source: a sample, one caption of a sample, or G samples of one
origin.

Units are numbered 0 ≤ u < len(units), in the order of their samples. `rows` says what stands in a
unit's rows; `before` how many units begin before a sample, which tells the units of a shard.
"""

from __future__ import annotations

import random
from typing import Protocol

import numpy as np
import torch

from vlp.data.sources import Source
from vlp.seeds import derive

_BLOCK = 64  # samples whose captions are counted together
_AT_ONCE = 2**14  # units that are looked for at once
# Units that a source without shards lets stand together, beside one with windows.
_RUN = 10_000


class Units(Protocol):
    """The units of one source."""

    n_left_out: int  # samples of the source that stand in no unit

    def __len__(self) -> int: ...

    def rows(
        self, units: np.ndarray, key: int, rounds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Samples and captions [n, G] of `units` [n]; caption −1 is still to be chosen.

        Where a unit has more samples than rows, they are drawn by `key` and by its number in
        `rounds` [n].
        """
        ...

    def before(self, samples: np.ndarray) -> np.ndarray:
        """How many units begin before each of these samples."""
        ...

    def others(self, sample: int) -> np.ndarray:
        """The samples that may take this one's place in its unit before all others."""
        ...


class Samples:
    """Every sample is a unit."""

    n_left_out = 0

    def __init__(self, source: Source) -> None:
        self.n = len(source)

    def __len__(self) -> int:
        return self.n

    def rows(
        self, units: np.ndarray, key: int, rounds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        undecided = np.full((len(units), 1), -1)
        return units[:, None], undecided

    def before(self, samples: np.ndarray) -> np.ndarray:
        return samples

    def others(self, sample: int) -> np.ndarray:
        return np.empty(0, np.int64)


class CaptionsOfSamples(Samples):
    """Every caption of a sample is a unit.

    Kept are a byte a sample and the sums of blocks: of a billion samples a number of 8 bytes each
    would fill the shared memory of every rank.
    """

    def __init__(self, source: Source) -> None:
        counts = source.n_captions()
        sums = np.add.reduceat(counts, np.arange(0, len(counts), _BLOCK), dtype=np.int64)
        # Samples behind the last one have no captions: blocks are whole then.
        room = np.zeros(len(sums) * _BLOCK, counts.dtype)
        room[: len(counts)] = counts

        self.n = len(counts)
        self._counts = _narrow(room)
        self._ends = _shared(np.cumsum(sums))  # units up to and with a block

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(
        self, units: np.ndarray, key: int, rounds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        sample, caption = np.empty_like(units), np.empty_like(units)
        # A batch at once would hold a block for each of its rows.
        for start in range(0, len(units), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            sample[part], caption[part] = self._places(units[part])
        return sample[:, None], caption[:, None]

    def _places(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sample [n] of each unit, and which of its captions it is [n]."""
        block = np.searchsorted(self._ends.numpy(), units, side="right")
        in_block = units - self._before_block(block)

        # A caption's number is its place behind the captions of all samples before its own.
        ends = self._blocks()[block].cumsum(1, dtype=np.int64)
        number = (ends <= in_block[:, None]).sum(1)
        ends_before = np.take_along_axis(ends, np.maximum(number - 1, 0)[:, None], 1)[:, 0]
        return block * _BLOCK + number, in_block - np.where(number > 0, ends_before, 0)

    def before(self, samples: np.ndarray) -> np.ndarray:
        # The place behind the last sample may be that of a block which is not there.
        block, number = np.divmod(samples, _BLOCK)
        present = np.minimum(block, len(self._ends) - 1)
        is_before = np.arange(_BLOCK) < (number + (block - present) * _BLOCK)[:, None]
        counts = self._blocks()[present].astype(np.int64)
        return self._before_block(present) + (counts * is_before).sum(1)

    def _before_block(self, block: np.ndarray) -> np.ndarray:
        ends_before = self._ends.numpy()[block - 1]  # of the first one any number does
        return np.where(block > 0, ends_before, 0)

    def _blocks(self) -> np.ndarray:
        return self._counts.numpy().reshape(-1, _BLOCK)


class Origins(Samples):
    """`size` samples of one origin are a unit; origins with fewer are left out."""

    def __init__(self, source: Source, size: int, shuffle: bool) -> None:
        # Samples of one origin follow one another: an origin is a start and a count.
        origins = source.origins()
        begins = np.ones(len(origins), bool)
        np.not_equal(origins[1:], origins[:-1], out=begins[1:])
        starts = np.flatnonzero(begins)
        counts = np.diff(starts, append=len(source))
        large_enough = counts >= size

        self.size = size
        self.shuffle = shuffle
        self.n_left_out = int(counts[~large_enough].sum())
        self._starts = _shared(starts[large_enough])
        self._counts = _narrow(counts[large_enough])

    def __len__(self) -> int:
        return len(self._starts)

    def rows(
        self, units: np.ndarray, key: int, rounds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        # Without shuffling the first members of each origin are taken.
        starts = self._starts.numpy()[units]
        counts = self._counts.numpy()[units].astype(np.int64)
        samples = starts[:, None] + np.arange(self.size)

        # Of an origin with more members than rows, others stand together in each round.
        has_more = counts > self.size if self.shuffle else np.zeros(len(units), bool)
        for i in np.flatnonzero(has_more):
            seed = derive(key, "members", int(units[i]), int(rounds[i]))
            chance = random.Random(seed)
            members = chance.sample(range(counts[i]), self.size)
            samples[i] = starts[i] + np.array(members)

        return samples, np.full(samples.shape, -1)

    def before(self, samples: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts.numpy(), samples)

    def others(self, sample: int) -> np.ndarray:
        starts = self._starts.numpy()
        unit = int(np.searchsorted(starts, sample, side="right")) - 1
        start = int(starts[unit])
        count = int(self._counts[unit])
        return np.arange(start, start + count)


def units_of(source: Source, together: int, every_caption: bool, shuffle: bool) -> Units:
    """What is drawn from a source: groups of one origin, captions, or samples."""
    if together > 1:
        return Origins(source, together, shuffle)
    return CaptionsOfSamples(source) if every_caption else Samples(source)


def per_shard(source: Source, units: Units) -> np.ndarray:
    """Units of each shard; a source without shards counts as runs of ten thousand."""
    if source.window:
        # A shard's units are those that begin between its first sample and the next one's.
        shard_starts = np.cumsum([0, *source.runs])
        return np.diff(units.before(shard_starts))

    n_whole, rest = divmod(len(units), _RUN)
    return np.array([_RUN] * n_whole + ([rest] if rest else []), np.int64)


def _shared(values: np.ndarray) -> torch.Tensor:
    """In shared memory: loader processes receive a handle instead of a copy."""
    return torch.from_numpy(values.astype(np.int64)).share_memory_()


def _narrow(counts: np.ndarray) -> torch.Tensor:
    """Counts in shared memory, in a byte each where that holds them."""
    fits = counts.max(initial=0) <= np.iinfo(np.uint8).max
    return torch.from_numpy(counts.astype(np.uint8 if fits else np.int64)).share_memory_()
