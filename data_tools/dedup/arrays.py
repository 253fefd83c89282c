"""Files of arrays that stages hand to one another: whole or not there, read by mapping, and divided
by a value of their rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from vlp.files import replacing


def save(path: Path, array: np.ndarray) -> None:
    """Write an array so that a reader sees all of it or no file; raises OSError."""
    with replacing(path) as temporary, open(temporary, "xb") as file:
        np.save(file, array)


def load(path: Path) -> np.ndarray:
    """The array of a file, mapped: only the parts that are read take memory. Raises ValueError for
    damage.
    """
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete the folder {path.parent}: the same call makes it "
            "again"
        ) from None


def joined(paths: Iterable[Path]) -> np.ndarray:
    """The arrays of several files, one after another; of one file at least."""
    return np.concatenate([load(path) for path in paths])


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
    """The rows of values from low to below high, mapped."""
    starts = load(_starts(path))
    return load(path)[starts[low] : starts[high]]


def even_parts(sizes: np.ndarray, most_rows: int) -> Iterator[tuple[int, int, int]]:
    """(low, high, rows) of ranges of values, each of at most `most_rows` rows or of one value."""
    low = n_rows = 0
    for value, size in enumerate(sizes.tolist()):
        if n_rows and n_rows + size > most_rows:
            yield low, value, n_rows
            low, n_rows = value, 0
        n_rows += size
    if n_rows:
        yield low, len(sizes), n_rows


def _starts(path: Path) -> Path:
    return path.with_name(f"{path.stem}_starts.npy")
