"""Files of arrays that stages hand to one another: whole or not there, read by mapping, and divided
by a value of their rows.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from vlp.files import replacing

SEARCH_FOLDER = "_search"  # in the output's folder, until all shards are written


def save(path: Path, array: np.ndarray) -> None:
    """Write an array so that a reader sees all of it or no file; raises OSError."""
    with replacing(path) as temporary, open(temporary, "xb") as file:
        np.save(file, array)


def load(path: Path) -> np.ndarray:
    """The array of a file, mapped: only the parts that are read take memory, but each array that is
    kept keeps a file open. Raises ValueError for damage.
    """
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        # A process may have too many files open, a disk may fail: the file is whole then.
        if getattr(error, "errno", None) not in (None, errno.ENOENT):
            raise
        remedy = f"delete it with its mark, {path.stem}.json"
        if path.parent.name == SEARCH_FOLDER:
            remedy = f"delete the folder {path.parent}"
        raise ValueError(
            f"{path} is damaged ({error}); {remedy}: the same call makes it again"
        ) from None


def joined(paths: Iterable[Path]) -> np.ndarray:
    """The arrays of several files, one after another; of one file at least."""
    paths = list(paths)
    first = load(paths[0])
    array = np.empty((sum(len(load(path)) for path in paths), *first.shape[1:]), first.dtype)
    # One at a time: a process may have a thousand files open, or fewer.
    start = 0
    for path in paths:
        rows = load(path)
        array[start : start + len(rows)] = rows
        start += len(rows)
    return array


def save_divided(path: Path, values: np.ndarray, n_values: int, rows: np.ndarray) -> None:
    """Write rows in the order of their values, integers below n_values, and where each begins."""
    order = np.argsort(values.astype(np.int64), kind="stable")
    sizes = np.bincount(values.astype(np.int64), minlength=n_values)
    save(_starts(path), np.concatenate([[0], np.cumsum(sizes)]))
    save(path, rows[order])


def sizes(paths: Iterable[Path]) -> np.ndarray:
    """How many rows of all files have each value."""
    return np.sum([np.diff(load(_starts(path))) for path in paths], axis=0)


def part(path: Path, low: int, high: int) -> np.ndarray:
    """The rows of values from low to below high."""
    starts = load(_starts(path))
    return np.array(load(path)[starts[low] : starts[high]])


def part_of_all(paths: Iterable[Path], low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """(the rows of values from low to below high of all files, value by value and each in the order
    of the files; where each value begins, and the end).
    """
    parts, values = [], []
    for path in paths:
        parts.append(part(path, low, high))
        sizes_here = np.diff(load(_starts(path))[low : high + 1])
        values.append(np.repeat(np.arange(high - low), sizes_here))
    of_rows = np.concatenate(values)
    order = np.argsort(of_rows, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(of_rows, minlength=high - low))])
    return np.concatenate(parts)[order], starts


def even_parts(sizes: np.ndarray, most_rows: int) -> Iterator[tuple[int, int, int]]:
    """(low, high, rows) of ranges of values, each of at most `most_rows` rows or of one value; one
    range at least.
    """
    low = n_rows = 0
    for value, size in enumerate(sizes.tolist()):
        if n_rows and n_rows + size > most_rows:
            yield low, value, n_rows
            low, n_rows = value, 0
        n_rows += size
    yield low, len(sizes), n_rows


def _starts(path: Path) -> Path:
    return path.with_name(f"{path.stem}_starts.npy")
