"""Cola (Ray et al. 2023), multi-objects: two pictures whose captions swap attributes and objects.

Published: COLA_multiobjects_matching_benchmark.json, a list of [image 1, caption 1, image 2,
caption 2], images as addresses that end in their Visual Genome numbers. Each caption must score
higher with its own picture than with the other (chance 1/4).

Source: arijitray1993/COLA@1fa52fb, `scripts/eval.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlp.eval import choices, grids
from vlp.eval.embed import Context
from vlp.eval.grids import GridSet, matched
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult

VERSION = 1
KNOWN_AS = "image_caption_selection"
MAIN = "image_acc"


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the published file and the images (Visual Genome) are."""

    data: str  # COLA_multiobjects_matching_benchmark.json


def read(options: Options) -> GridSet:
    """The pairs whose two pictures are there."""
    path = Path(options.data)
    rows = []
    for number, entry in enumerate(choices.read_list(path)):
        if not isinstance(entry, list) or len(entry) != 4 or not all(map(_is_text, entry)):
            raise DataError(
                f"{path}: item {number} is {str(entry)[:60]!r}, expected [image 1, caption 1, "
                "image 2, caption 2]"
            )
        rows.append(dict(zip(("image_1", "text_1", "image_2", "text_2"), entry)))

    images = options.images or path.parent
    kept, absent = choices.with_pictures(rows, ["image_1", "image_2"], images, options.missing)
    items = [matched(pictures, [row["text_1"], row["text_2"]]) for row, pictures in kept]
    return GridSet(items, absent)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def run(encoder: Encoder, data: GridSet, options: Options, context: Context) -> TaskResult:
    """The share of pairs whose captions both choose their picture."""
    return grids.run("cola", encoder, data, context, scores=["image_acc"])
