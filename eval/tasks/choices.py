"""Any choices between pictures and texts, from a table that anybody can write.

A row of the table (.jsonl, .csv, .parquet, …), or the JSON of a sample of shards, is an item:

    image, or images, or image_1, image_2, …   its pictures, by name or inside (parquet, shards)
    texts, or text_1, text_2, …                its texts
    right    which texts are right: a number for a single picture, from 0 (left out: 0); a list of
             numbers if several are; for several pictures a list for each (left out: the first text
             is right for the first picture, the second for the second, …)
    group    what it tests; left out: nothing

Reported are `acc`, of several pictures also `text_acc` (each picture chooses its texts) and
`image_acc` (each text its pictures), and the accuracy of every group and their mean; a group that
is called as one of these scores, or not at all, is reported as `group:NAME`. Ties are wrong; chance
is computed from the shape of every item (vlp.eval.grids), and averaged as its score is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from vlp.eval import choices, grids
from vlp.eval.datasets import annotated
from vlp.eval.datasets.annotated import Wanted
from vlp.eval.embed import Context
from vlp.eval.grids import Grid, GridSet, Right
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult

VERSION = 2  # 1 let groups called mean or acc write over those scores
KNOWN_AS = "image_caption_selection"
MAIN = "acc"


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the table and the images are, and how several right ones count."""

    data: str  # a table of any kind, or parquet files or shards with the pictures inside
    # of several right texts: every one must be above every wrong one, or one of them
    right: Literal["all", "any"] = "all"


def read(options: Options) -> GridSet:
    """The items whose pictures are all there."""
    path = Path(options.data)
    source = annotated.read(path, missing=options.missing)
    wanted = Wanted(options.images or source.beside)
    grids_of_rows = []
    for number, row in enumerate(source.rows, 1):
        place = f"{path}, item {number}"
        cells = _listed(row, "image", "images", place)
        # A table may have read a text such as "12" as a number.
        texts = tuple(str(text) for text in _listed(row, "text", "texts", place))
        right = _right(row.get("right"), len(cells), len(texts), place)

        sought = [wanted.find(cell) for cell in cells]
        present = tuple(picture for picture in sought if picture is not None)
        if len(present) == len(cells):
            group = "" if row.get("group") is None else str(row["group"])
            grids_of_rows.append(Grid(present, texts, right, group))

    wanted.refuse_missing(options.missing)
    return GridSet(grids_of_rows, source.skipped + wanted.absent, path.stem)


def _listed(row: dict[str, Any], one: str, several: str, place: str) -> list[Any]:
    """The values of `several` (a list), of one_1, one_2, …, or of `one`."""
    values: Any = row.get(several)
    if isinstance(values, str):
        values = _json(values, several, place)
    if values is None:
        numbered = [f"{one}_{number}" for number in range(1, len(row) + 1)]
        values = [row[name] for name in numbered if row.get(name) is not None]
    if not values and row.get(one) is not None:
        values = [row[one]]

    # A text that is no text would be read as "None" or "['a']".
    is_listed = isinstance(values, list) and len(values) > 0
    if not is_listed or any(value is None or isinstance(value, list) for value in values):
        raise DataError(
            f"{place}: found {', '.join(row)}, expected {several} (a list), {one}_1, {one}_2, … or "
            f"{one}"
        )
    return values


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


def run(encoder: Encoder, data: GridSet, options: Options, context: Context) -> TaskResult:
    """Accuracies over the items and of each group."""
    return grids.run(data.name, encoder, data, context, options.right)
