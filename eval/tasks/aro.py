"""ARO's Visual Genome tests (Yuksekgonul et al. 2023): relations and attributes against the swapped
caption.

Published files: visual_genome_relation.json and visual_genome_attribution.json, images in images/.
Each picture is cut to its box. The true caption must be strictly above the false one (the original
lists the false one first and takes argmax, so a tie is wrong). Reported is the mean over relations,
and over pairs of attributes, that have at least 25 items. The authors' notebook leaves out further
relations, symmetric ones among them; name those in `exclude` to follow it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from vlp.eval import choices
from vlp.eval.choices import CaptionChoice, ChoiceSet
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError, Picture
from vlp.eval.tasks import TaskResult

VERSION = 1
KNOWN_AS = "image_caption_selection"
AT_LEAST = 25  # items a group
BOX = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")

# test -> its published file, and the key that its items are grouped by
TESTS = {
    "vg_relation": ("visual_genome_relation.json", "relation_name"),
    "vg_attribution": ("visual_genome_attribution.json", "attributes"),
}


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the published files and the images are."""

    data: str  # folder of the two .json files
    images: str | None = None  # a folder or a .tar; None: images/ beside them
    exclude: list[str] = field(default_factory=list)  # relations to leave out


def read(options: Options) -> dict[str, ChoiceSet]:
    """Both tests, each with the groups that count."""
    return {name: _read_test(options, file, key) for name, (file, key) in TESTS.items()}


def _read_test(options: Options, file: str, group_key: str) -> ChoiceSet:
    """The items of one published file that lie in frequent groups, cut to their boxes."""
    path = Path(options.data) / file
    keys = ("image_path", "true_caption", "false_caption", group_key, *BOX)
    rows = choices.read_items(path, keys)

    # The accuracy of a rare group would weigh as much in the mean as that of a frequent one.
    sizes = Counter(_group(row[group_key]) for row in rows)
    frequent = {group for group, size in sizes.items() if size >= AT_LEAST}
    counted = frequent - set(options.exclude)
    rows = [row for row in rows if _group(row[group_key]) in counted]
    if not rows:
        raise DataError(f"{path} has no group of at least {AT_LEAST} items; is it complete?")

    images = options.images or Path(options.data) / "images"
    kept_rows, absent = choices.with_pictures(rows, ["image_path"], images, options.missing)
    items = [
        CaptionChoice(
            _cut(picture, row),
            [row["true_caption"], row["false_caption"]],
            _group(row[group_key]),
        )
        for row, (picture,) in kept_rows
    ]
    return ChoiceSet(items, absent)


def _group(value: str | list[str]) -> str:
    """A relation's name, or the two attributes as one."""
    return value if isinstance(value, str) else "_".join(value)


def _cut(picture: Picture, row: dict[str, Any]) -> Picture:
    """The part of a picture inside a row's box."""
    left, upper, width, height = (row[key] for key in BOX)
    return replace(picture, box=(left, upper, left + width, upper + height))


def run(
    encoder: Encoder, data: dict[str, ChoiceSet], options: Options, context: Context
) -> TaskResult:
    """For each test the mean over its groups of the accuracy."""
    n_skipped = sum(len(test.skipped) for test in data.values())
    result = TaskResult("aro", counts={"skipped": n_skipped})
    for name, test in data.items():
        cosines = choices.cosines(encoder, test.pictures, test.captions, context)
        hits = choices.first_is_best(cosines)
        # The mean over groups: the frequent relations would decide a plain accuracy.
        result.items[name] = choices.macro(hits, test.groups)
        result.chance[name] = 0.5
        result.counts[f"{name}_items"] = len(hits)
        result.counts[f"{name}_groups"] = len(set(test.groups))

    # One digest over both tests: the record is one.
    pictures = list(chain.from_iterable(test.pictures for test in data.values()))
    annotations = [(test.captions, test.groups) for test in data.values()]
    result.digest = context.digest(pictures, annotations)
    return result
