"""CountBench (Paiss et al. 2023): how many objects are there, two to ten.

For each picture its caption is said with each of the nine numbers in place of its own; the true one
must score strictly highest. Reported: accuracy, and the mean distance between the number chosen and
the true one. Reads a Hugging Face parquet folder (`image, text, number`), or a table of rows with
`text, number` and the image's name in `image` (the published CountBench.json has only `image_url`:
fetch the pictures and add their names).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlp.eval import choices, metrics
from vlp.eval.datasets.tables import beside, read_rows
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError, Picture
from vlp.eval.tasks import TaskResult

VERSION = 2  # 1 tied what a nearly collapsed model tells apart
KNOWN_AS = "countbench"
MAIN = "acc"
SCORES = ("acc", "mean_distance")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
KEYS = ("image", "text", "number")
RowsWithPictures = list[tuple[dict[str, Any], Picture]]


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the benchmark is."""

    data: str  # folder of parquet files, or a table (.json, .jsonl, .csv, …)


@dataclass
class Data:
    """Pictures, each with its nine captions and its number (2 … 10)."""

    pictures: list[Picture]
    captions: list[list[str]]
    numbers: list[int]
    skipped: list[str]


def read(options: Options) -> Data:
    """Pictures with their captions in all nine numbers."""
    path = Path(options.data)
    if path.is_dir():
        rows, absent = _parquet(path), list[str]()
    else:
        rows, absent = _table(path, options)

    wrong = [row["text"] for row, _ in rows if not _says_its_number(row)]
    if wrong:
        raise DataError(
            f"{path}: {len(wrong)} captions do not say their number as a word, e.g. {wrong[0]!r}"
        )

    # Each caption in all nine numbers.
    captions = []
    for row, _ in rows:
        captions.append([say(row["text"], row["number"], other) for other in range(2, 11)])

    pictures = [picture for _, picture in rows]
    numbers = [row["number"] for row, _ in rows]
    return Data(pictures, captions, numbers, absent)


def _table(path: Path, options: Options) -> tuple[RowsWithPictures, list[str]]:
    """The rows of a table whose pictures are there, and the names of the absent."""
    rows = read_rows(path, ("image", "text"))
    choices.need_keys(rows, KEYS, path)
    images = options.images or beside(path)
    kept_rows, absent = choices.with_pictures(rows, ["image"], images, options.missing)
    return [(row, picture) for row, (picture,) in kept_rows], absent


def _parquet(folder: Path) -> RowsWithPictures:
    """The rows of the hub's files, each with its picture."""
    import pyarrow.parquet as parquet

    rows: list[dict[str, Any]] = []
    for file in sorted(folder.rglob("*.parquet")):
        rows += [row | {"file": str(file)} for row in parquet.read_table(file).to_pylist()]
    if not rows:
        raise DataError(f"no .parquet file under {folder}")

    choices.need_keys(rows, KEYS, folder)

    # Rows without their picture would shrink the benchmark unnoticed.
    present = [row for row in rows if row["image"] and row["image"]["bytes"]]
    if len(present) < len(rows):
        raise DataError(
            f"{len(rows) - len(present)} of {len(rows)} rows under {folder} hold no image bytes; "
            "fetch the full set"
        )
    return [
        (row, Picture(f"{row['file']}:{i}", data=row["image"]["bytes"]))
        for i, row in enumerate(rows)
    ]


def _says_its_number(row: dict[str, Any]) -> bool:
    """Whether a caption holds the word of its number, from two to ten."""
    in_range = row["number"] in range(2, 11)
    return in_range and bool(_pattern(row["number"]).search(row["text"]))


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


def run(encoder: Encoder, data: Data, options: Options, context: Context) -> TaskResult:
    """Accuracy, and how far the number chosen lies from the true one."""
    cosines = choices.cosines(encoder, data.pictures, data.captions, context)
    scores = torch.stack(cosines)  # [n, 9]
    true_numbers = torch.tensor(data.numbers)
    true_places = true_numbers[:, None] - 2

    # The true number stands at its own place among the nine, so every other one is a rival.
    true_scores = scores.gather(1, true_places)
    is_rival = torch.ones_like(scores, dtype=torch.bool).scatter_(1, true_places, False)
    tie = metrics.tie_of_groups(cosines)
    hits = (metrics.strictly_above(true_scores, scores, tie) | ~is_rival).all(1)

    # A tie is no hit, so the number chosen is the best of the others and not the argmax of all.
    best_rivals = scores.masked_fill(~is_rival, -torch.inf).argmax(1) + 2
    distance = torch.where(hits, 0, (best_rivals - true_numbers).abs())
    return TaskResult(
        "countbench",
        items={"acc": choices.accuracy(hits), "mean_distance": choices.accuracy(distance)},
        chance={"acc": 1 / len(NUMBERS)},
        counts={"images": len(true_numbers), "skipped": len(data.skipped)},
        digest=context.digest(data.pictures, data.captions, data.numbers),
    )
