"""What is known of a shard's samples without their rows, so that start-up reads none of these."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from vlp.data.rows import CLASS, ROW, Kind, Shard

FIELDS = [
    ("offset", "<u8"),
    ("length", "<u4"),
    ("form", "<u4"),
    ("digest", "<u4"),
    ("negatives", "u1"),
    ("counterfactuals", "u1"),
    ("flags", "<u2"),
]
ROW_COLUMNS = np.dtype(FIELDS)
assert ROW_COLUMNS.itemsize == ROW.size


def summarize(shard: Shard) -> None:
    """Fill in what follows from the rows of a shard."""
    rows = np.frombuffer(shard.rows, ROW_COLUMNS)
    shard.kinds = _kinds(rows)

    # Without the samples' digests, of which checkpoints keep others (`Source.contents`): an older
    # index knows none, and a run goes on where it was made anew.
    places = rows.copy()
    places["digest"] = 0
    digest = hashlib.sha256(places.tobytes() + shard.extents)
    digest.update(json.dumps(shard.forms).encode())
    shard.order = digest.hexdigest()


def kind_numbers(rows: np.ndarray) -> np.ndarray:
    """A number for each of the rows [n], the same for those of one `Kind`."""
    has_class = rows["flags"] & CLASS > 0
    return 2 * rows["form"].astype(np.int64) + has_class


def _kinds(rows: np.ndarray) -> list[Kind]:
    """The kinds of the rows, in the order of their numbers."""
    if not len(rows):
        return []

    # Sorted, each kind is a run: one pass for all of them.
    numbers = kind_numbers(rows)
    by_kind = np.argsort(numbers, kind="stable")
    _, starts, counts = np.unique(numbers[by_kind], return_index=True, return_counts=True)
    columns = [
        rows["form"][by_kind[starts]],
        counts,
        np.bitwise_or.reduceat(rows["flags"][by_kind], starts),
        np.bitwise_and.reduceat(rows["flags"][by_kind], starts),
        np.maximum.reduceat(rows["negatives"][by_kind], starts),
        np.maximum.reduceat(rows["counterfactuals"][by_kind], starts),
    ]
    return [Kind(*values) for values in zip(*(column.tolist() for column in columns))]
