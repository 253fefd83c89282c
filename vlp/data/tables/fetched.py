"""The parquet files that img2dataset writes beside what it fetches: a row an address.

00000.parquet    key, url, status ("success", or why not), caption, and every column of the list
                 that was fetched (similarity, punsafe, …)
00000.tar        the pictures of the rows that succeeded, by key; or the folder 00000/; or, of
                 `output_format: parquet`, a column of bytes of the file itself: jpg, png or webp
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from vlp.data.members import IMAGE_TYPES
from vlp.data.tables.parquet import columns_of_bytes, parse_parquet

KEY = "key"
_STATUS = "status"
_COLUMNS = {KEY, _STATUS, "url"}
_SUCCESS = "success"
_NAME = re.compile(r"\d{5,}\.parquet")

Row = dict[str, Any]


def is_of_fetched(columns: Iterable[str]) -> bool:
    """Whether these are the columns of such a file."""
    return set(columns) >= _COLUMNS


def files_in(folder: Path) -> list[Path]:
    """The files of this kind in a folder, in order; empty where the first is another table."""
    if not folder.is_dir():
        return []
    paths = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    return paths if paths and _is_one(paths[0]) else []


def succeeded(rows: list[tuple[int, Row]]) -> tuple[list[tuple[int, Row]], str]:
    """The rows whose picture was fetched, and what became of the others, for a note."""
    kept = [(number, row) for number, row in rows if row.get(_STATUS) == _SUCCESS]
    states: Counter[str] = Counter()
    for _, row in rows:
        state = row.get(_STATUS)
        states["no status" if state is None else str(state)] += 1
    del states[_SUCCESS]
    lost = ", ".join(f"{state} {n:,}" for state, n in states.most_common(5))
    return kept, lost


def rows_beside(shard: Path, keys: Collection[str] | None = None) -> dict[str, Row]:
    """The rows of the pictures in a shard by key, of these `keys` alone where some are named; empty
    where no such file lies beside it. Raises ValueError, OSError for one that cannot be read.
    """
    path = beside(shard)
    if path is None or not _is_one(path):
        return {}
    rows, _ = parse_parquet(path, None if keys is None else {KEY: keys})
    kept, _ = succeeded(rows)
    return {str(row[KEY]): row for _, row in kept}


def pictures_in(path: Path) -> tuple[str, dict[str, int]]:
    """The column that holds the pictures of such a file, and the row of each by its name:
    `00000/000000012.jpg`, as it is called in the other layouts. ("", {}) where pictures lie
    elsewhere; raises ValueError for a damaged file.
    """
    column = picture_column(path)
    if not column:
        return "", {}

    rows = _whole(path, lambda file: file.read(columns=[KEY, _STATUS]).to_pylist())
    names = {}
    for number, row in enumerate(rows):
        if row[_STATUS] == _SUCCESS and row[KEY] is not None:
            names[f"{path.stem}/{row[KEY]}.{column.lower()}"] = number
    return column, names


def picture_column(path: Path) -> str:
    """The column of such a file that holds pictures, called as their kind is; or empty."""
    schema = _whole(path, lambda file: file.schema_arrow)
    if not is_of_fetched(schema.names):
        return ""
    names = [name for name in columns_of_bytes(schema) if name.lower() in IMAGE_TYPES]
    return names[0] if names else ""


def beside(shard: Path) -> Path | None:
    """The file that may tell more of a shard's samples."""
    path = shard.with_suffix(".parquet")
    return path if _NAME.fullmatch(path.name) and path.is_file() else None


def completed(meta: Row, row: Row) -> Row:
    """A sample's JSON with the columns that it lacks; what it says itself goes before."""
    return {
        **{name: value for name, value in row.items() if value is not None},
        **{name: value for name, value in meta.items() if value is not None or name not in row},
    }


def _is_one(path: Path) -> bool:
    """Whether a parquet file has the columns; raises ValueError for a damaged one."""
    return is_of_fetched(_whole(path, lambda file: file.schema_arrow.names))


def _whole(path: Path, reading: Callable[[Any], Any]) -> Any:
    """What is read of a `pyarrow.parquet.ParquetFile`; raises ValueError where it is damaged."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            return reading(file)
    except (ArrowException, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is no whole parquet file ({str(error)[:120]}); fetch or write it again"
        ) from None
