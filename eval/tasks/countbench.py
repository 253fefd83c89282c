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
from typing import Any, Literal

import torch

from vlp.eval import choices, embed, metrics
from vlp.eval.datasets.tables import beside, read_rows
from vlp.eval.pictures import DataError, Picture
from vlp.eval.tasks import TaskResult

VERSION = 1
KNOWN_AS = "countbench"
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Options:
    """Where the benchmark is."""

    data: str  # folder of parquet files, or a table (.json, .jsonl, .csv, …)
    images: str | None = None  # for a table: a folder or a .tar; None: beside it
    missing: Literal["error", "skip"] = "error"  # rows without their picture


@dataclass
class Data:
    """Pictures, each with its nine captions and its number (2 … 10)."""

    pictures: list[Picture]
    captions: list[list[str]]
    numbers: list[int]
    skipped: list[str]


def read(options: Options) -> Data:
    path = Path(options.data)
    if path.is_dir():
        rows, absent = _parquet(path), []
    else:
        rows = read_rows(path, ("image", "text"))
        choices.need_keys(rows, ("image", "text", "number"), path)
        images = Path(options.images) if options.images else beside(path)
        rows, absent = choices.attach(rows, [row["image"] for row in rows], images, options.missing)
    wrong = [
        row["text"]
        for row in rows
        if row["number"] not in range(2, 11) or not _pattern(row["number"]).search(row["text"])
    ]
    if wrong:
        raise DataError(
            f"{path}: {len(wrong)} captions do not say their number as a word, e.g. {wrong[0]!r}"
        )
    captions = [[say(row["text"], row["number"], other) for other in range(2, 11)] for row in rows]
    return Data([row["picture"] for row in rows], captions, [row["number"] for row in rows], absent)


def _parquet(folder: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as parquet

    rows = [
        row | {"file": str(file)}
        for file in sorted(folder.rglob("*.parquet"))
        for row in parquet.read_table(file).to_pylist()
    ]
    if not rows:
        raise DataError(f"no .parquet file under {folder}")
    choices.need_keys(rows, ("image", "text", "number"), folder)
    present = [row for row in rows if row["image"] and row["image"]["bytes"]]
    if len(present) < len(rows):
        raise DataError(
            f"{len(rows) - len(present)} of {len(rows)} rows under {folder} hold no image bytes; fetch the full set"
        )
    return [
        row | {"picture": Picture(f"{row['file']}:{i}", data=row["image"]["bytes"])}
        for i, row in enumerate(rows)
    ]


def _pattern(number: int) -> re.Pattern[str]:
    return re.compile(
        rf"\b{NUMBERS[number - 2]}\b", re.IGNORECASE
    )  # whole words only: "often" contains "ten"


def say(caption: str, number: int, other: int) -> str:
    """The caption with every mention of `number` replaced by `other`, in the same letter case."""

    def word(found: re.Match[str]) -> str:
        new = NUMBERS[other - 2]
        return (
            new.upper()
            if found[0].isupper()
            else new.capitalize()
            if found[0][0].isupper()
            else new
        )

    return _pattern(number).sub(word, caption)


def run(encoder: Any, data: Data, options: Options, context: embed.Context) -> TaskResult:
    scores = torch.stack(choices.cosines(encoder, data.pictures, data.captions, context))  # [n, 9]
    true = torch.tensor(data.numbers)
    own = scores.gather(1, true[:, None] - 2)
    others = torch.ones_like(scores, dtype=torch.bool).scatter_(1, true[:, None] - 2, False)
    hits = (metrics.strictly_above(own, scores) | ~others).all(1)
    rivals = scores.masked_fill(~others, -torch.inf).argmax(1) + 2
    distance = torch.where(hits, 0, (rivals - true).abs())
    return TaskResult(
        "countbench",
        items={"acc": choices.accuracy(hits), "mean_distance": choices.accuracy(distance)},
        chance={"acc": 1 / len(NUMBERS)},
        counts={"images": len(true), "skipped": len(data.skipped)},
        digest=context.digest(data.pictures, data.captions, data.numbers),
    )
