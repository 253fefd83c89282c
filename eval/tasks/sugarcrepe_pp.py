"""SugarCrepe++ (Dumpala et al. 2024): two captions that mean the same against one that only looks
the same.

Published files: replace_att, replace_obj, replace_rel, swap_att, swap_obj (.json), images COCO
val2017. With pictures (ITT) both captions must score strictly above the negative; without (TOT) the
two captions must be closer to each other than either is to the negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vlp.eval import choices, embed, metrics
from vlp.eval.tasks import TaskResult

VERSION = 1
KNOWN_AS = "image_caption_selection"
SUBSETS = ("replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


@dataclass(frozen=True)
class Options:
    """Where the published files and the images are."""

    data: str  # folder of the five .json files
    images: str | None = None  # COCO val2017: a folder or a .tar; None: beside the data
    missing: Literal["error", "skip"] = "error"  # items without their image


@dataclass
class Data:
    """Items with `subset, caption, caption2, negative_caption, picture`."""

    rows: list[dict[str, Any]]
    skipped: list[str]


def read(options: Options) -> Data:
    folder = Path(options.data)
    rows = []
    for subset in SUBSETS:
        items = choices.entries(folder / f"{subset}.json")
        choices.need_keys(
            items,
            ("filename", "caption", "caption2", "negative_caption"),
            folder / f"{subset}.json",
        )
        rows += [{**item, "subset": subset} for item in items]
    images = Path(options.images or options.data)
    return Data(*choices.attach(rows, [row["filename"] for row in rows], images, options.missing))


def run(encoder: Any, data: Data, options: Options, context: embed.Context) -> TaskResult:
    pictures = [row["picture"] for row in data.rows]
    captions = [[row["caption"], row["caption2"], row["negative_caption"]] for row in data.rows]
    kinds = [row["subset"] for row in data.rows]
    scores = torch.stack(choices.cosines(encoder, pictures, captions, context))
    text = embed.texts(encoder, [c for group in captions for c in group], context).view(
        len(captions), 3, -1
    )
    same, first, second = ((text[:, i] * text[:, j]).sum(1) for i, j in ((0, 1), (0, 2), (1, 2)))
    with_picture = metrics.strictly_above(scores[:, :2], scores[:, 2:]).all(1)
    text_only = metrics.strictly_above(same, first) & metrics.strictly_above(same, second)
    result = TaskResult(
        "sugar_crepe_pp",
        counts={"items": len(scores), "skipped": len(data.skipped)},
        digest=context.digest(pictures, captions, kinds),
    )
    for name, hits in (("itt", with_picture), ("tot", text_only)):
        for subset in dict.fromkeys(kinds):
            own = torch.tensor([kind == subset for kind in kinds])
            result.items[f"{name}_{subset}"] = choices.accuracy(hits[own])
        result.items[f"{name}_mean"] = choices.macro(hits, kinds)
    result.chance = dict.fromkeys(
        result.items, 1 / 3
    )  # of three random scores, the negative's is the lowest
    return result
