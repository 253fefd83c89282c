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
from typing import Any

from vlp.eval import choices
from vlp.eval.choices import CaptionChoice, ChoiceSet
from vlp.eval.datasets.tables import beside, read_rows
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult

VERSION = 1
KNOWN_AS = "image_caption_selection"
MAIN = "mean"
SUBSETS = (
    "add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj",
)  # fmt: skip
SCORES = (*SUBSETS, "mean")


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the published files and the images (COCO val2017) are."""

    data: str  # folder of the seven .json files, or a table


def read(options: Options) -> ChoiceSet:
    """The items of all seven subsets whose images are there."""
    path = Path(options.data)
    if path.is_file():
        rows, image_key = _table(path), "image"
        images = options.images or beside(path)
    else:
        rows, image_key = _published(path), "filename"
        images = options.images or path

    # Both forms name the image, under different keys.
    kept_rows, skipped = choices.with_pictures(rows, [image_key], images, options.missing)
    items = [
        CaptionChoice(picture, [row["caption"], row["negative_caption"]], row["subset"])
        for row, (picture,) in kept_rows
    ]

    # Without one of the subsets the mean would be another score under the same name.
    present = {item.group for item in items}
    empty = [subset for subset in SUBSETS if subset not in present]
    if empty:
        raise DataError(
            f"{path} has no item of {', '.join(empty)}; the mean is over all {len(SUBSETS)} subsets"
        )
    return ChoiceSet(items, skipped)


def _table(path: Path) -> list[dict[str, Any]]:
    """The rows of a table with all subsets."""
    rows = read_rows(path, ("image", "caption", "negative_caption"))
    choices.need_keys(rows, ("image", "subset", "caption", "negative_caption"), path)
    return rows


def _published(folder: Path) -> list[dict[str, Any]]:
    """The items of the seven published files, each with its subset."""
    keys = ("filename", "caption", "negative_caption")
    rows = []
    for subset in SUBSETS:
        items = choices.read_items(folder / f"{subset}.json", keys)
        rows += [{**item, "subset": subset} for item in items]
    return rows


def run(encoder: Encoder, data: ChoiceSet, options: Options, context: Context) -> TaskResult:
    """The accuracy of every subset, and their mean."""
    result = choices.run_grouped("sugar_crepe", encoder, data, context, SUBSETS)
    # The subsets differ much in size, and all weigh the same in the mean.
    result.counts |= {subset: len(result.items[subset]) for subset in SUBSETS}
    return result
