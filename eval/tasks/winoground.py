"""Winoground (Thrush et al. 2022): two pictures, two captions of the same words; which belongs to
which.

text: each picture scores higher with its own caption; image: each caption scores higher with its
own picture; group: both; all strictly. Reads examples.jsonl (`image_0, image_1, caption_0,
caption_1`) as the hub's repository has it, with the unpacked images. Scores are named as in
clip_benchmark: text_acc, image_acc, acc (the group score).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from vlp.eval import choices, embed
from vlp.eval.datasets.tables import read_rows
from vlp.eval.embed import Context
from vlp.eval.metrics import strictly_above
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError, Picture
from vlp.eval.tasks import TaskResult

VERSION = 1
KNOWN_AS = "image_caption_selection"
SCORES = ("text_acc", "image_acc", "acc")
IMAGES = ("image_0", "image_1")
CAPTIONS = ("caption_0", "caption_1")


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the examples and the images are."""

    data: str  # folder with examples.jsonl, or that file


@dataclass
class Data:
    """Examples of two pictures and two captions each, one after the other."""

    pictures: list[Picture]  # 2n
    captions: list[str]  # 2n
    skipped: list[str]  # images that are not there


def read(options: Options) -> Data:
    """The examples whose two images are there."""
    path = _examples(Path(options.data))
    keys = (*IMAGES, *CAPTIONS)
    rows = read_rows(path, keys)
    choices.need_keys(rows, keys, path)

    # Images are named without their extension.
    images = options.images or path.parent
    kept_rows, absent = choices.with_pictures(rows, IMAGES, images, options.missing)
    pictures, captions = [], []
    for row, pictures_of_row in kept_rows:
        pictures += pictures_of_row
        captions += [row[key] for key in CAPTIONS]
    return Data(pictures, captions, absent)


def _examples(path: Path) -> Path:
    """The file of examples: the path itself, or where the hub's repository has it below."""
    if path.is_dir():
        places = (path / "examples.jsonl", path / "data" / "examples.jsonl")
        path = next((place for place in places if place.exists()), places[0])
    if not path.exists():
        raise DataError(
            f"no examples at {path}; fetch the data set's examples.jsonl and unpack its images "
            "beside it"
        )
    return path


def run(encoder: Encoder, data: Data, options: Options, context: Context) -> TaskResult:
    """The text, image and group scores."""
    n = len(data.pictures) // 2
    image = embed.images(encoder, data.pictures, context).view(n, 2, -1)
    text = embed.texts(encoder, data.captions, context).view(n, 2, -1)
    scores = torch.einsum("npd,ncd->npc", image, text)  # [n, picture, caption]

    # Two of the four scores belong together, two are crossed.
    own_0 = scores[:, 0, 0]
    own_1 = scores[:, 1, 1]
    cross_01 = scores[:, 0, 1]
    cross_10 = scores[:, 1, 0]

    # A picture chooses between captions, a caption between pictures.
    by_text = strictly_above(own_0, cross_01) & strictly_above(own_1, cross_10)
    by_image = strictly_above(own_0, cross_10) & strictly_above(own_1, cross_01)

    hits = {
        "text_acc": by_text,
        "image_acc": by_image,
        "acc": by_text & by_image,
    }
    return TaskResult(
        "winoground",
        items={name: choices.accuracy(values) for name, values in hits.items()},
        # Two comparisons right by chance; of the 24 orders of four scores 4 have both own on top.
        chance={"text_acc": 1 / 4, "image_acc": 1 / 4, "acc": 1 / 6},
        counts={"examples": n, "skipped": len(data.skipped)},
        digest=context.digest(data.pictures, data.captions),
    )
