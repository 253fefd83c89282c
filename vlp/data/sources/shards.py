"""Local shards: `{name: shards, path: data/train}` or `path: "a/{00000..00041}.tar::b"`.

A path is a folder (all its tars in order of name), a tar, or a pattern with braces or stars; `::` joins several. Each
sample is one positioned read of the span that the folder's index names (or several, where its members are scattered over
the tar), so any order costs the same and workers share nothing. `captions` chooses among the texts that samples have:
`captions: [re_caption, txt]`, or with shares `{re_caption: 0.75, txt: 0.25}`.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from vlp.config import Captions
from vlp.data import splits
from vlp.data.captions import TEXT_FILE, USUAL, Choice, Texts, listed
from vlp.data.embedded import Embeddings
from vlp.data.index import index
from vlp.data.members import open_sample
from vlp.data.paths import expand
from vlp.data.rows import (
    CLASS,
    CONTINUES,
    EXTENT,
    LABELS,
    PICTURED,
    ROW,
    SCATTERED,
    Shard,
    extents,
    said,
)
from vlp.data.sources import Contents, Source, captions_of
from vlp.types import Sample

_ROW = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u4"),
        ("form", "<u4"),
        ("digest", "<u4"),
        ("negatives", "u1"),
        ("counterfactuals", "u1"),
        ("flags", "<u2"),
    ]
)
assert _ROW.itemsize == ROW.size
# A row without its digest: what runs compare since before there were digests (`_digest`).
_PLACED = np.dtype([(name, _ROW[name]) for name in _ROW.names if name != "digest"])


@dataclass(frozen=True)
class Options(Texts):
    """Where the shards are, and which of their texts are captions."""

    path: str  # folder, tar, braces or stars, several joined by ::
    embeddings: str | None = (
        None  # folder that `vlp data embed` made from these shards: a teacher's embeddings
    )


def open(options: Options, captions: Captions) -> Shards:
    """Index the shards (from the folder's index where it is current); raises ValueError or OSError."""
    paths = expand(options.path)
    _refuse_splits(options.path, paths)
    return Shards(paths, index(paths), captions, options, options.embeddings)


def _refuse_splits(path: str, shards: list[Path]) -> None:
    """Raise where a folder holds shards of several splits: training would see those for testing."""
    names = sorted({splits.of_file(shard.name) for shard in shards} - {""})
    if len(names) > 1 and Path(path).expanduser().is_dir():
        raise ValueError(
            f"{path} holds shards of several splits: {', '.join(names)}; name one of them, such as "
            f"{path}/{names[-1]}*.tar, or all: {path}/*.tar"
        )


class Shards(Source):
    """Random access to the samples of some tars."""

    def __init__(
        self,
        paths: list[Path] | list[str],
        shards: list[Shard],
        captions: Captions,
        texts: Texts,
        embeddings: str | None = None,
    ) -> None:
        self.paths, self.captions, self.choice = (
            [str(path) for path in paths],
            captions,
            Choice.of(texts, captions),
        )
        rows = np.frombuffer(b"".join(shard.rows for shard in shards), _ROW)
        self.left_out = sum(
            (Counter(shard.left_out) for shard in shards), Counter()
        )  # of samples, texts and members, by what
        self._problems = (
            [f"{self._name()}: odd or passed over: {said(self.left_out)}"] if self.left_out else []
        )
        if not len(rows):
            problems = "; ".join(
                [*self._problems, *(text for shard in shards for text in shard.problems)][:3]
            )
            raise ValueError(
                f"{self._name()} holds no usable sample: {problems or 'no members that form samples'}"
            )
        self.names = _names(shards, rows)  # how many samples have a text under each name
        self._problems += self.choice.check(self.names, len(rows), self._name())

        n_texts = _counted(shards, rows, self.choice)
        n_several = int(
            (_counted(shards, rows, replace(self.choice, lines="each")) > n_texts).sum()
        )
        if n_several:
            self._problems.append(
                f"{self._name()}: text files of several lines are one caption each in {n_several:,} samples; the source's "
                "lines: each makes each line a caption"
            )
        if n_undigested := sum(not shard.content for shard in shards):
            self._problems.append(
                f"{self._name()}: the index of {n_undigested} shards is of an older version, without "
                "digests: their samples are read unchecked; opened where they are local they get a new one"
            )
        self._problems += [
            f"{path}: {text}" for path, shard in zip(paths, shards) for text in shard.problems
        ]

        has_text = n_texts > 0
        if captions.class_templates:
            has_text |= rows["flags"] & CLASS > 0
        counts = np.array([shard.count for shard in shards])
        self.n_left_out = sum(shard.n_left_out for shard in shards) + int((~has_text).sum())
        shard_of = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        place = np.arange(len(rows)) - (np.cumsum(counts) - counts)[shard_of]  # in its shard
        if not has_text.all():
            self._refuse_or_note(has_text, np.cumsum(counts))
            origin = np.cumsum(rows["flags"] & CONTINUES == 0)[has_text]
            rows, shard_of, place, n_texts = (
                rows[has_text],
                shard_of[has_text],
                place[has_text],
                n_texts[has_text],
            )
            first = (
                np.diff(origin, prepend=0) > 0
            )  # also of those whose origin's first sample was left out
            rows["flags"] = np.where(first, rows["flags"] & ~np.uint16(CONTINUES), rows["flags"])
        if not len(rows):
            raise ValueError(
                f"{self._name()} holds no usable sample: {'; '.join(self._problems[:3])}"
            )

        self.n_negatives = int(rows["negatives"].max())
        self.n_counterfactuals = int(rows["counterfactuals"].max())
        lonely = int((rows["negatives"][rows["flags"] & PICTURED == 0] > 0).sum())
        self.pictured = bool((rows["flags"] & PICTURED > 0).any())
        if self.pictured and lonely:
            self._problems.append(
                f"{self.paths[0]}…: the first negative of {lonely} samples is masked: no image belongs to it"
            )
        self.labels = frozenset(
            name for name, flag in LABELS.items() if (rows["flags"] & flag > 0).all()
        )
        self._digest = _digest(rows, shard_of, n_texts, shards, self.choice)
        # One text of all, because it is sent to every loader process.
        unknown = "-" * Contents.DIGITS
        self._contents = "".join((shard.content or unknown)[: Contents.DIGITS] for shard in shards)
        self._share(rows, shard_of, n_texts, shards)
        if embeddings is not None:
            usual_first = self.choice == Choice() and bool(
                (n_texts > 0).all() and (captions.choose == "first" or (n_texts == 1).all())
            )
            self.embeddings = Embeddings(embeddings, self.paths, shards, with_text=usual_first)
            self._place = torch.from_numpy(place.astype(np.int32)).share_memory_()
            if not usual_first:
                self._problems.append(
                    f"{embeddings}: teacher_text is left out, because it is of first captions and training also takes others; "
                    "set captions.choose=first, and no class_templates, lines or captions of the source to have it"
                )

    def _share(
        self, rows: np.ndarray, shard_of: np.ndarray, n_texts: np.ndarray, shards: list[Shard]
    ) -> None:
        """Keep what reading needs in shared memory: loader processes receive a handle instead of a
        copy.
        """
        rows, table = rows.copy(), b"".join(shard.extents for shard in shards)
        firsts = np.cumsum([0, *(len(shard.extents) // EXTENT.size for shard in shards)])
        rows["offset"] += np.where(rows["flags"] & SCATTERED > 0, firsts[shard_of], 0).astype(
            np.uint64
        )

        self._rows = torch.from_numpy(rows.view(np.uint8)).share_memory_()
        self._extents = (
            torch.frombuffer(bytearray(table), dtype=torch.uint8).share_memory_() if table else None
        )
        self._n_texts = torch.from_numpy(n_texts).share_memory_()
        self._shard_of = torch.from_numpy(shard_of).share_memory_()

    def _name(self) -> str:
        return self.paths[0] + ("…" if len(self.paths) > 1 else "")

    def _refuse_or_note(self, has_text: np.ndarray, ends: np.ndarray) -> None:
        bad = np.flatnonzero(~has_text)
        per_shard = np.bincount(np.searchsorted(ends, bad, side="right"), minlength=len(self.paths))
        lines = [
            f"{self.paths[s]}: {per_shard[s]} samples without text"
            for s in np.flatnonzero(per_shard)
        ]
        if self.captions.missing == "error":
            wanted = " or ".join(self.choice.names or USUAL)
            raise ValueError(
                f"{len(bad)} of {len(has_text)} samples have no caption under {wanted} ({'; '.join(lines[:3])}). There are texts "
                f"under {listed(self.names)}: name those to take in the source's captions; or set captions.class_templates "
                "to make captions of class names, or captions.missing=drop to leave the samples out"
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
        offset, length, _, digest, *_, flags = ROW.unpack_from(self._rows.numpy(), i * ROW.size)
        places = (
            extents(self._extents.numpy(), offset, length)
            if flags & SCATTERED
            else [(offset, length)]
        )
        content = open_sample(b"".join(_read(path, *place) for place in places), digest)
        captions = captions_of(
            self.choice.captions(content.meta, content.text), content.meta, self.captions
        )
        if not captions:
            raise ValueError(
                f"{path}: {content.key!r} has no caption any more; the shard changed after it was indexed"
            )
        row = self.embeddings and self.embeddings.row(self.shard_of(i), int(self._place[i]))
        if row is not None and not row[0].any():
            raise ValueError(
                f"{path}: {content.key!r} has no image embedding: its picture did not open for `vlp data embed`"
            )
        weights = self.choice.weights(content.meta, content.text)
        return Sample(
            i,
            content.key,
            content.image,
            content.image_type,
            captions,
            content.meta,
            content.negative_image,
            row,
            weights,
        )

    def counts(self) -> np.ndarray:
        """Usable samples of each shard, int64."""
        return np.bincount(self._shard_of.numpy(), minlength=len(self.paths))

    def n_captions(self) -> np.ndarray:
        n_texts = self._n_texts.numpy()
        return np.where(n_texts > 0, n_texts, len(self.captions.class_templates))

    def origins(self) -> np.ndarray:
        return np.cumsum(self._column("flags") & CONTINUES == 0)

    def _column(self, name: str) -> np.ndarray:
        return self._rows.numpy().view(_ROW)[name]

    def fingerprint(self) -> str:
        return self._digest

    def contents(self) -> Contents:
        names, digits = [Path(path).name for path in self.paths], Contents.DIGITS
        digests = [self._contents[i * digits : (i + 1) * digits] for i in range(len(names))]
        return Contents(names, digests)

    def problems(self) -> list[str]:
        return self._problems


def _names(shards: list[Shard], rows: np.ndarray) -> Counter[str]:
    """How many samples have a text under each name."""
    names: Counter[str] = Counter()
    start = 0
    for shard in shards:
        times = np.bincount(rows["form"][start : start + shard.count], minlength=len(shard.forms))
        start += shard.count
        for form, n in zip(shard.forms, times.tolist()):
            names.update({"txt" if name == TEXT_FILE else name: n for name in form})
    return names


def _counted(shards: list[Shard], rows: np.ndarray, choice: Choice) -> np.ndarray:
    """How many captions each sample has, int64 [n]."""
    counts, start = np.zeros(len(rows), np.int64), 0
    for shard in shards:
        by_form = np.array([choice.count(form) for form in shard.forms] or [0])
        counts[start : start + shard.count] = by_form[rows["form"][start : start + shard.count]]
        start += shard.count
    return counts


def _digest(
    rows: np.ndarray, shard_of: np.ndarray, n_texts: np.ndarray, shards: list[Shard], choice: Choice
) -> str:
    """Of all that a resumed run must find again: places, keys, texts, and which of the texts are
    captions.
    """
    kept = np.zeros(len(rows), _PLACED)
    for name in _PLACED.names:
        if name != "form":  # its number depends on what else the shard holds
            kept[name] = rows[name]
    digest = hashlib.sha256(kept.tobytes() + shard_of.tobytes() + n_texts.tobytes())
    digest.update(repr(choice).encode())
    for shard in shards:
        digest.update(f"{shard.keys} {shard.texts}".encode() + shard.extents)
    return digest.hexdigest()


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
        raise ValueError(
            f"{path} ends before byte {offset + length}; it changed after it was indexed"
        )
    return data
