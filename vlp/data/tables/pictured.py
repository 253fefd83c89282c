"""Pictures in a column of bytes of a parquet file, read by row.

A column's pages are compressed, so that a row has no place of its own in the file: its row group is
read from its beginning. Rows are cheap in their order, as `vlp data pack` reads them, and dear in
any other.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from threading import Lock
from typing import Any

_BATCH = 32  # rows that are read at once
_KEPT = 3  # batches that stay: threads ask for neighbours, not quite in order
_OPEN = 2  # columns that stay open
_BUFFER = 1 << 18  # bytes; without it, the column of a row group would be read whole

_columns: OrderedDict[tuple[Any, ...], _Column] = OrderedDict()
_lock = Lock()


def read(path: str, column: str, row: int) -> bytes:
    """The bytes that a row holds, counted from 0; empty where it holds none. Raises OSError, and
    ValueError for a damaged file.
    """
    from pyarrow import ArrowException

    status = os.stat(path)
    # Another file in its place, or a process that was forked, begins anew.
    key = (path, column, status.st_size, status.st_mtime_ns, os.getpid())
    with _lock:
        try:
            if key not in _columns:
                _columns[key] = _Column(path, column)
            _columns.move_to_end(key)
            while len(_columns) > _OPEN:
                _columns.popitem(last=False)[1].close()
            return _columns[key].read(row)
        except (ArrowException, OSError, ValueError, KeyError) as error:
            # What failed half-way does not know where it stands.
            _columns.pop(key, None)
            raise ValueError(
                f"{path}: row {row + 1} of the column {column!r} cannot be read "
                f"({str(error)[:120]}); fetch or write the file again"
            ) from None


class _Column:
    """One column of a file, and how far its rows are read."""

    def __init__(self, path: str, column: str) -> None:
        from pyarrow import parquet

        self._column = column
        self._file = parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
        about = self._file.metadata
        sizes = (about.row_group(i).num_rows for i in range(about.num_row_groups))
        self._starts = list(accumulate(sizes, initial=0))  # the last one: rows of the file

        self._group = -1
        self._next = 0  # the first row that is not read yet
        self._batches: Iterator[Any] = iter(())
        self._kept: list[tuple[int, Any]] = []  # first row, values

    def read(self, row: int) -> bytes:
        """The bytes of a row; raises ValueError where there is none."""
        if not 0 <= row < self._starts[-1]:
            raise ValueError(f"the file has {self._starts[-1]} rows")

        found = self._among_kept(row)
        group = bisect_right(self._starts, row) - 1
        if found is None and (group != self._group or row < self._next):
            self._begin(group)
        while found is None:
            self._read_on()
            found = self._among_kept(row)
        return found

    def close(self) -> None:
        self._file.close()

    def _among_kept(self, row: int) -> bytes | None:
        for first, values in self._kept:
            if first <= row < first + len(values):
                return values[row - first].as_py() or b""
        return None

    def _begin(self, group: int) -> None:
        self._group, self._next = group, self._starts[group]
        self._batches = self._file.iter_batches(
            _BATCH, row_groups=[group], columns=[self._column], use_threads=False
        )

    def _read_on(self) -> None:
        batch = next(self._batches, None)
        if batch is None:
            raise ValueError("its row group ends before it")
        self._kept = [*self._kept[1 - _KEPT :], (self._next, batch.column(self._column))]
        self._next += batch.num_rows
