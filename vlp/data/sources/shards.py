"""Local shards: `{name: shards, path: data/train}` or `path: "a/{00000..00041}.tar::b"`.

A path is a folder (all its tars in order of name), a tar, or a pattern with braces; `::` joins several. Each sample is
one positioned read of the span that the folder's index names, so any order costs the same and workers share nothing.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from vlp.config import Captions
from vlp.data.embedded import Embeddings
from vlp.data.index import CLASS, CONTINUES, LABELS, PICTURED, ROW, Shard, index
from vlp.data.members import open_sample
from vlp.data.paths import expand
from vlp.data.sources import Source, captions_of
from vlp.types import Sample

_ROW = np.dtype([("offset", "<u8"), ("length", "<u4"), ("captions", "u1"), ("negatives", "u1"), ("counterfactuals", "u1"),
                 ("flags", "u1")])  # fmt: skip
assert _ROW.itemsize == ROW.size


@dataclass(frozen=True)
class Options:
    """Where the shards are."""

    path: str  # folder, tar, braces, several joined by ::
    embeddings: str | None = None  # folder that `vlp data embed` made from these shards: a teacher's embeddings


def open(options: Options, captions: Captions) -> Shards:
    """Index the shards (from the folder's index where it is current); raises ValueError or OSError."""
    paths = expand(options.path)
    return Shards(paths, index(paths), captions, options.embeddings)


class Shards(Source):
    """Random access to the samples of some tars."""

    def __init__(
        self, paths: list[Path] | list[str], shards: list[Shard], captions: Captions, embeddings: str | None = None
    ) -> None:
        rows = np.frombuffer(b"".join(shard.rows for shard in shards), _ROW)
        has_text = rows["captions"] > 0
        if captions.class_templates:
            has_text |= rows["flags"] & CLASS > 0
        counts = np.array([shard.count for shard in shards])
        self.paths, self.captions = [str(path) for path in paths], captions
        self._problems = [f"{path}: {text}" for path, shard in zip(paths, shards) for text in shard.problems]
        self.n_left_out = sum(shard.n_left_out for shard in shards) + int((~has_text).sum())
        shard_of = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        place = np.arange(len(rows)) - (np.cumsum(counts) - counts)[shard_of]  # in its shard
        if not has_text.all():
            self._refuse_or_note(has_text, np.cumsum(counts))
            origin = np.cumsum(rows["flags"] & CONTINUES == 0)[has_text]
            rows, shard_of, place = rows[has_text], shard_of[has_text], place[has_text]
            first = np.diff(origin, prepend=0) > 0  # also of those whose origin's first sample was left out
            rows["flags"] = np.where(first, rows["flags"] & (255 - CONTINUES), rows["flags"])
        if not len(rows):
            problems = "; ".join(self._problems[:3]) or "no members that form samples"
            raise ValueError(f"the shards {self.paths[0]}… hold no usable sample: {problems}")
        self.n_negatives = int(rows["negatives"].max())
        self.n_counterfactuals = int(rows["counterfactuals"].max())
        lonely = int((rows["negatives"][rows["flags"] & PICTURED == 0] > 0).sum())
        self.pictured = bool((rows["flags"] & PICTURED > 0).any())
        if self.pictured and lonely:
            self._problems.append(f"{self.paths[0]}…: the first negative of {lonely} samples is masked: no image belongs to it")
        self.labels = frozenset(name for name, flag in LABELS.items() if (rows["flags"] & flag > 0).all())
        self._digest = hashlib.sha256(rows.tobytes() + shard_of.tobytes()).hexdigest()
        # Tensors in shared memory: loader processes receive a handle instead of a copy.
        self._rows = torch.from_numpy(rows.copy().view(np.uint8)).share_memory_()
        self._shard_of = torch.from_numpy(shard_of).share_memory_()
        if embeddings is not None:
            own = rows["captions"]
            always_first = bool((own > 0).all() and (captions.choose == "first" or (own == 1).all()))
            self.embeddings = Embeddings(embeddings, self.paths, shards, with_text=always_first)
            self._place = torch.from_numpy(place.astype(np.int32)).share_memory_()
            if not always_first:
                self._problems.append(
                    f"{embeddings}: teacher_text is left out, because it is of first captions and training also takes others; "
                    "set captions.choose=first and no class_templates to have it"
                )

    def _refuse_or_note(self, has_text: np.ndarray, ends: np.ndarray) -> None:
        bad = np.flatnonzero(~has_text)
        per_shard = np.bincount(np.searchsorted(ends, bad, side="right"), minlength=len(self.paths))
        lines = [f"{self.paths[s]}: {per_shard[s]} samples without text" for s in np.flatnonzero(per_shard)]
        if self.captions.missing == "error":
            raise ValueError(
                f"{len(bad)} of {len(has_text)} samples have no caption ({'; '.join(lines[:3])}); set "
                "captions.class_templates to make captions of class names, or captions.missing=drop to leave them out"
            )
        self._problems += lines

    def __len__(self) -> int:
        return len(self._shard_of)

    def __getitem__(self, i: int) -> Sample:
        return self.sample(i, self.paths[self.shard_of(i)])

    def shard_of(self, i: int) -> int:
        """The position in `paths` of the shard that holds sample i."""
        return int(self._shard_of[i])

    def sample(self, i: int, path: str) -> Sample:
        """Sample i, read from `path`, a copy of its shard."""
        offset, length = ROW.unpack_from(self._rows.numpy(), i * ROW.size)[:2]
        content = open_sample(_read(path, offset, length))
        captions = captions_of(content.captions, content.meta, self.captions)
        if not captions:
            raise ValueError(f"{path}: {content.key!r} has no caption any more; the shard changed after it was indexed")
        row = self.embeddings and self.embeddings.row(self.shard_of(i), int(self._place[i]))
        if row is not None and not row[0].any():
            raise ValueError(f"{path}: {content.key!r} has no image embedding: its picture did not open for `vlp data embed`")
        return Sample(i, content.key, content.image, content.image_type, captions, content.meta, content.negative_image, row)

    def counts(self) -> np.ndarray:
        """Usable samples of each shard, int64."""
        return np.bincount(self._shard_of.numpy(), minlength=len(self.paths))

    def n_captions(self) -> np.ndarray:
        own = self._column("captions").astype(np.int64)  # the index counts to 255
        return np.where(own > 0, own, len(self.captions.class_templates))

    def origins(self) -> np.ndarray:
        return np.cumsum(self._column("flags") & CONTINUES == 0)

    def _column(self, name: str) -> np.ndarray:
        return self._rows.numpy().view(_ROW)[name]

    def fingerprint(self) -> str:
        return self._digest

    def problems(self) -> list[str]:
        return self._problems


@lru_cache(maxsize=128)  # a process keeps this many shards open; the limit is commonly 1,024
class _Handle:
    """An open file that closes when it falls out of the cache."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "fd"):  # opening may have failed
            os.close(self.fd)


def _read(path: str, offset: int, length: int) -> bytes:
    """Bytes of a shard at a position; a shard that grew shorter is a ValueError."""
    data = os.pread(_Handle(path).fd, length, offset)
    if len(data) != length:
        raise ValueError(f"{path} ends before byte {offset + length}; it changed after it was indexed")
    return data
