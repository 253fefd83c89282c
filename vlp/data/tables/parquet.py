"""Parquet tables as rows of JSON values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vlp.data.tables.values import jsonable


def parse_parquet(
    path: Path, only: Mapping[str, Collection[str]] | None = None, unsaid: str = ""
) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
    """Numbered rows of a parquet file of names and texts, and what was left out; raises
    ValueError. only: the texts of a column whose rows are wanted, which are numbered among
    themselves. unsaid: a column of bytes that is used elsewhere.
    """
    from pyarrow import ArrowException, array, compute, parquet, string

    try:
        file = parquet.ParquetFile(path)
        # Unread: a file of pictures may be larger than memory.
        with_bytes = columns_of_bytes(file.schema_arrow)
        names = [name for name in file.schema_arrow.names if name not in with_bytes]
        table = file.read(columns=names)
        # Before values become Python's, which is what takes the time.
        for name, texts in (only or {}).items():
            column = table.column(name).cast(string())
            table = table.filter(compute.is_in(column, array(sorted(texts), string())))
    except (ArrowException, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is no whole parquet file ({str(error)[:120]}); fetch or write it again"
        ) from None

    columns: dict[str, list[Any]] = {}
    notes = [_left_out(path, name) for name in with_bytes if name != unsaid]
    for name in table.column_names:
        _refuse_pictures(path, name, table.column(name))
        # pyarrow reads a damaged column without complaint, and fails at its first value.
        try:
            values = _values(table.column(name))
        except (ArrowException, ValueError, OverflowError) as error:
            raise ValueError(
                f"{path}: the column {name!r} cannot be read ({str(error)[:120]}); write it again"
            ) from None
        # Noted, not refused: stored features beside captions do no harm.
        if any(isinstance(value, bytes) for value in values):
            notes.append(_left_out(path, name))
        else:
            columns[name] = values

    rows = []
    for number in range(table.num_rows):
        row = {name: jsonable(values[number]) for name, values in columns.items()}
        rows.append((number + 1, row))
    return rows, notes


def columns_of_bytes(schema: Any) -> list[str]:
    """The columns of a file whose values are bytes."""
    from pyarrow import types

    is_bytes = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    return [field.name for field in schema if any(check(field.type) for check in is_bytes)]


def _left_out(path: Path, name: str) -> str:
    return f"{path}: the column {name!r} holds bytes and was left out"


def _refuse_pictures(path: Path, name: str, column: Any) -> None:
    """A picture as `datasets` stores it is {bytes, path}; without its bytes it is a name like
    others.
    """
    if not _is_picture(column.type):
        return

    pictures = column.combine_chunks().field("bytes")
    if pictures.null_count < len(column):
        raise ValueError(
            f"{path}: the column {name!r} holds the pictures themselves, expected their names; "
            "train on its folder with the source {name: huggingface, path: FOLDER}, "
            "evaluate with data=FOLDER"
        )


def _is_picture(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}


def _values(column: Any) -> list[Any]:
    """The column as Python values; narrow floats as they print (0.31), not as doubles show them
    (0.3100000023841858).
    """
    import numpy as np
    import pyarrow

    kind = column.type
    narrow_types = {pyarrow.float32(): np.float32, pyarrow.float16(): np.float16}
    if kind in narrow_types:
        narrow = narrow_types[kind]
        values = column.to_pylist()
        return [None if value is None else float(str(narrow(value))) for value in values]

    if _is_picture(kind):
        return column.combine_chunks().field("path").to_pylist()
    if pyarrow.types.is_timestamp(kind):
        # Python's dates know no nanoseconds.
        column = column.cast(pyarrow.timestamp("us", kind.tz), safe=False)
    return column.to_pylist()
