"""SugarCrepe (Hsieh et al. 2023): a caption against one hard negative, seven kinds of change.

Published files: add_att, add_obj, replace_att, replace_obj, replace_rel, swap_att, swap_obj
(.json), images COCO val2017. The caption must score strictly above the negative; reported are all
seven accuracies and their mean. The images lie in COCO's val2014 too: a model trained on more than
train2014 has seen them, and its score is contaminated. Also reads rows with `image, subset,
caption, negative_caption`: a table, parquet files or shards (vlp.eval.datasets.annotated).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlp.data.paths import shards_in
from vlp.eval import choices
from vlp.eval.choices import CaptionChoice, ChoiceSet
from vlp.eval.datasets import annotated
from vlp.eval.datasets.annotated import Rows
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.tasks import TaskResult

VERSION = 2  # 1 tied what a nearly collapsed model tells apart
KNOWN_AS = "image_caption_selection"
MAIN = "mean"
SUBSETS = (
    "add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj",
)  # fmt: skip


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the published files and the images (COCO val2017) are."""

    data: str  # folder of the seven .json files, of parquet files or shards, or a table


def read(options: Options) -> ChoiceSet:
    """The items of all seven subsets whose images are there."""
    path = Path(options.data)
    source, image_key = _published(path) or _rows(path, options.missing)
    images = options.images or source.beside

    # Both forms name the image, under different keys.
    kept_rows, absent = choices.with_pictures(source.rows, [image_key], images, options.missing)
    items = [
        CaptionChoice(picture, [row["caption"], row["negative_caption"]], row["subset"])
        for row, (picture,) in kept_rows
    ]

    choices.need_groups(items, SUBSETS, path)
    return ChoiceSet(items, source.skipped + absent)


def _rows(path: Path, missing: str) -> tuple[Rows, str]:
    """The rows of a table, parquet files or shards with all subsets."""
    source = annotated.read(path, ("image", "caption", "negative_caption"), missing)
    choices.need_keys(source.rows, ("image", "subset", "caption", "negative_caption"), path)
    return source, "image"


def _published(folder: Path) -> tuple[Rows, str] | None:
    """The items of the seven published files, each with its subset; None where other files are."""
    is_other = folder.is_file() or any(folder.rglob("*.parquet")) or bool(shards_in(folder))
    if is_other:
        return None

    keys = ("filename", "caption", "negative_caption")
    rows = []
    for subset in SUBSETS:
        items = choices.read_items(folder / f"{subset}.json", keys)
        rows += [{**item, "subset": subset} for item in items]
    return Rows(rows, folder), "filename"


def run(encoder: Encoder, data: ChoiceSet, options: Options, context: Context) -> TaskResult:
    """The accuracy of every subset, and their mean."""
    result = choices.run_grouped("sugar_crepe", encoder, data, context, SUBSETS)
    # The subsets differ much in size, and all weigh the same in the mean.
    result.counts |= {subset: len(result.items[subset]) for subset in SUBSETS}
    return result
