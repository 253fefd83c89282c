"""The files of `vlp data dedup`: fingerprints of every shard, the decision about all of them, and
what follows for a shard.
"""

from __future__ import annotations

import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlp import log
from vlp.data.embedded import Embeddings
from vlp.data.index import index
from vlp.data.members import open_sample
from vlp.data.picture import BadImage, rgb
from vlp.data.rows import read_extents
from vlp.data.stored import source
from vlp.data_tools._belonging import merge, settle
from vlp.data_tools._run.shards import Changed, samples
from vlp.data_tools._run.work import Result
from vlp.data_tools.dedup.near import FINGERPRINT, Limits, decide, fingerprint
from vlp.files import write_atomically

if TYPE_CHECKING:
    from vlp.data.members import Content


def survey(job: tuple[int, Path], *, folder: Path) -> Result:
    """The fingerprints of a shard's pictures, in a file beside the mark."""
    number, path = job
    counts: Counter[str] = Counter()
    prints = []
    seen = 0
    for sample in samples(path, counts):
        seen = _seen(seen, sample)
        # Small: the hash looks at 32 × 32 pixels, and a JPEG is then decoded in less time.
        try:
            prints.append((*fingerprint(rgb(sample.image, side=64)), True))
        except BadImage:
            counts["unreadable: pictures"] += 1
            prints.append((0, np.zeros(48, np.uint8), False))

    _save(_prints(folder, number), np.array(prints, FINGERPRINT))
    return {"counts": counts, "samples": len(prints), "seen": seen}


def _seen(seen: int, sample: Content) -> int:
    """A check sum over the samples of a shard, with one more: their keys and pictures, in order."""
    return zlib.crc32(sample.image, zlib.crc32(sample.key.encode(), seen))


def _prints(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}_fingerprints.npy"


def decided(
    folder: Path,
    groups: list[list[Path]],
    surveyed: list[Result],
    embeddings: list[str],
    limits: Limits,
) -> list[np.ndarray]:
    """A shard of all groups: for each sample the number of the one that it is a copy of, −1 where
    it stays.

    The samples of all groups but the last stay whatever they are. Decided once and kept in
    `folder`, with copies.jsonl for people. Raises ValueError.
    """
    sizes = [result["samples"] for result in surveyed]
    ends = np.cumsum(sizes)
    decision = folder / "_copies.npy"
    if not decision.exists():
        paths = list(chain.from_iterable(groups))
        prints = np.concatenate([np.load(_prints(folder, number)) for number in range(len(paths))])
        pieces = embedded(groups, embeddings) if embeddings else []
        n_fixed = sum(sizes[: -len(groups[-1])])
        copy_of, cosines = decide(prints, pieces, n_fixed, limits)

        # The decision itself last: a killed call that left only the page for people decides again.
        lines = _lines(copy_of, cosines, lambda sample: _place(sample, paths, ends))
        write_atomically(folder / "copies.jsonl", "".join(lines).encode())
        _save(decision, copy_of)
    return np.split(np.load(decision), ends[:-1])


def _lines(
    copy_of: np.ndarray, cosines: np.ndarray, place: Callable[[int], dict[str, Any]]
) -> Iterator[str]:
    """A line of JSON for each dropped sample: where it lies, what it is a copy of, what told."""
    for sample in np.flatnonzero(copy_of >= 0).tolist():
        by = "hash" if np.isnan(cosines[sample]) else f"cosine {cosines[sample]:.3f}"
        record = {**place(sample), "copy_of": place(int(copy_of[sample])), "by": by}
        yield json.dumps(record, ensure_ascii=False) + "\n"


def _place(sample: int, paths: list[Path], ends: np.ndarray) -> dict[str, Any]:
    shard = int(np.searchsorted(ends, sample, "right"))
    first = ends[shard - 1] if shard else 0
    return {"shard": str(paths[shard]), "sample": int(sample - first)}


def _save(path: Path, array: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, array)
    write_atomically(path, file.getvalue())


