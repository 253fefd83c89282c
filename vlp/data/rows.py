"""What the index keeps of a shard: a row a sample, and what was left out of the rows."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from vlp.data.captions import Form
from vlp.data.members import (
    FRAMES,
    IMAGE_TYPES,
    SOUND_TYPES,
    TEXT_TYPES,
    Content,
    open_sample,
)
from vlp.fields import JSON_LABELS

# Offset and bytes of the sample's members, number of its form, digest of its members, the most
# negatives and the most counterfactuals that belong to one of its captions, flags.
ROW = struct.Struct("<QIIIBBH")
# Offset and bytes of some members of a sample whose members do not follow one another.
EXTENT = struct.Struct("<QI")

CLASS = 1  # flag: the sample's JSON names its class
PICTURED = 4  # flag: it has an image of a negative
CONTINUES = 8  # flag: its origin is that of the sample before it
SCATTERED = 64  # flag: offset is the number of its first extent, of as many as have its bytes
# Flags: numbers of the sample's JSON that terms read (vlp.fields). The first three have the bits
# that they always had; further ones follow in the table's order.
_FIRST_LABELS = {"score": 2, "negative_scores": 16, "concepts": 32}
FURTHER_LABELS = [name for name in JSON_LABELS if name not in _FIRST_LABELS]
LABELS = _FIRST_LABELS | {name: 128 << i for i, name in enumerate(FURTHER_LABELS)}

# So `Shard.left_out` counts members that are no texts, and text files that are not read.
_UNREAD = ("members ", "a .")
FURTHER_MEMBERS = "members of further kinds"  # where there are too many to tell apart

_OF_MODALITIES = re.compile(
    rf"members \.({'|'.join(SOUND_TYPES)}|npy|{FRAMES}\.({'|'.join(IMAGE_TYPES)}))"
)

# Of the reader of tars; raised where it takes for samples or texts what it passed over before.
READER = 1
_KEPT = 20  # problems of a shard that are kept in words; the others are only counted
# Different kinds of what was left out; further ones are counted together. Those that modalities are
# made of, a few dozen at most, are always told apart: readers and tools look for them by name.
_KINDS = 40


class Kind(NamedTuple):
    """Samples of a shard that have one form, and all or none of which name their class."""

    form: int  # its number
    n: int
    some_flags: int  # those that any of the samples has
    all_flags: int  # those that every one has
    negatives: int  # the most of any
    counterfactuals: int


class Stored(NamedTuple):
    """Where the rows of a shard, and behind them its extents, lie in an index file."""

    path: str
    head: bytes  # the check sum of the file's header, which tells it from one that replaced it
    offset: int
    n_bytes: int
    n_extents: int
    digest: str  # SHA-256, in hex, of these bytes


@dataclass
class Shard:
    """What the index knows of one tar. Where `stored` names their place, `rows` and `extents` may
    be left unread, and empty here.
    """

    name: str
    size: int
    mtime_ns: int
    ctime_ns: int = 0  # of the inode's last change, which no tool sets back
    reader: int = 0  # READER of whoever read it
    count: int = 0
    n_left_out: int = 0  # samples that are in the tar, or were written to it, but not in `rows`
    n_problems: int = 0  # those, and what is odd or damaged besides
    n_damaged: int = 0  # places where the tar is damaged, or no tar
    problems: list[str] = field(default_factory=list)
    # How many samples, texts and members, by what they are.
    left_out: dict[str, int] = field(default_factory=dict)
    # SHA-256, in hex, of the keys of `rows`, one a line: what lies beside a shard names it so.
    keys: str = ""
    texts: str = ""  # SHA-256, in hex, of the bytes of their text members
    content: str = ""  # SHA-256, in hex, of the digests of `rows`; empty: not known
    # Which texts samples have; a row names one of them by its number.
    forms: list[Form] = field(default_factory=list)
    # What start-up needs to know of `rows`, which are as many as the samples.
    kinds: list[Kind] = field(default_factory=list)
    order: str = ""  # SHA-256, in hex, of places, forms and flags, see `vlp.data.summary`
    rows: bytes = b""
    extents: bytes = b""
    stored: Stored | None = field(default=None, compare=False)

    def report(self, key: str, reason: str) -> None:
        """Count one problem, of the kind that stands before the colon, and keep it in words while
        there are few.
        """
        self.n_problems += 1
        if len(self.problems) < _KEPT:
            self.problems.append(f"{key}: {reason}" if key else reason)

        # Details differ from sample to sample; kinds can be counted.
        self.pass_over(reason.partition(": ")[0])

    def pass_over(self, kind: str, n: int = 1) -> None:
        """Count what no reader looks at."""
        # A hostile tar may hold a million extensions.
        is_full = len(self.left_out) >= _KINDS and kind not in self.left_out
        if is_full and not _OF_MODALITIES.fullmatch(kind):
            kind = FURTHER_MEMBERS if kind.startswith(_UNREAD) else "of further kinds"
        self.left_out[kind] = self.left_out.get(kind, 0) + n

    def is_outdated(self) -> bool:
        """Whether an earlier reader passed over what may be texts for the one of today."""
        if self.reader >= READER:
            return False
        passed_over = [kind for kind in self.left_out if kind.startswith("members .")]
        endings = {kind.rpartition(".")[2].rstrip().lower() for kind in passed_over}
        return not endings.isdisjoint(TEXT_TYPES) or "no image member" in self.left_out

    def sample(self, file: BinaryIO, i: int) -> Content:
        """Sample i, read from the opened shard; raises ValueError where it cannot be used."""
        return open_sample(read_extents(file, self.places(i)), self.digest(i))

    def digest(self, i: int) -> int:
        """Of the members of sample i, see `vlp.data.digests`."""
        return ROW.unpack_from(self.rows, i * ROW.size)[3]

    def places(self, i: int) -> list[tuple[int, int]]:
        """(offset, bytes) of the members of sample i."""
        offset, length, *_, flags = ROW.unpack_from(self.rows, i * ROW.size)
        if flags & SCATTERED:
            return extents(self.extents, offset, length)
        return [(offset, length)]


def extents(table: bytes | memoryview, first: int, length: int) -> list[tuple[int, int]]:
    """(offset, bytes) of the extents from number `first` on that are `length` bytes together."""
    places = []
    while length > 0:
        offset, n_bytes = EXTENT.unpack_from(table, first * EXTENT.size)
        places.append((offset, n_bytes))
        first += 1
        length -= n_bytes
    return places


def unread(left_out: Mapping[str, int]) -> dict[str, int]:
    """The members that are no texts, and the text files that no reader looks at."""
    return {kind: n for kind, n in left_out.items() if kind.startswith(_UNREAD)}


def of_modalities(left_out: Mapping[str, int]) -> dict[str, int]:
    """The kinds of members among them that further modalities are made of: sounds, frames and
    arrays of numbers.
    """
    return {kind: n for kind, n in left_out.items() if _OF_MODALITIES.fullmatch(kind)}


def said(left_out: Mapping[str, int]) -> str:
    """What was left out, in one line, the commonest first."""
    common = sorted(left_out, key=lambda kind: (-left_out[kind], kind))
    shown = [f"{left_out[kind]:,} × {kind}" for kind in common[:10]]
    if len(common) > 10:
        shown.append("…")
    return ", ".join(shown)


def labels_of(meta: dict[str, Any]) -> Set[str]:
    """Which of LABELS a sample's JSON holds: numbers [b] of a batch as a number, others as lists.

    A list may be empty only as the scores of no negatives, or as the concepts of a sample that
    names none.
    """
    labels = set()
    for name in LABELS.keys() & meta.keys():
        is_number = JSON_LABELS[name].batch_shape == "b"
        values = [meta[name]] if is_number else meta[name]
        if not isinstance(values, list) or not all(isinstance(v, (int, float)) for v in values):
            continue

        # Where a sample has no negatives, no scores are right.
        may_be_empty = name == "concepts"
        if name == "negative_scores":
            may_be_empty = not meta.get("negatives")
        if values or may_be_empty:
            labels.add(name)
    return labels


def read_extents(file: BinaryIO, places: Sequence[tuple[int, int]]) -> bytes:
    """The bytes at these (offset, length), one after another."""
    parts = []
    for offset, length in places:
        file.seek(offset)
        parts.append(file.read(length))
    return b"".join(parts)
