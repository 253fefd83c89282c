"""Caption tables (CSV, TSV, JSON lines, JSON, parquet) as items: one image each, with all its captions and other columns."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlp.schema import did_you_mean

IMAGE_COLUMNS = ("image", "file_name", "filepath", "filename", "path")  # looked for, in this order, where none is named
CAPTION_COLUMNS = ("captions", "caption", "text", "title", "sentence")
CLASS_COLUMNS = ("class",)


@dataclass
class Item:
    """One image of a table. Rows that name the same image are one item: their captions follow one another."""

    image: str  # the name as the table gives it
    row: int  # line of the (first) row, counted from 1 with any header
    captions: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)  # the first row's other columns; "class" if there is one

    @property
    def class_name(self) -> str | None:
        return self.meta.get("class")


@dataclass(frozen=True)
class Columns:
    """Which columns hold what. Empty: the first usual name that the table has."""

    image: str = ""
    captions: tuple[str, ...] = ()
    class_name: str = ""

    def found(self, names: list[str], table: Path) -> Columns:
        """The same with every choice made, against the columns that exist; raises ValueError."""
        for name in filter(None, (self.image, *self.captions, self.class_name)):
            if name not in names:
                raise ValueError(f"{table} has no column {name!r}{did_you_mean(name, names)}")
        image = self.image or next((n for n in IMAGE_COLUMNS if n in names), "")
        if not image:
            raise ValueError(f"{table} has none of the columns {', '.join(IMAGE_COLUMNS)}; name the one with image names")
        captions = self.captions or tuple(n for n in CAPTION_COLUMNS if n in names)[:1]
        return Columns(image, captions, self.class_name or next((n for n in CLASS_COLUMNS if n in names), ""))


def items(table: str | Path, columns: Columns, where: dict[str, str] | None = None) -> tuple[list[Item], list[str]]:
    """The images of a table that fulfil `where` (column = value, as text), and the names of all classes in it, sorted.

    Classes are taken from all rows, so that the parts of a data set number them alike. Raises ValueError, OSError.
    """
    table, result, classes = Path(table), {}, set()
    chosen: Columns | None = None
    for number, row in rows(table):
        if chosen is None:
            chosen = columns.found(list(row), table)
            for name in where or {}:
                if name not in row:
                    raise ValueError(f"{table} has no column {name!r}{did_you_mean(name, row)}")
        name = row.get(chosen.image)
        if not isinstance(name, str) or not name:
            raise ValueError(f"{table}:{number}: image is {name!r}; expected a name")
        label = row.get(chosen.class_name) if chosen.class_name else None
        if label is not None:
            classes.add(str(label))
        if any(_text(row.get(column)) != value for column, value in (where or {}).items()):
            continue
        if name not in result:
            skipped = {chosen.class_name, *chosen.captions}
            result[name] = Item(name, number, [], {k: v for k, v in row.items() if k not in skipped and v is not None})
            if label is not None:
                result[name].meta["class"] = str(label)
        for column in chosen.captions:
            result[name].captions += _captions(row.get(column), f"{table}:{number}: {column}")
    if chosen is None:
        raise ValueError(f"{table} has no rows")
    return list(result.values()), sorted(classes)


def rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its line number; raises ValueError for another kind of file or a broken line."""
    kind = table.suffix.lower()
    if kind in (".csv", ".tsv"):
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{table}:{reader.line_num}: found another number of fields than in the header")
                yield reader.line_num, row
    elif kind in (".jsonl", ".ndjson", ".json"):
        text = table.read_text(encoding="utf-8-sig")
        for number, line in [(1, text)] if kind == ".json" else enumerate(text.split("\n"), 1):
            if line.strip():
                yield from ((number, row) for row in _json_rows(line, f"{table}:{number}"))
    elif kind == ".parquet":
        from pyarrow import parquet

        number = 0
        for batch in parquet.ParquetFile(table).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, {key: _jsonable(value) for key, value in row.items()}
    else:
        raise ValueError(f"{table}: a table ends in .csv, .tsv, .jsonl, .json or .parquet, not {kind or 'nothing'!r}")


def _json_rows(text: str, place: str) -> list[dict[str, Any]]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON: {error}") from None
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{place}: found something that is not a mapping of columns to values")
    return found


def _jsonable(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray)):
        raise ValueError("the table holds bytes in a column; expected names of image files and texts")
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)  # dates, decimals


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _captions(value: Any, place: str) -> list[str]:
    if value is None:
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{place}: found {value!r}, expected a text or a list of texts")
    return [text.strip() for text in texts if text.strip()]
