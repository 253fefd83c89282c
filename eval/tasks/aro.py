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
from pathlib import Path
from typing import Any, Literal

from vlp.eval import choices, embed
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult

VERSION = 1
KNOWN_AS = "image_caption_selection"
FILES = {
    "vg_relation": "visual_genome_relation.json",
    "vg_attribution": "visual_genome_attribution.json",
}
AT_LEAST = 25


@dataclass(frozen=True)
class Options:
    """Where the published files and the images are."""

    data: str  # folder of the two .json files
    images: str | None = None  # a folder or a .tar; None: images/ beside them
    exclude: list[str] = field(default_factory=list)  # relations to leave out
    missing: Literal["error", "skip"] = "error"  # items without their image


@dataclass
class Data:
    """Items of each test with `group` (what the mean is over) and `picture` (cut to its box)."""

    tests: dict[str, list[dict[str, Any]]]
    skipped: list[str]


def read(options: Options) -> Data:
    folder, tests, skipped = Path(options.data), {}, []
    for name, file in FILES.items():
        rows = choices.entries(folder / file)
        box = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
        by = "relation_name" if name == "vg_relation" else "attributes"
        choices.need_keys(
            rows, ("image_path", "true_caption", "false_caption", by, *box), folder / file
        )
        for row in rows:
            row["group"] = row[by] if isinstance(row[by], str) else "_".join(row[by])
        frequent = {
            g for g, n in Counter(row["group"] for row in rows).items() if n >= AT_LEAST
        } - set(options.exclude)
        rows = [row for row in rows if row["group"] in frequent]
        if not rows:
            raise DataError(
                f"{folder / file} has no group of at least {AT_LEAST} items; is it complete?"
            )
        images = Path(options.images) if options.images else folder / "images"
        rows, absent = choices.attach(
            rows, [row["image_path"] for row in rows], images, options.missing
        )
        for row in rows:
            x, y, w, h = (row[key] for key in box)
            row["picture"] = replace(row["picture"], box=(x, y, x + w, y + h))
        tests[name] = rows
        skipped += absent
    return Data(tests, skipped)


def run(encoder: Any, data: Data, options: Options, context: embed.Context) -> TaskResult:
    result = TaskResult("aro", counts={"skipped": len(data.skipped)})
    seen: list[Any] = []
    for name, rows in data.tests.items():
        pictures = [row["picture"] for row in rows]
        captions = [[row["true_caption"], row["false_caption"]] for row in rows]
        hits = choices.first_is_best(choices.cosines(encoder, pictures, captions, context))
        groups = [row["group"] for row in rows]
        result.items[name] = choices.macro(hits, groups)
        result.chance[name] = 0.5
        result.counts |= {f"{name}_items": len(rows), f"{name}_groups": len(set(groups))}
        seen.append((captions, groups))
    result.digest = context.digest(
        [row["picture"] for rows in data.tests.values() for row in rows], seen
    )
    return result
