"""ARO's Visual Genome tests (Yuksekgonul et al. 2023): relations and attributes against the swapped
caption.

Published files: visual_genome_relation.json and visual_genome_attribution.json, images in images/.
Each picture is cut to its box. The true caption must be strictly above the false one (the original
lists the false one first and takes argmax, so a tie is wrong). Reported is, as in the authors'
notebook, the mean over all relations except the 157 that it leaves out by name (symmetric ones
among them), however few items they have, and the mean over pairs of attributes with at least 25.

Source: mertyg/vision-language-models-are-bows@81fdd20, `dataset_zoo/aro_datasets.py` and
`notebooks/Replicate ARO! VG-Relation, VG-Attribution.ipynb`.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from vlp.eval import choices, datasets
from vlp.eval.choices import CaptionChoice, ChoiceSet
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult

VERSION = 3  # 1 left out relations by size; 2 tied what a nearly collapsed model tells apart
KNOWN_AS = "image_caption_selection"
MAIN = "vg_relation"
BOX = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")


class Test(NamedTuple):
    """One of the two tests."""

    file: str  # as published
    group_key: str  # under which an item names its relation or attributes
    at_least: int  # items of a group that counts


TESTS = {
    "vg_relation": Test("visual_genome_relation.json", "relation_name", 1),
    "vg_attribution": Test("visual_genome_attribution.json", "attributes", 25),
}


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the published files and the images are."""

    data: str  # folder of the two .json files
    images: str | None = None  # a folder or a .tar; None: images/ beside them
    # relations to leave out; None: the 157 of the authors' notebook
    exclude: list[str] | None = None


@cache
def left_out() -> tuple[str, ...]:
    """The relations that the authors' notebook leaves out."""
    path = Path(datasets.__file__).with_name("aro_left_out.txt")
    return tuple(path.read_text(encoding="utf-8").splitlines())


def read(options: Options) -> dict[str, ChoiceSet]:
    """Both tests, each with the groups that count."""
    return {name: _read_test(options, test) for name, test in TESTS.items()}


def _read_test(options: Options, test: Test) -> ChoiceSet:
    """The items of one published file whose groups count, cut to their boxes."""
    path = Path(options.data) / test.file
    keys = ("image_path", "true_caption", "false_caption", test.group_key, *BOX)
    rows = choices.read_items(path, keys)

    # Only relations have names that the authors leave out.
    excluded = options.exclude if options.exclude is not None else left_out()
    for row in rows:
        row["group"] = _group(row[test.group_key], path)
    sizes = Counter(row["group"] for row in rows)
    counted = {group for group, size in sizes.items() if size >= test.at_least} - set(excluded)
    rows = [row for row in rows if row["group"] in counted]
    if not rows:
        raise DataError(
            f"{path} has no group of at least {test.at_least} items that is not left out; is it "
            "complete?"
        )

    images = options.images or Path(options.data) / "images"
    kept_rows, absent = choices.with_pictures(rows, ["image_path"], images, options.missing)
    items = [
        CaptionChoice(
            choices.cut(picture, row, BOX),
            [row["true_caption"], row["false_caption"]],
            row["group"],
        )
        for row, (picture,) in kept_rows
    ]
    return ChoiceSet(items, absent)


def _group(value: Any, path: Path) -> str:
    """A relation's name, or the two attributes as one."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise DataError(f"{path}: found {value!r}, expected a relation's name or two attributes")

    # As JSON: joined by a character of theirs, two pairs could become one.
    return json.dumps(value)


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
