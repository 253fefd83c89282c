"""Winoground (Thrush et al. 2022): two pictures, two captions of the same words; which belongs to
which.

text: each picture scores higher with its own caption; image: each caption scores higher with its
own picture; group: both; all strictly. Reads examples.jsonl (`image_0, image_1, caption_0,
caption_1`) as the hub's repository has it, with the unpacked images, or parquet files with the
images inside. Scores are named as in clip_benchmark: text_acc, image_acc, acc (the group score).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlp.eval import choices, grids
from vlp.eval.datasets import annotated
from vlp.eval.embed import Context
from vlp.eval.grids import GridSet, matched
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult

VERSION = 2  # 1 tied what a nearly collapsed model tells apart
KNOWN_AS = "image_caption_selection"
MAIN = "acc"
SCORES = ("text_acc", "image_acc", "acc")
IMAGES = ("image_0", "image_1")
CAPTIONS = ("caption_0", "caption_1")


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the examples and the images are."""

    data: str  # folder with examples.jsonl or parquet files, or a file of either kind


def read(options: Options) -> GridSet:
    """The examples whose two images are there."""
    path = _examples(Path(options.data))
    keys = (*IMAGES, *CAPTIONS)
    source = annotated.read(path, keys, options.missing)
    choices.need_keys(source.rows, keys, path)

    # Images are named without their extension.
    images = options.images or source.beside
    kept_rows, absent = choices.with_pictures(source.rows, IMAGES, images, options.missing)
    items = [matched(pictures, [row[key] for key in CAPTIONS]) for row, pictures in kept_rows]
    return GridSet(items, source.skipped + absent)


def _examples(path: Path) -> Path:
    """The examples: the path itself, or where the hub's repository has their file below."""
    places = [path / "examples.jsonl", path / "data" / "examples.jsonl"]
    examples = next((place for place in places if place.exists()), None)
    if examples is not None:
        return examples

    # The hub also serves the set as parquet files with the images inside.
    if not path.is_file() and not any(path.rglob("*.parquet")):
        raise DataError(
            f"no examples at {places[0]}; fetch the data set's examples.jsonl and unpack its "
            "images beside it, or fetch it as parquet files"
        )
    return path


def run(encoder: Encoder, data: GridSet, options: Options, context: Context) -> TaskResult:
    """The text, image and group scores."""
    return grids.run("winoground", encoder, data, context)
