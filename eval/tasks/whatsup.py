"""What'sUp (Kamath et al. 2023): where is it, among captions that differ in a preposition.

Published files, any of them: controlled_images_dataset.json and controlled_clevr_dataset.json
(`image_path`, `caption_options`, the first is right; four), coco_qa_one_obj.json,
coco_qa_two_obj.json, vg_qa_one_obj.json and vg_qa_two_obj.json (lists of [image number, right
caption, wrong caption]). Reported is the accuracy of each file that is there, and their mean; pair
and set accuracies of the controlled files are not.

Source: amitakamath/whatsup_vlms@7c1f255, `dataset_zoo/aro_datasets.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlp.eval import choices
from vlp.eval.choices import CaptionChoice, ChoiceSet
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult

VERSION = 1
KNOWN_AS = "image_caption_selection"
MAIN = "mean"
CONTROLLED = ("controlled_images_dataset", "controlled_clevr_dataset")
PAIRED = ("coco_qa_one_obj", "coco_qa_two_obj", "vg_qa_one_obj", "vg_qa_two_obj")


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the published files and the images are."""

    data: str  # folder of .json files
    images: str | None = None  # a folder above all images, or a .tar; None: beside the files


def read(options: Options) -> ChoiceSet:
    """The items of the files that are there."""
    folder = Path(options.data)
    names = [name for name in (*CONTROLLED, *PAIRED) if (folder / f"{name}.json").is_file()]
    if not names:
        raise DataError(f"{folder} has none of {', '.join((*CONTROLLED, *PAIRED))} (.json)")

    rows: list[dict[str, Any]] = []
    for name in names:
        path = folder / f"{name}.json"
        read_file = _controlled if name in CONTROLLED else _paired
        rows += [row | {"group": name} for row in read_file(path)]
    images = options.images or folder
    kept, absent = choices.with_pictures(rows, ["image"], images, options.missing)
    items = [CaptionChoice(picture, row["texts"], row["group"]) for row, (picture,) in kept]
    return ChoiceSet(items, absent)


def _controlled(path: Path) -> list[dict[str, Any]]:
    items = choices.read_items(path, ("image_path", "caption_options"))
    return [{"image": item["image_path"], "texts": item["caption_options"]} for item in items]


def _paired(path: Path) -> list[dict[str, Any]]:
    """Items of a picture's number and two captions."""
    # COCO writes its numbers with twelve digits.
    digits = 12 if path.name.startswith("coco") else 0
    rows = []
    for number, entry in enumerate(choices.read_list(path)):
        if not isinstance(entry, list) or len(entry) < 3:
            raise DataError(
                f"{path}: item {number} is {str(entry)[:60]!r}, expected [image, right caption, "
                "wrong caption]"
            )
        rows.append({"image": f"{str(entry[0]).zfill(digits)}.jpg", "texts": entry[1:3]})
    return rows


def run(encoder: Encoder, data: ChoiceSet, options: Options, context: Context) -> TaskResult:
    """The accuracy of every file, and their mean."""
    return choices.run_grouped("whatsup", encoder, data, context)
