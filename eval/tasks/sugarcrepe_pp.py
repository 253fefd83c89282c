"""SugarCrepe++ (Dumpala et al. 2024): two captions that mean the same against one that only looks
the same.

Published files: replace_att, replace_obj, replace_rel, swap_att, swap_obj (.json), images COCO
val2017. With pictures (ITT) both captions must score strictly above the negative; without (TOT) the
two captions must be closer to each other than either is to the negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from vlp.eval import choices, embed, grids, metrics
from vlp.eval.choices import CaptionChoice, ChoiceSet
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.tasks import TaskResult

VERSION = 2  # 1 tied what a nearly collapsed model tells apart
KNOWN_AS = "image_caption_selection"
MAIN = "itt_mean"
SUBSETS = ("replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
CAPTIONS = ("caption", "caption2", "negative_caption")


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the published files and the images (COCO val2017) are."""

    data: str  # folder of the five .json files


def read(options: Options) -> ChoiceSet:
    """The items of the five published files whose images are there."""
    rows = []
    for subset in SUBSETS:
        path = Path(options.data) / f"{subset}.json"
        items = choices.read_items(path, ("filename", *CAPTIONS))
        rows += [{**item, "subset": subset} for item in items]

    images = options.images or options.data
    kept_rows, absent = choices.with_pictures(rows, ["filename"], images, options.missing)
    pairs = []
    for row, (picture,) in kept_rows:
        captions = [row[key] for key in CAPTIONS]
        pairs.append(CaptionChoice(picture, captions, row["subset"]))
    choices.need_groups(pairs, SUBSETS, options.data)
    return ChoiceSet(pairs, absent)


def run(encoder: Encoder, data: ChoiceSet, options: Options, context: Context) -> TaskResult:
    """The accuracy of every subset and their mean, with pictures and without."""
    cosines = choices.cosines(encoder, data.pictures, data.captions, context)
    scores = torch.stack(cosines)  # [n, 3] caption, caption2, negative
    # The worse of the two captions decides.
    belongs = torch.tensor([[True, True, False]])
    tie = metrics.tie_of_groups(cosines)
    with_picture = grids.rows_right(scores[:, None], belongs, tie, "all")
    text_only = _hits_without_pictures(encoder, data.captions, context)

    result = TaskResult(
        "sugar_crepe_pp",
        counts={"items": len(scores), "skipped": len(data.skipped)},
        digest=context.digest(data.pictures, data.captions, data.groups),
    )
    # Of three random scores the negative's is the lowest; without pictures the right one highest.
    by_guessing = [1 / 3] * len(scores)
    # The names of the paper: ITT with pictures, TOT without.
    for name, hits in (("itt", with_picture), ("tot", text_only)):
        choices.score_groups(result, hits, by_guessing, data.groups, prefix=f"{name}_")
    return result


def _hits_without_pictures(encoder: Encoder, captions: list[list[str]], context: Context) -> Tensor:
    """[n] bool: where the two captions are closer to each other than either is to the negative."""
    every_caption = list(chain.from_iterable(captions))
    text = embed.texts(encoder, every_caption, context).double()  # [3n, D]
    caption, caption2, negative = text.view(len(captions), 3, -1).unbind(1)

    # Unit rows: the product is the cosine.
    same = (caption * caption2).sum(1)
    first_to_negative = (caption * negative).sum(1)
    second_to_negative = (caption2 * negative).sum(1)
    scores = torch.stack([same, first_to_negative, second_to_negative], 1)
    tie = metrics.tie_of_groups(scores)
    return metrics.strictly_above(scores[:, :1], scores[:, 1:], tie).all(1)