def embedded(groups: list[list[Path]], folders: list[str]) -> list[np.ndarray]:
    """The picture embeddings [n, D] of each shard of each group, from the group's folder; raises
    ValueError.
    """
    opened = [
        Embeddings(folder, [*map(str, paths)], index(paths), with_text=False)
        for folder, paths in zip(folders, groups)
    ]

    # Cosines between two models mean nothing.
    models = {(one.teacher.model, one.teacher.width) for one in opened}
    if len(models) > 1:
        names = ", ".join(str(model) for model in sorted(models))
        raise ValueError(f"--embeddings are of several models ({names}); embed all with one")

    rows: list[np.ndarray] = []
    for one, paths in zip(opened, groups):
        rows += [one.images(shard) for shard in range(len(paths))]
    return rows


@dataclass(frozen=True)
class DropCopies:
    """The change of a shard's samples (see `vlp.data_tools._run.shards.Change`)."""

    copy_of: list[np.ndarray]  # a shard: for each sample what it is a copy of, −1 where it stays
    n_fixed: int  # samples of --against
    # number of a sample that stays -> its copies; None: their captions go, too
    merging: dict[int, list[Place]] | None
    seen: list[int | None]  # a shard: `_seen` of the samples that were compared; None: not known

    def __call__(
        self, samples: Iterable[Content], shard: int, counts: Counter[str]
    ) -> Iterator[Changed]:
        # Samples are numbered through all shards, those of --against first.
        first = self.n_fixed + sum(map(len, self.copy_of[:shard]))
        # In this order: the end of the samples is then met, and with it their comparison.
        decided_samples = zip(self._same(samples, shard), self.copy_of[shard])
        for number, (sample, other) in enumerate(decided_samples, first):
            # A sample of --against is no sample of the output: nothing is merged into it.
            if 0 <= other < self.n_fixed:
                counts["dropped: held by --against"] += 1
            elif other >= 0:
                counts["dropped: copies of an earlier sample"] += 1
            else:
                for place in (self.merging or {}).get(number, ()):
                    _merge(sample, place, counts)
                yield Changed(sample, list(sample.captions), sample.meta)

    def _same(self, samples: Iterable[Content], shard: int) -> Iterator[Content]:
        """The samples of a shard; ValueError at their end unless they are those that were compared.

        The decision names samples by number: of a shard that was replaced meanwhile, others would
        go. What is raised here leaves no shard behind.
        """
        n_samples = 0
        seen = 0
        for sample in samples:
            n_samples += 1
            seen = _seen(seen, sample)
            # The others are counted only.
            if n_samples <= len(self.copy_of[shard]):
                yield sample

        n_compared = len(self.copy_of[shard])
        if n_samples != n_compared or self.seen[shard] not in (None, seen):
            raise _changed(f"shard {shard} of the source", n_samples, n_compared)


def _changed(shard: str, n_samples: int, n_compared: int) -> ValueError:
    return ValueError(
        f"{shard} holds other samples ({n_samples}) than those ({n_compared}) whose pictures were "
        "compared: it changed meanwhile; begin anew with another folder --to"
    )


class Place(NamedTuple):
    """Where a sample lies."""

    path: str
    extents: list[tuple[int, int]]  # offset and bytes of its members
    digest: int  # of them


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


def merging(copy_of: list[np.ndarray], n_fixed: int, sources: list[Path]) -> dict[int, list[Place]]:
    """Number of each sample that has copies -> where these lie, in their order.

    ValueError where a shard holds another number of samples than were compared.
    """
    result: dict[int, list[Place]] = {}
    for path, shard, others in zip(sources, index(sources), copy_of):
        if shard.count != len(others):
            raise _changed(str(path), shard.count, len(others))
        # Copies of --against are dropped, and their captions with them.
        for i in np.flatnonzero(others >= n_fixed).tolist():
            place = Place(str(path), shard.places(i), shard.digest(i))
            result.setdefault(int(others[i]), []).append(place)
    return result
