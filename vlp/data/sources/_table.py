"""The samples of several shards in one table of columns, as the source `shards` keeps them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlp.data.captions import TEXT_FILE, Choice
from vlp.data.rows import CONTINUES, ROW, Shard

_FIELDS = [
    ("offset", "<u8"),
    ("length", "<u4"),
    ("form", "<u4"),
    ("digest", "<u4"),
    ("negatives", "u1"),
    ("counterfactuals", "u1"),
    ("flags", "<u2"),
]
ROW_COLUMNS = np.dtype(_FIELDS)
assert ROW_COLUMNS.itemsize == ROW.size
# A row without its digest: what runs compare since before there were digests (`fingerprint`).
_COMPARED = [field for field in _FIELDS if field[0] != "digest"]


@dataclass(frozen=True)
class Table:
    """Columns of n samples, in the order of their shards."""

    rows: np.ndarray  # ROW_COLUMNS [n]
    n_texts: np.ndarray  # int64 [n], captions that are not made of class names
    shard_of: np.ndarray  # int32 [n]
    place: np.ndarray  # int64 [n], in its shard

    def has(self, flag: int) -> np.ndarray:
        """Which samples have a flag of `vlp.data.rows`, bool [n]."""
        return self.rows["flags"] & flag > 0

    def only(self, kept: np.ndarray) -> Table:
        """Those of the samples that are True in `kept` [n]."""
        # A sample whose origin's first one goes away begins its origin now.
        origin = np.cumsum(~self.has(CONTINUES))[kept]
        begins = np.diff(origin, prepend=0) > 0

        rows = self.rows[kept]
        flags = rows["flags"]
        rows["flags"] = np.where(begins, flags & ~np.uint16(CONTINUES), flags)
        return Table(rows, self.n_texts[kept], self.shard_of[kept], self.place[kept])


def table_of(shards: Sequence[Shard], choice: Choice) -> Table:
    """All samples of some shards."""
    rows = np.frombuffer(b"".join(shard.rows for shard in shards), ROW_COLUMNS)
    counts = np.array([shard.count for shard in shards])
    shard_of = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
    firsts = np.cumsum(counts) - counts
    place = np.arange(len(rows)) - firsts[shard_of]
    return Table(rows, count_captions(shards, rows, choice), shard_of, place)


def count_captions(shards: Sequence[Shard], rows: np.ndarray, choice: Choice) -> np.ndarray:
    """How many captions each sample has, int64 [n]."""
    counts = np.zeros(len(rows), np.int64)
    start = 0
    for shard in shards:
        end = start + shard.count
        by_form = np.array([choice.count(form) for form in shard.forms] or [0])
        counts[start:end] = by_form[rows["form"][start:end]]
        start = end
    return counts


def count_names(shards: Sequence[Shard], rows: np.ndarray) -> Counter[str]:
    """How many samples have a text under each name."""
    names: Counter[str] = Counter()
    start = 0
    for shard in shards:
        end = start + shard.count
        times = np.bincount(rows["form"][start:end], minlength=len(shard.forms))
        for form, n in zip(shard.forms, times.tolist()):
            names.update({"txt" if name == TEXT_FILE else name: n for name in form})
        start = end
    return names


def fingerprint(table: Table, shards: Sequence[Shard], choice: Choice) -> str:
    """Of all that a resumed run must find again: places, keys, texts, and which of the texts are
    captions.

    The content of the shards is compared beside it, with their names (`Source.contents`).
    """
    compared = np.zeros(len(table.rows), np.dtype(_COMPARED))
    for name, _ in _COMPARED:
        if name != "form":  # its number depends on what else the shard holds
            compared[name] = table.rows[name]

    # The order of these is that of the checkpoints there are.
    digest = hashlib.sha256()
    for column in (compared, table.shard_of, table.n_texts):
        digest.update(column.tobytes())
    digest.update(repr(choice).encode())
    if choice.roles:
        digest.update(repr(choice.roles).encode())
    for shard in shards:
        digest.update(f"{shard.keys} {shard.texts}".encode() + shard.extents)
    return digest.hexdigest()
