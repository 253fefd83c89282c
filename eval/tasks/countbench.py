"""CountBench (Paiss et al. 2023): how many objects are there, two to ten.

For each picture its caption is said with each of the nine numbers in place of its own; the true one
must score strictly highest. Reported: accuracy, and the mean distance between the number chosen and
the true one. Rows have `text, number` and the picture in `image`, inside or by its name: the hub's
parquet files, a table, or shards (vlp.eval.datasets.annotated). The published CountBench.json has
only `image_url`: fetch the pictures and add their names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlp.eval import choices, grids
from vlp.eval.datasets import annotated
from vlp.eval.embed import Context
from vlp.eval.grids import Grid, GridSet
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult

VERSION = 2  # 1 tied what a nearly collapsed model tells apart
KNOWN_AS = "countbench"
MAIN = "acc"
SCORES = ("acc", "mean_distance")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
KEYS = ("image", "text", "number")


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the benchmark is."""

    data: str  # folder of parquet files or shards, or a table (.json, .jsonl, .csv, …)


def read(options: Options) -> GridSet:
    """Each picture with its caption in all nine numbers, the true one by its place."""
    path = Path(options.data)
    source = annotated.read(path, ("image", "text"), options.missing)
    choices.need_keys(source.rows, KEYS, path)

    wrong = [row["text"] for row in source.rows if not _says_its_number(row)]
    if wrong:
        raise DataError(
            f"{path}: {len(wrong)} captions do not say their number as a word, e.g. {wrong[0]!r}"
        )

    images = options.images or source.beside
    kept_rows, absent = choices.with_pictures(source.rows, ["image"], images, options.missing)
    grids_of_rows = []
    for row, (picture,) in kept_rows:
        number = int(row["number"])
        captions = tuple(say(row["text"], number, other) for other in range(2, 11))
        grids_of_rows.append(Grid((picture,), captions, ((number - 2,),)))
    return GridSet(grids_of_rows, source.skipped + absent, "countbench")


def _says_its_number(row: dict[str, Any]) -> bool:
    """Whether a caption holds the word of its number, from two to ten."""
    in_range = row["number"] in range(2, 11)
    return in_range and bool(_pattern(int(row["number"])).search(str(row["text"])))


def _pattern(number: int) -> re.Pattern[str]:
    """A number's word, whole and in any case."""
    # Whole words only: "often" contains "ten".
    return re.compile(rf"\b{NUMBERS[number - 2]}\b", re.IGNORECASE)


def say(caption: str, number: int, other: int) -> str:
    """The caption with every mention of `number` replaced by `other`, in the same letter case."""

    def in_its_case(match: re.Match[str]) -> str:
        word = NUMBERS[other - 2]
        if match[0].isupper():
            return word.upper()
        return word.capitalize() if match[0][0].isupper() else word

    return _pattern(number).sub(in_its_case, caption)


def run(encoder: Encoder, data: GridSet, options: Options, context: Context) -> TaskResult:
    """Accuracy, and how far the number chosen lies from the true one."""
    cosines = grids.cosines(encoder, data.grids, context)
    hits = grids.hits(cosines, data.grids, "all")["acc"]
    distance = _distance(torch.cat(cosines), data, hits)

    pictures = [grid.pictures[0] for grid in data.grids]
    captions = [list(grid.texts) for grid in data.grids]
    numbers = [grid.right[0][0] + 2 for grid in data.grids]
    return TaskResult(
        "countbench",
        items={"acc": choices.accuracy(hits), "mean_distance": choices.accuracy(distance)},
        chance={"acc": 1 / len(NUMBERS)},
        counts={"images": len(data.grids), "skipped": len(data.skipped)},
        digest=context.digest(pictures, captions, numbers),
    )


def _distance(
    scores: Tensor,  # [n, 9]
    data: GridSet,
    hits: Tensor,  # [n]
) -> Tensor:
    """[n] between the place of the number chosen and that of the true one."""
    # A tie is no hit, so the number chosen is the best of the others and not the argmax of all.
    true_places = torch.tensor([grid.right[0][0] for grid in data.grids])
    is_true = torch.nn.functional.one_hot(true_places, len(NUMBERS)).bool()
    chosen = scores.masked_fill(is_true, -torch.inf).argmax(1)
    return torch.where(hits.bool(), 0, (chosen - true_places).abs())
