"""The common part of the compositional tasks: captions that a picture must choose among.

A task reads its published files into `CaptionChoice`s and scores them:

    rows = read_items(path, keys)                         the published JSON, every key there
    found, skipped = with_pictures(rows, [key], images)   the rows whose image is there
    run_grouped(name, encoder, ChoiceSet(…), context)     accuracy of each group, and their mean

The caption must score strictly above the others: a tie is wrong (vlp.eval.metrics says why).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vlp.eval import embed, metrics
from vlp.eval.datasets.annotated import Wanted
from vlp.eval.datasets.tables import need_keys as need_keys  # for the tasks too
from vlp.eval.datasets.tables import read_json as read_json
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError, Picture
from vlp.eval.result import TaskResult


@dataclass(frozen=True)
class Options:
    """Where a published set and its images are."""

    data: str  # the published files
    images: str | None = None  # a folder or a .tar; None: beside the data
    missing: Literal["error", "skip"] = "error"  # items without their image


@dataclass(frozen=True)
class CaptionChoice:
    """A picture and the captions that it must choose among, the true one first."""

    picture: Picture
    captions: list[str]
    group: str = ""  # the subset, relation or phenomenon that it tests


@dataclass
class ChoiceSet:
    """An evaluation set of choices, opened and checked."""

    choices: Sequence[CaptionChoice]
    skipped: list[str]  # images that are not there
    counts: dict[str, int] = field(default_factory=dict)  # what else reading has counted

    @property
    def pictures(self) -> list[Picture]:
        return [choice.picture for choice in self.choices]

    @property
    def captions(self) -> list[list[str]]:
        return [choice.captions for choice in self.choices]

    @property
    def groups(self) -> list[str]:
        return [choice.group for choice in self.choices]


# --- reading --------------------------------------------------------------------------------------


def read_items(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The items of a published JSON file, a list or a mapping of their numbers to them.

    Raises DataError unless every item has the `keys`.
    """
    value = read_json(path)
    if not isinstance(value, (list, dict)):
        raise DataError(
            f"{path}: found {type(value).__name__}, expected a list of items; "
            "is this the published file?"
        )

    items = value if isinstance(value, list) else list(value.values())
    need_keys(items, keys, path)
    return items


def with_pictures(
    rows: Sequence[dict[str, Any]],
    image_keys: Sequence[str],  # under which a row names or holds its images
    images: str | Path,  # a folder or a .tar
    missing: Literal["error", "skip"],
) -> tuple[list[tuple[dict[str, Any], list[Picture]]], list[str]]:
    """The rows whose images are all there, each with its pictures, and the names of the absent.

    Raises DataError for absent images, unless `missing` is "skip" and something is left.
    """
    wanted = Wanted(images)
    kept: list[tuple[dict[str, Any], list[Picture]]] = []
    for row in rows:
        sought = [wanted.find(row[key]) for key in image_keys]
        pictures = [picture for picture in sought if picture is not None]
        if len(pictures) == len(image_keys):
            kept.append((row, pictures))

    wanted.refuse_missing(missing)
    return kept, wanted.absent


# --- scores ---------------------------------------------------------------------------------------


def cosines(
    encoder: Encoder,
    pictures: Sequence[Picture],
    captions: Sequence[Sequence[str]],  # of each picture
    context: embed.Context,
) -> list[Tensor]:
    """For each picture the cosines with its captions, [number of its captions]."""
    # All captions in one go, so that each different one is embedded once; before the pictures,
    # into which no time goes where the model cannot read the captions.
    every_caption = list(chain.from_iterable(captions))
    text = embed.texts(encoder, every_caption, context)
    image = embed.images(encoder, pictures, context)

    # In float64: captions of a nearly collapsed model differ by less than float32's products.
    image = image.double()
    text_of_picture = text.split([len(group) for group in captions])
    return [rows.double() @ picture_row for picture_row, rows in zip(image, text_of_picture)]


def first_is_best(scores: Sequence[Tensor]) -> Tensor:
    """[n] float64: 1 where the first caption is strictly above all others (a tie is wrong)."""
    tie = metrics.tie_of_groups(scores)
    # Pictures may have different numbers of captions, so there is no one tensor of scores.
    hits = [float(metrics.strictly_above(s[0], s[1:], tie).all()) for s in scores]
    return torch.tensor(hits, dtype=torch.float64)


def accuracy(hits: Tensor) -> Tensor:
    """[n, 2] items of a plain accuracy."""
    return torch.stack([hits.double(), torch.ones(len(hits), dtype=torch.float64)], 1)


def macro(hits: Tensor, groups: Sequence[Any]) -> Tensor:
    """[n, 2] items whose score is the mean over groups of the group's accuracy."""
    # A group's mean is weighed like a class's recall.
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    weights = metrics.per_class_weights(torch.tensor([number[group] for group in groups]))
    return torch.stack([hits.double() * weights, weights], 1)


def by_group(
    hits: Tensor,  # [n]
    groups: Sequence[str],  # n, the group of each item
    names: Iterable[str] | None = None,  # the groups in the order to report; None: as they come
) -> dict[str, Tensor]:
    """Items of the accuracy of each group, and of their "mean"."""
    items = {}
    for name in names or dict.fromkeys(groups):
        of_group = torch.tensor([group == name for group in groups])
        items[name] = accuracy(hits[of_group])

    items["mean"] = macro(hits, groups)
    return items


def chance(captions: Sequence[Sequence[str]]) -> float:
    """The expected share of right choices by guessing, the mean of 1 / number of captions."""
    return sum(1 / len(group) for group in captions) / len(captions)


def run_grouped(
    name: str,  # of the evaluation set
    encoder: Encoder,
    data: ChoiceSet,
    context: embed.Context,
    groups: Iterable[str] | None = None,  # in the order to report; None: as they come
) -> TaskResult:
    """The result of a set whose score is the accuracy of each group, and their mean."""
    hits = first_is_best(cosines(encoder, data.pictures, data.captions, context))
    items = by_group(hits, data.groups, groups)
    return TaskResult(
        name,
        items=items,
        chance=dict.fromkeys(items, chance(data.captions)),
        counts={
            "items": len(hits),
            **data.counts,
            "skipped": len(data.skipped),
        },
        digest=context.digest(data.pictures, data.captions, data.groups),
    )
