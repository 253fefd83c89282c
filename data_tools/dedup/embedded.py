"""The stored picture embeddings of all samples that are compared, mapped from their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vlp.data.embedded import Embeddings, mapped
from vlp.data.index import located

_MOST_MAPPED = 256  # files of a process; each stays open


class Rows:
    """The rows of all shards, in files of their own, numbered through."""

    def __init__(self, files: list[Path], sizes: list[int], width: int) -> None:
        """`sizes`: the rows of each file."""
        self.files = files
        self.width = width
        self._ends = np.cumsum(sizes)
        self._mapped: dict[int, np.ndarray] = {}

    def of_shard(self, shard: int) -> np.ndarray:
        """All rows of a shard, float16 [n, D]."""
        if shard not in self._mapped:
            if len(self._mapped) == _MOST_MAPPED:
                self._mapped.clear()
            self._mapped[shard] = mapped(self.files[shard], "image")
        return self._mapped[shard]

    def gathered(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of some samples, whose numbers rise, float16 [n, D]."""
        rows = np.empty((len(numbers), self.width), np.float16)
        shards = np.searchsorted(self._ends, numbers, "right")
        starts = np.flatnonzero(np.diff(shards, prepend=-1)).tolist()
        for start, stop in zip(starts, [*starts[1:], len(numbers)]):
            shard = int(shards[start])
            of_shard = self.of_shard(shard)
            first = int(self._ends[shard]) - len(of_shard)
            rows[start:stop] = of_shard[numbers[start:stop] - first]
        return rows

    def kept(self, numbers: np.ndarray) -> KeptRows:
        """The rows of some samples, whose numbers rise, in memory."""
        return KeptRows(numbers, self.gathered(numbers))

    def __getstate__(self) -> dict[str, Any]:
        # Each process maps its own.
        return self.__dict__ | {"_mapped": {}}


class KeptRows:
    """The rows of some samples, read once."""

    def __init__(self, numbers: np.ndarray, rows: np.ndarray) -> None:
        self._numbers = numbers
        self._rows = rows

    def gathered(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of some of these samples, float16 [n, D]."""
        return self._rows[np.searchsorted(self._numbers, numbers)]


def opened(groups: list[list[Path]], folders: list[str]) -> Rows:
    """The rows of several groups of shards, each with its folder of embeddings. Raises ValueError
    for embeddings that are not of these shards, or of several models.
    """
    indexed = [located(paths) for paths in groups]
    of_groups = [
        Embeddings(folder, [*map(str, paths)], shards, with_text=False)
        for folder, paths, shards in zip(folders, groups, indexed)
    ]

    # Cosines between two models mean nothing.
    models = {(one.teacher.model, one.teacher.width) for one in of_groups}
    if len(models) > 1:
        names = ", ".join(str(model) for model in sorted(models))
        raise ValueError(f"--embeddings are of several models ({names}); embed all with one")

    files: list[Path] = []
    sizes: list[int] = []
    for of_group, shards in zip(of_groups, indexed):
        files += [of_group.file(i) for i in range(len(shards))]
        sizes += [shard.count for shard in shards]
    return Rows(files, sizes, of_groups[0].teacher.width)
