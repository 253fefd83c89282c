"""Evaluation sets of the hub: parquet files with their images inside, or with the images' names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlp.data.tables import TableOptions
from vlp.data.tables.columns import (
    CLASS_COLUMNS,
    IMAGE_COLUMNS,
    column,
    listed,
    split_column,
    usual,
    usual_captions,
)
from vlp.data.tables.values import NoText, equals
from vlp.data.tables.values import texts as texts_of
from vlp.eval.datasets.source import Record, Source
from vlp.eval.pictures import Collection, DataError, Picture, refuse_missing

NUMBERS = ("label", "fine_label", "labels", "cls")  # columns of class numbers on the hub


@dataclass(frozen=True)
class _Columns:
    """Which columns of a file are read, and what a row must hold to count."""

    image: str
    captions: list[str]
    label: str | None
    conditions: dict[str, Any]


def holds_images(table: Path) -> bool:
    """Whether a parquet file has images, and is not only what img2dataset notes of the images
    beside it.
    """
    import pyarrow

    schema = _schema(table)
    image = usual(schema.names, IMAGE_COLUMNS)
    return bool(image) and not pyarrow.types.is_string(schema.field(image).type)


def stores_bytes(table: Path) -> bool:
    """Whether a parquet file holds pictures, or has columns made for them, at any depth."""
    import pyarrow

    def has_bytes(kind: Any) -> bool:
        inner = [kind.field(i).type for i in range(kind.num_fields)]
        is_binary = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
        return is_binary or any(has_bytes(part) for part in inner)

    return any(has_bytes(column.type) for column in _schema(table))


def rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file whose cells hold pictures: as a `Picture`, or by their names."""
    content, _ = _read(file)
    opened = []
    for number, row in enumerate(content.to_pylist()):
        place = f"{file}:{number}"
        opened.append({name: _opened(cell, f"{place}:{name}") for name, cell in row.items()})
    return opened


def _opened(cell: Any, place: str) -> Any:
    """A cell with its bytes as pictures; of several the place says which."""
    if isinstance(cell, list):
        return [_opened(part, f"{place}:{number}") for number, part in enumerate(cell)]
    if isinstance(cell, bytes):
        return Picture(place, data=cell)
    if isinstance(cell, dict) and cell.keys() == {"bytes", "path"}:
        return Picture(place, data=cell["bytes"]) if cell["bytes"] else image_name(cell)
    return cell


def from_parquet(
    root: Path,
    files: list[Path],
    split: str,
    options: TableOptions,
    images: str | None = None,  # where the images are that rows only name
    missing: str = "error",
) -> Source:
    """Images inside parquet files, as the hub's data sets hold them, or named by them."""
    if options.rows:
        raise DataError(
            f"rows={options.rows} chooses among the rows of one table, and {root} holds parquet "
            "files with their images; leave it out"
        )

    records: list[Record] = []
    absent: list[str] = []
    class_names = None
    collection = Collection(images) if images is not None else None
    for file in files:
        content, features = _read(file)
        columns = _columns(content.column_names, file, split, options)

        # The files of a set share their features; the first that notes names decides.
        if columns.label is not None:
            class_names = class_names or features.get(columns.label, {}).get("names")
        records += _records(file, content, columns, collection, absent)

    if collection is not None:
        refuse_missing(absent, len(records) + len(absent), collection, missing)
    multilabel = any(isinstance(record.label, tuple) for record in records)
    return Source(str(root), records, classes=class_names, multilabel=multilabel, skipped=absent)


def _read(file: Path) -> tuple[Any, dict[str, Any]]:
    """A parquet file's table, and what `datasets` notes about its columns."""
    from pyarrow import parquet

    with _whole(file):
        content = parquet.read_table(file)

    # `datasets` writes its features, class names among them, into the file's metadata.
    noted = json.loads((content.schema.metadata or {}).get(b"huggingface", b"{}"))
    return content, noted.get("info", {}).get("features", {})


def _schema(file: Path) -> Any:
    """The columns of a parquet file and their types."""
    from pyarrow import parquet

    with _whole(file):
        return parquet.read_schema(file)


@contextmanager
def _whole(file: Path) -> Iterator[None]:
    """Raise DataError where pyarrow cannot read the file."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        raise DataError(
            f"{file} is no whole parquet file ({str(error)[:120]}); fetch it again"
        ) from None


def _columns(names: list[str], file: Path, split: str, options: TableOptions) -> _Columns:
    """The columns that the options name, else those of the usual names."""
    try:
        image = usual(names, IMAGE_COLUMNS)
        label = usual(names, NUMBERS) or usual(names, CLASS_COLUMNS)
        if options.image_column:
            image = column(names, options.image_column, file)
        captions = [column(names, name, file) for name in options.named_captions]
        if options.class_column:
            label = column(names, options.class_column, file)
        conditions = {column(names, name, file): value for name, value in options.where.items()}
    except ValueError as error:
        raise DataError(str(error)) from None

    if not image:
        raise DataError(
            f"{file} has no column of images, only {listed(names)}; name it: image_column=NAME"
        )

    # One file may hold all splits, told apart by a column.
    if split_column(names):
        conditions.setdefault(split_column(names), split)
    return _Columns(image, captions or usual_captions(names), label, conditions)


def _records(
    file: Path,
    content: Any,
    columns: _Columns,
    collection: Collection | None,
    absent: list[str],  # takes the names of images that are not there
) -> Iterator[Record]:
    """The rows of one file that belong to the split, as records; a DataError names a row."""
    for i, row in enumerate(content.to_pylist()):
        # Rows of another split, or that the options leave out.
        if not all(equals(row[name], value) for name, value in columns.conditions.items()):
            continue

        picture = picture_in(row[columns.image], f"{file}:{i}", collection)
        if picture is None:
            absent.append(str(image_name(row[columns.image])))
            continue

        captions: list[str] = []
        try:
            for name in columns.captions:
                captions += texts_of(row[name])
        except NoText as error:
            raise DataError(f"{file}: row {i}: {error}") from None

        # Several labels come as a list.
        label = row[columns.label] if columns.label else None
        number = tuple(label) if isinstance(label, list) else label
        meta = {name: value for name, value in row.items() if name != columns.image}
        yield Record(picture, tuple(captions), number, meta)


def image_name(stored: Any) -> str | None:
    """The name in a column of images: as it stands, or as `datasets` keeps it beside bytes."""
    name = stored.get("path") if isinstance(stored, dict) else stored
    return name if isinstance(name, str) and name else None


def picture_in(stored: Any, place: str, collection: Collection | None) -> Picture | None:
    """The picture that a row holds or names; None for a name that is not in the collection.

    place: file and row, for messages. Raises DataError for a row with neither bytes nor, where
    there is a collection, a name.
    """
    data = stored.get("bytes") if isinstance(stored, dict) else stored
    if isinstance(data, bytes) and data:
        return Picture(place, data=data)

    name = image_name(stored)
    if name is None:
        raise DataError(
            f"{place}: the row holds no image bytes and no image's name; fetch the set "
            "again with its images embedded"
        )
    if collection is None:
        raise DataError(
            f"{place}: the row holds no image bytes but a name, {name!r}; say where the images "
            "are: images=FOLDER, or fetch the set with its images embedded"
        )
    return collection.find(name)
