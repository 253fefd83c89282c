"""Evaluation sets that a table lists, with their images in files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlp.data import tables
from vlp.data.listing import settle
from vlp.data.tables import Listing, TableOptions
from vlp.data.tables.values import shown
from vlp.eval.datasets.source import Record, Source
from vlp.eval.pictures import Collection, DataError, picture_of, refuse_missing


def read_rows(path: Path, texts: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a table of any kind; the columns `texts` stay as written. A DataError names the
    line that is wrong.
    """
    try:
        table = tables.read(path)
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from None
    if table.problems:
        raise DataError(table.problems[0])
    return table.records(texts)


def read_json(path: Path) -> Any:
    """A JSON file; a DataError says what is missing or broken."""
    try:
        return tables.read_json(path)
    except FileNotFoundError:
        raise DataError(
            f"no annotations at {path}; fetch the published files and give their folder as data="
        ) from None
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from None


def need_keys(rows: Sequence[dict[str, Any]], keys: Sequence[str], path: object) -> None:
    """Raise DataError unless every row has the keys."""
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: item {i} is {str(row)[:60]!r}, expected a mapping with {', '.join(keys)}"
            )
        missing_keys = [key for key in keys if key not in row]
        if missing_keys:
            raise DataError(
                f"{path}: item {i} lacks {', '.join(missing_keys)} (it has {', '.join(row)}); "
                "is this the published file?"
            )


def beside(table: Path) -> Path:
    """Where a table's images are unless said otherwise: the .tar of the same name, else the table's
    folder.
    """
    tar = table.with_suffix(".tar")
    return tar if tar.exists() else table.parent


def from_table(
    path: Path, images: str | None, split: str, missing: str, options: TableOptions
) -> Source:
    """The rows of a split as an evaluation set."""
    listing = read_items(path, split, missing, options)
    return with_pictures(path, listing, Collection(images or beside(path)), missing)


def read_items(path: Path, split: str, missing: str, options: TableOptions) -> Listing:
    """The rows of a split, an item an image; a DataError names rows that cannot be used."""
    try:
        listing = tables.items(path, options, split)
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from None
    _refuse_rows(listing.problems, missing)
    return listing


def with_pictures(path: Path, listing: Listing, collection: Collection, missing: str) -> Source:
    """The items of a table with their pictures, as an evaluation set."""
    # First that every image is there, then which rows name one image.
    archive = collection.archive
    named = [(item, archive.find(item.image)) for item in listing.items]
    absent = [item.image for item, name in named if name is None]
    refuse_missing(absent, len(listing.items), collection, missing)

    # Rows of one image become one item, unless they contradict each other.
    settled, clashes = settle([(item, name) for item, name in named if name], archive)
    _refuse_rows(clashes, missing)

    labels = _labels([item.label for item, _ in settled])
    records = [
        Record(picture_of(archive, name), tuple(item.captions), label, item.meta)
        for (item, name), label in zip(settled, labels)
    ]
    return Source(str(path), records, skipped=listing.problems + absent + clashes)


def _refuse_rows(problems: list[str], missing: str) -> None:
    """Raise for rows that cannot be used, unless they may be left out."""
    if problems and missing == "error":
        some = "\n  ".join(problems[:10])
        raise DataError(
            f"{len(problems)} rows cannot be used; mend them, or pass missing=skip to evaluate "
            f"without them (the score is then not comparable):\n  {some}"
        )


def _labels(values: list[Any]) -> list[int | str | None]:
    """Class numbers where all classes are whole numbers, else class names."""
    # A whole number may have been read as a float: 3.0 is class 3.
    numbers = [
        int(value) if isinstance(value, float) and value.is_integer() else value for value in values
    ]
    if all(value is None or type(value) is int for value in numbers):
        return numbers
    return [None if value is None else shown(value) for value in values]
