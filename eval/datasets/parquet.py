"""Evaluation sets of the hub: images inside parquet files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlp.data.tables import TableOptions
from vlp.data.tables.columns import (
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
from vlp.eval.pictures import DataError, Picture

NUMBERS = (
    "label",
    "fine_label",
    "labels",
    "cls",
)  # columns of class numbers in the hub's data sets


def holds_images(table: Path) -> bool:
    """Whether a parquet file has images, and is not only what img2dataset notes of the images
    beside it.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    schema = parquet.read_schema(table)
    image = usual(schema.names, IMAGE_COLUMNS)
    return bool(image) and not pyarrow.types.is_string(schema.field(image).type)


def from_parquet(root: Path, files: list[Path], split: str, options: TableOptions) -> Source:
    """Images inside parquet files, as the hub's data sets hold them."""
    records: list[Record] = []
    class_names = None
    for file in files:
        content, features = _parquet_rows(file)
        columns = content.column_names
        try:
            image = (
                column(columns, options.image_column, file)
                if options.image_column
                else usual(columns, IMAGE_COLUMNS)
            )
            captions = [
                column(columns, name, file) for name in options.named_captions
            ] or usual_captions(columns)
            label = (
                column(columns, options.class_column, file)
                if options.class_column
                else usual(columns, NUMBERS)
            )
            conditions = {
                column(columns, name, file): value for name, value in options.where.items()
            }
        except ValueError as error:
            raise DataError(str(error)) from None
        if not image:
            raise DataError(
                f"{file} has no column of images, only {listed(columns)}; name it: image_column=NAME"
            )
        if split_column(columns):
            conditions.setdefault(split_column(columns), split)
        class_names = class_names or features.get(label, {}).get("names")
        for i, row in enumerate(content.to_pylist()):
            if not all(equals(row[name], value) for name, value in conditions.items()):
                continue
            value = row[label] if label else None
            data = row[image].get("bytes") if isinstance(row[image], dict) else row[image]
            if not data or isinstance(data, str):
                raise DataError(
                    f"{file}: row {i} holds no image bytes in {image!r}; download the data set with its images embedded, or "
                    "give this file itself as data= if it names image files"
                )
            found: list[str] = []
            try:
                for name in captions:
                    found += texts_of(row[name])
            except NoText as error:
                raise DataError(f"{file}: row {i}: {error}") from None
            number = tuple(value) if isinstance(value, list) else value
            records.append(Record(Picture(f"{file}:{i}", data=data), tuple(found), number))
    multilabel = any(isinstance(record.label, tuple) for record in records)
    return Source(str(root), records, classes=class_names, multilabel=multilabel)


def _parquet_rows(file: Path) -> tuple[Any, dict[str, Any]]:
    """A parquet file's table, and what `datasets` notes about its columns."""
    from pyarrow import ArrowException, parquet

    try:
        content = parquet.read_table(file)
    except (ArrowException, OSError) as error:
        raise DataError(
            f"{file} is no whole parquet file ({str(error)[:120]}); fetch it again"
        ) from None
    noted = json.loads((content.schema.metadata or {}).get(b"huggingface", b"{}"))
    return content, noted.get("info", {}).get("features", {})
