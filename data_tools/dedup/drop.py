"""What the decision means for a shard: which samples go, and whose captions the others take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlp import log
from vlp.data.index import index, located
from vlp.data.index_file import load
from vlp.data.members import open_sample
from vlp.data.rows import Shard, read_extents
from vlp.data.stored import source
from vlp.data_tools._belonging import merge, settle
from vlp.data_tools._run.shards import Changed
from vlp.data_tools.dedup import arrays
from vlp.data_tools.dedup.survey import with_sample

if TYPE_CHECKING:
    from vlp.data.members import Content


class Place(NamedTuple):
    """Where a sample lies."""

    path: Path
    extents: list[tuple[int, int]]  # offset and bytes of its members
    digest: int  # of them


@dataclass
class Decision:
    """The dropped samples in two files: in their order, and in that of what they are copies of."""

    folder: Path
    sources: list[Path]
    sizes: list[int]  # samples of each source
    n_fixed: int  # samples of --against, which are numbered before those of the sources

    def exists(self) -> bool:
        """Whether both files are there."""
        return self._in_order.exists() and self._by_kept.exists()

    @property
    def _in_order(self) -> Path:
        return self.folder / "_dropped.npy"

    @property
    def _by_kept(self) -> Path:
        return self.folder / "_dropped_by_kept.npy"

    def save(self, dropped: np.ndarray) -> None:
        """Write DROPPED samples, which rise."""
        # Copies of --against are dropped, and their captions with them.
        copies = dropped[dropped["copy_of"] >= self.n_fixed]
        arrays.save(self._by_kept, copies[np.argsort(copies["copy_of"], kind="stable")])
        arrays.save(self._in_order, dropped)

    def first(self, shard: int) -> int:
        """The number of the first sample of a source."""
        return self.n_fixed + sum(self.sizes[:shard])

    def copy_of(self, shard: int) -> np.ndarray:
        """For each sample of a source the number of the one that it is a copy of, -1 where it
        stays.
        """
        dropped = self._part(self._in_order, "sample", shard)
        copy_of = np.full(self.sizes[shard], -1)
        copy_of[dropped["sample"] - self.first(shard)] = dropped["copy_of"]
        return copy_of

    def copies(self, shard: int) -> dict[int, list[Place]]:
        """Number of each sample of a source that has copies -> where these lie, in their order."""
        rows = self._part(self._by_kept, "copy_of", shard)
        sources, places_in_source = self._sources_of(rows["sample"])
        places: dict[int, Place] = {}
        # A source's rows are read once, for all of its samples that are wanted.
        for number in np.unique(sources).tolist():
            here = np.flatnonzero(sources == number)
            with_rows = self._with_rows(number)
            for row in here.tolist():
                i = int(places_in_source[row])
                extents, digest = with_rows.places(i), with_rows.digest(i)
                places[row] = Place(self.sources[number], extents, digest)
            _forget_rows(with_rows)

        copies: dict[int, list[Place]] = {}
        for row, kept in enumerate(rows["copy_of"].tolist()):
            copies.setdefault(kept, []).append(places[row])
        return copies

    def check_unchanged(self) -> None:
        """Raise ValueError where a source holds another number of samples than were compared."""
        for path, shard, size in zip(self.sources, self._shards, self.sizes):
            if shard.count != size:
                raise changed(str(path), shard.count, size)

    def _sources_of(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, place in it) of samples by their numbers."""
        ends = np.cumsum(self.sizes)
        sources = np.searchsorted(ends, numbers - self.n_fixed, "right")
        return sources, numbers - self.n_fixed - (ends - self.sizes)[sources]

    def _part(self, path: Path, field: str, shard: int) -> np.ndarray:
        """The rows of a file whose `field` names samples of a source."""
        rows = arrays.load(path)
        first = self.first(shard)
        low, high = np.searchsorted(rows[field], [first, first + self.sizes[shard]])
        return np.array(rows[low:high])

    def _with_rows(self, source: int) -> Shard:
        """What the index knows of a source, with its rows."""
        shard = self._shards[source]
        try:
            load(shard)
        except (OSError, ValueError):
            # A damaged part of the index: the shard is scanned again.
            [shard] = index([self.sources[source]])
        return shard

    @cached_property
    def _shards(self) -> list[Shard]:
        return located(self.sources)

    def __getstate__(self) -> dict[str, Any]:
        # Each process reads its own.
        return {"folder": self.folder, "sources": self.sources, "sizes": self.sizes} | {
            "n_fixed": self.n_fixed
        }


def _forget_rows(shard: Shard) -> None:
    # Of a billion samples the rows fit into no memory.
    if shard.stored is not None:
        shard.rows = shard.extents = b""


@dataclass(frozen=True)
class DropCopies:
    """The change of a shard's samples (see `vlp.data_tools._run.shards.Change`)."""

    decision: Decision
    with_captions: bool  # copies leave their captions to the sample that stays
    seen: list[int | None]  # a shard: the check sum of what was compared; None: not known

    def __call__(
        self, samples: Iterable[Content], shard: int, counts: Counter[str]
    ) -> Iterator[Changed]:
        copy_of = self.decision.copy_of(shard)
        copies = self.decision.copies(shard) if self.with_captions else {}
        same_samples = self._same(samples, shard)
        # In this order: the end of the samples is then met, and with it their comparison.
        decided_samples = zip(same_samples, copy_of.tolist())
        for number, (sample, other) in enumerate(decided_samples, self.decision.first(shard)):
            # A sample of --against is no sample of the output: nothing is merged into it.
            if 0 <= other < self.decision.n_fixed:
                counts["dropped: held by --against"] += 1
            elif other >= 0:
                counts["dropped: copies of an earlier sample"] += 1
            else:
                for place in copies.get(number, ()):
                    _merge(sample, place, counts)
                yield Changed(sample, list(sample.captions), sample.meta)

    def _same(self, samples: Iterable[Content], shard: int) -> Iterator[Content]:
        """The samples of a shard; ValueError at their end unless they are those that were compared.

        The decision names samples by number: of a shard that was replaced meanwhile, others would
        go. What is raised here leaves no shard behind.
        """
        n_compared = self.decision.sizes[shard]
        n_samples = 0
        seen = 0
        for sample in samples:
            n_samples += 1
            seen = with_sample(seen, sample)
            # The others are counted only.
            if n_samples <= n_compared:
                yield sample

        if n_samples != n_compared or self.seen[shard] not in (None, seen):
            raise changed(f"shard {shard} of the source", n_samples, n_compared)


def changed(shard: str, n_samples: int, n_compared: int) -> ValueError:
    """The error of a shard that is not the one whose pictures were compared."""
    return ValueError(
        f"{shard} holds other samples ({n_samples}) than those ({n_compared}) whose pictures were "
        "compared: it changed meanwhile; begin anew with another folder --to"
    )


def _merge(sample: Content, place: Place, counts: Counter[str]) -> None:
    # The copy may lie in a shard that is damaged since it was indexed: its captions are lost then,
    # the sample that stays is not.
    try:
        with open(source(place.path), "rb") as file:
            other = open_sample(read_extents(file, place.extents), place.digest)
    except ValueError as error:
        log.warn(f"{place.path}: {error}")
        counts["not merged: copies that changed after they were indexed"] += 1
        return

    # Its lists must count its own captions before they are joined.
    settle(other, counts)
    if merge(sample, other, counts):
        counts["merged: copies into an earlier sample"] += 1
    else:
        counts["not merged: more captions than a sample may hold"] += 1
