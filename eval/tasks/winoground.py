"""Winoground (Thrush et al. 2022): two pictures, two captions of the same words; which belongs to
which.

text: each picture scores higher with its own caption; image: each caption scores higher with its own picture; group:
both; all strictly. Reads examples.jsonl (`image_0, image_1, caption_0, caption_1`) as the hub's repository has it, with the
unpacked images. Scores are named as in clip_benchmark: text_acc, image_acc, acc (the group score).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vlp.eval import choices, embed, metrics
from vlp.eval.datasets.tables import read_rows
from vlp.eval.pictures import Collection, DataError, refuse_missing
from vlp.eval.tasks import TaskResult

VERSION = 1
KNOWN_AS = "image_caption_selection"


@dataclass(frozen=True)
class Options:
    """Where the examples and the images are."""

    data: str  # folder with examples.jsonl, or that file
    images: str | None = None  # a folder or a .tar; None: beside the examples
    missing: Literal["error", "skip"] = "error"  # examples without their images


@dataclass
class Data:
    """Examples with `pictures`, their two."""

    rows: list[dict[str, Any]]
    skipped: list[str]


def read(options: Options) -> Data:
    path = Path(options.data)
    if path.is_dir():
        path = next(
            (p for p in (path / "examples.jsonl", path / "data" / "examples.jsonl") if p.exists()),
            path / "examples.jsonl",
        )
    if not path.exists():
        raise DataError(
            f"no examples at {path}; fetch the data set's examples.jsonl and unpack its images beside it"
        )
    keys = ("image_0", "image_1", "caption_0", "caption_1")
    rows = read_rows(path, keys)
    choices.need_keys(rows, keys, path)
    collection = Collection(options.images or path.parent)
    kept, absent = [], []
    for row in rows:  # images are named without their extension
        found = [collection.find(row[key]) for key in ("image_0", "image_1")]
        if None in found:
            absent += [
                row[key] for key, picture in zip(("image_0", "image_1"), found) if picture is None
            ]
        else:
            kept.append(row | {"pictures": found})
    refuse_missing(absent, 2 * len(rows), collection, options.missing)
    return Data(kept, absent)


def run(encoder: Any, data: Data, options: Options, context: embed.Context) -> TaskResult:
    pictures = [p for row in data.rows for p in row["pictures"]]
    captions = [row[key] for row in data.rows for key in ("caption_0", "caption_1")]
    image = embed.images(encoder, pictures, context).view(len(data.rows), 2, -1)
    text = embed.texts(encoder, captions, context).view(len(data.rows), 2, -1)
    scores = torch.einsum("npd,ncd->npc", image, text)  # [n, picture, caption]
    above = metrics.strictly_above
    own0, own1, cross01, cross10 = (
        scores[:, 0, 0],
        scores[:, 1, 1],
        scores[:, 0, 1],
        scores[:, 1, 0],
    )
    by_text = above(own0, cross01) & above(own1, cross10)
    by_image = above(own0, cross10) & above(own1, cross01)
    items = {"text_acc": by_text, "image_acc": by_image, "acc": by_text & by_image}
    return TaskResult(
        "winoground",
        items={name: choices.accuracy(hits) for name, hits in items.items()},
        chance={"text_acc": 1 / 4, "image_acc": 1 / 4, "acc": 1 / 6},
        counts={"examples": len(data.rows), "skipped": len(data.skipped)},
        digest=context.digest(pictures, captions),
    )
