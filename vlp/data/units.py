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
    """Every caption of a sample is a unit."""

    def __init__(self, source: Source) -> None:
        # Units up to and with a sample.
        self._ends = _shared(np.cumsum(source.n_captions()))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(
        self, units: np.ndarray, key: int, rounds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        # A caption's number is its place behind the captions of all samples before its own.
        ends = self._ends.numpy()
        sample = np.searchsorted(ends, units, side="right")
        caption = units - self.before(sample)
        return sample[:, None], caption[:, None]

    def before(self, samples: np.ndarray) -> np.ndarray:
        # samples - 1 is the last sample where there is none before: any number does for it.
        ends_before = self._ends.numpy()[samples - 1]
        return np.where(samples > 0, ends_before, 0)


class Origins(Samples):
    """`size` samples of one origin are a unit; origins with fewer are left out."""

    def __init__(self, source: Source, size: int, shuffle: bool) -> None:
        # Samples of one origin follow one another: an origin is a start and a count.
        starts = np.flatnonzero(np.diff(source.origins(), prepend=-1))
        counts = np.diff(starts, append=len(source))
        large_enough = counts >= size

        self.size = size
        self.shuffle = shuffle
        self.n_left_out = int(counts[~large_enough].sum())
        self._starts = _shared(starts[large_enough])
        self._counts = _shared(counts[large_enough])

    def __len__(self) -> int:
        return len(self._starts)

    def rows(
        self, units: np.ndarray, key: int, rounds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        # Without shuffling the first members of each origin are taken.
        starts = self._starts.numpy()[units]
        counts = self._counts.numpy()[units]
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
