"""Any choices between pictures and texts, from a table that anybody can write.

A row of the table (.jsonl, .csv, .parquet, …) is an item:

    image, or images, or image_1, image_2, …   names of its pictures
    texts, or text_1, text_2, …                its texts
    right    which texts are right: a number for a single picture, from 0 (left out: 0); a list of
             numbers if several are; for several pictures a list for each (left out: the first text
             is right for the first picture, the second for the second, …)
    group    what it tests; left out: nothing

Reported are `acc`, of several pictures also `text_acc` (each picture chooses its texts) and
`image_acc` (each text its pictures), and the accuracy of every group and their mean. Ties are
wrong; chance is computed from the shape of every item (vlp.eval.grids).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from vlp.eval import choices, grids
from vlp.eval.datasets.tables import beside, read_rows
from vlp.eval.embed import Context
from vlp.eval.grids import Grid, GridSet, Right
from vlp.eval.models import Encoder
from vlp.eval.pictures import Collection, DataError, refuse_missing
from vlp.eval.tasks import TaskResult

VERSION = 1
KNOWN_AS = "image_caption_selection"
MAIN = "acc"


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the table and the images are, and how several right ones count."""

    data: str  # a table of any kind
    # of several right texts: every one must be above every wrong one, or one of them
    right: Literal["all", "any"] = "all"


def read(options: Options) -> GridSet:
    """The items whose pictures are all there."""
    path = Path(options.data)
    if not path.is_file():
        raise DataError(f"no table at {path}; expected a file such as choices.jsonl")

    collection = Collection(options.images or beside(path))
    rows = read_rows(path)
    grids_of_rows, absent = [], []
    for number, row in enumerate(rows, 1):
        place = f"{path}, item {number}"
        names = _listed(row, "image", "images", place)
        texts = _listed(row, "text", "texts", place)
        right = _right(row.get("right"), len(names), len(texts), place)

        pictures = [collection.find(name) for name in names]
        absent += [name for name, picture in zip(names, pictures) if picture is None]
        present = [picture for picture in pictures if picture is not None]
        if len(present) == len(names):
            group = "" if row.get("group") is None else str(row["group"])
            grids_of_rows.append(Grid(tuple(present), tuple(texts), right, group))

    n_named = len(absent) + sum(len(grid.pictures) for grid in grids_of_rows)
    refuse_missing(absent, n_named, collection, options.missing)
    return GridSet(grids_of_rows, absent, path.stem)


def _listed(row: dict[str, Any], one: str, several: str, place: str) -> list[str]:
    """The values of `several` (a list), of one_1, one_2, …, or of `one`, as texts."""
    values: Any = row.get(several)
    if isinstance(values, str):
        values = _json(values, several, place)
    if values is None:
        numbered = [f"{one}_{number}" for number in range(1, len(row) + 1)]
        values = [row[name] for name in numbered if row.get(name) is not None]
    if not values and row.get(one) is not None:
        values = [row[one]]

    if not isinstance(values, list) or not values:
        raise DataError(
            f"{place}: found {', '.join(row)}, expected {several} (a list), {one}_1, {one}_2, … or "
            f"{one}"
        )
    # A table may have read a name or a text such as "12" as a number.
    return [str(value) for value in values]


def _right(value: Any, n_pictures: int, n_texts: int, place: str) -> Right:
    """The right texts of each picture, checked to be there."""
    if isinstance(value, str):
        value = _json(value, "right", place)
    if value is None:
        value = [[number] for number in range(n_pictures)]
    elif type(value) is int:
        value = [[value]]
    elif isinstance(value, list) and all(type(number) is int for number in value):
        value = [value] if n_pictures == 1 else [[number] for number in value]

    # Every picture needs its list, and every number a text.
    is_nested = isinstance(value, list) and all(isinstance(numbers, list) for numbers in value)
    if is_nested and len(value) == n_pictures:
        numbers = list(chain.from_iterable(value))
        if numbers and all(type(n) is int and 0 <= n < n_texts for n in numbers):
            return tuple(tuple(sorted(set(of_picture))) for of_picture in value)
    raise DataError(
        f"{place}: right is {value!r}; expected for {n_pictures} pictures and {n_texts} texts the "
        f"numbers of the right texts, from 0 to {n_texts - 1}, a list for each picture"
    )


def _json(text: str, name: str, place: str) -> Any:
    """A list that a CSV has to write as a text."""
    try:
        return json.loads(text)
    except ValueError:
        raise DataError(f"{place}: {name} is {text[:60]!r}, which is no JSON list") from None


def scores(options: Options) -> list[str]:
    """The accuracies, and of several groups those of each and their mean."""
    groups = sorted({grid.group for grid in read(options).grids})
    return ["text_acc", "image_acc", "acc", *([*groups, "mean"] if len(groups) > 1 else [])]


def run(encoder: Encoder, data: GridSet, options: Options, context: Context) -> TaskResult:
    """Accuracies over the items and of each group."""
    return grids.run(data.name, encoder, data, context, options.right)
