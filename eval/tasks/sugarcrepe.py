"""SugarCrepe (Hsieh et al. 2023): a caption against one hard negative, seven kinds of change.

Published files: add_att, add_obj, replace_att, replace_obj, replace_rel, swap_att, swap_obj
(.json), images COCO val2017. The caption must score strictly above the negative; reported are all
seven accuracies and their mean. The images lie in COCO's val2014 too: a model trained on more than
train2014 has seen them, and its score is contaminated. Also reads a table with `image, subset,
caption, negative_caption`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlp.eval import choices, embed
from vlp.eval.datasets import tables
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult

VERSION = 1
KNOWN_AS = "image_caption_selection"
SUBSETS = (
    "add_att",
    "add_obj",
    "replace_att",
    "replace_obj",
    "replace_rel",
    "swap_att",
    "swap_obj",
)


@dataclass(frozen=True)
class Options:
    """Where the published files and the images are."""

    data: str  # folder of the seven .json files, or a table
    images: str | None = None  # COCO val2017: a folder or a .tar; None: beside the data
    missing: Literal["error", "skip"] = "error"  # items without their image


@dataclass
class Data:
    """Items with `subset, caption, negative_caption, picture`."""

    rows: list[dict[str, Any]]
    skipped: list[str]
    name: str


def read(options: Options) -> Data:
    path = Path(options.data)
    if path.is_file():
        rows = tables.read_rows(path, ("image", "caption", "negative_caption"))
        images = options.images or str(tables.beside(path))
        choices.need_keys(rows, ("image", "subset", "caption", "negative_caption"), path)
    else:
        rows = []
        for subset in SUBSETS:
            items = choices.entries(path / f"{subset}.json")
            choices.need_keys(
                items, ("filename", "caption", "negative_caption"), path / f"{subset}.json"
            )
            rows += [{**item, "subset": subset, "image": item["filename"]} for item in items]
        images = options.images or options.data
    rows, skipped = choices.attach(
        rows, [row["image"] for row in rows], Path(images), options.missing
    )
    empty = [s for s in SUBSETS if not any(row["subset"] == s for row in rows)]
    if empty:
        raise DataError(
            f"{path} has no item of {', '.join(empty)}; the mean is over all {len(SUBSETS)} subsets"
        )
    return Data(rows, skipped, "sugar_crepe")


def run(encoder: Any, data: Data, options: Options, context: embed.Context) -> TaskResult:
    pictures = [row["picture"] for row in data.rows]
    captions = [[row["caption"], row["negative_caption"]] for row in data.rows]
    hits = choices.first_is_best(choices.cosines(encoder, pictures, captions, context))
    kinds = [row["subset"] for row in data.rows]
    result = TaskResult(
        data.name,
        counts={"items": len(hits), "skipped": len(data.skipped)},
        digest=context.digest(pictures, captions, kinds),
    )
    for subset in SUBSETS:
        own = [i for i, kind in enumerate(kinds) if kind == subset]
        result.items[subset] = choices.accuracy(hits[own])
        result.counts[subset] = len(own)
    result.items["mean"] = choices.macro(hits, kinds)
    result.chance = dict.fromkeys(result.items, 0.5)
    return result
