"""What is searched: the stored embeddings of all shards, and what identifies their samples."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlp.data.embedded import Embeddings
from vlp.data.index import index
from vlp.data_tools._english.words import bare
from vlp.data_tools._run.arrays import load, save

if TYPE_CHECKING:
    from vlp.data.members import Content
    from vlp.data.rows import Shard
    from vlp.data_tools._run.work import Result

NOTHING = 0  # in place of a hash: the sample has no origin, or no caption
BLOCK = 8192  # rows that are compared at once
_MOST_RECENT = 256  # samples that are kept in memory


@dataclass
class Store:
    """All samples of some shards with their embeddings; numbered through, shard after shard."""

    paths: list[Path]
    embeddings: str  # the folder

    @cached_property
    def shards(self) -> list[Shard]:
        return index(self.paths)

    @cached_property
    def opened(self) -> Embeddings:
        """The files of embeddings; raises ValueError where they are not of these samples."""
        return Embeddings(self.embeddings, [*map(str, self.paths)], self.shards, with_text=True)

    @cached_property
    def ends(self) -> np.ndarray:
        """The number behind the last sample of each shard."""
        return np.cumsum([shard.count for shard in self.shards])

    @property
    def n(self) -> int:
        return int(self.ends[-1])

    @property
    def width(self) -> int:
        return self.opened.teacher.width

    def first(self, shard: int) -> int:
        """The number of the first sample of a shard."""
        return int(self.ends[shard]) - self.shards[shard].count

    def rows(self, shard: int, side: str) -> np.ndarray:
        """The rows of one side of a shard, float16 [n, D], mapped from their file."""
        if (shard, side) not in self._mapped:
            self._mapped[shard, side] = self.opened.mapped(shard, side)
        return self._mapped[shard, side]

    def blocks(self, side: str) -> Iterator[tuple[int, np.ndarray]]:
        """(number of its first sample, rows) of blocks of all samples, in order."""
        for shard in range(len(self.paths)):
            rows = self.rows(shard, side)
            for i in range(0, len(rows), BLOCK):
                yield self.first(shard) + i, rows[i : i + BLOCK]

    def gathered(self, numbers: np.ndarray, side: str) -> np.ndarray:
        """The rows of some samples, float32 of the shape of their numbers and D."""
        flat = numbers.ravel()
        gathered = np.zeros((len(flat), self.width), np.float32)
        shard_of = np.searchsorted(self.ends, flat, "right")
        for shard in np.unique(shard_of).tolist():
            here = shard_of == shard
            gathered[here] = self.rows(shard, side)[flat[here] - self.first(shard)]
        return gathered.reshape(*numbers.shape, self.width)

    def shard_of(self, number: int) -> int:
        """The shard that holds a sample."""
        return int(np.searchsorted(self.ends, number, "right"))

    def sample(self, number: int) -> Content:
        """A sample, read from its shard; raises ValueError where that changed."""
        # Neighbours come again and again.
        if number not in self._recent:
            if len(self._recent) == _MOST_RECENT:
                self._recent.clear()
            shard = self.shard_of(number)
            with open(self.paths[shard], "rb") as file:
                self._recent[number] = self.shards[shard].sample(file, number - self.first(shard))
        return self._recent[number]

    @cached_property
    def _recent(self) -> dict[int, Content]:
        return {}

    @cached_property
    def _mapped(self) -> dict[tuple[int, str], np.ndarray]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        # Each process maps its own.
        return {"paths": self.paths, "embeddings": self.embeddings}


@dataclass(frozen=True)
class Identities:
    """Hashes of what tells samples apart, of all samples in order."""

    keys: np.ndarray  # [n]
    origins: np.ndarray  # [n]; NOTHING: none
    firsts: np.ndarray  # [n] of the first caption, normalised; NOTHING: none
    captions: np.ndarray  # of all captions, sample after sample
    starts: np.ndarray  # [n + 1] where each sample's captions begin in `captions`

    def captions_of(self, number: int) -> np.ndarray:
        """The hashes of a sample's captions."""
        return self.captions[self.starts[number] : self.starts[number + 1]]


def survey(job: tuple[int, Path], *, folder: Path) -> Result:
    """The hashes of a shard's samples, in a file beside the mark."""
    from vlp.data_tools._run.shards import samples

    number, path = job
    counts: Counter[str] = Counter()
    rows: list[tuple[int, int, int, int]] = []
    captions: list[int] = []
    for sample in samples(path, counts):
        of_sample = [digest(bare(caption)) for caption in sample.captions]
        origin = sample.meta.get("origin")
        rows.append((
            digest(sample.key),
            NOTHING if origin is None else digest(str(origin)),
            of_sample[0] if of_sample else NOTHING,
            len(of_sample),
        ))  # fmt: skip
        captions += of_sample

    columns = np.array(rows, np.uint64).reshape(-1, 4)
    save(folder / f"{number:05d}_survey.npz", rows=columns, captions=np.array(captions, np.uint64))
    return {"counts": counts}


def identities(folder: Path, n_shards: int) -> Identities:
    """What `survey` wrote of all shards."""
    files = [load(folder / f"{number:05d}_survey.npz") for number in range(n_shards)]
    rows = np.concatenate([file["rows"] for file in files])
    captions = np.concatenate([file["captions"] for file in files])
    starts = np.concatenate([[0], np.cumsum(rows[:, 3])]).astype(np.int64)
    return Identities(rows[:, 0], rows[:, 1], rows[:, 2], captions, starts)


def digest(text: str) -> int:
    """64 bits of a text, never NOTHING."""
    hashed = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(hashed, "little") or 1
