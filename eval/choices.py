"""The common part of the compositional tasks: captions that a picture must choose among.

A task reads its published files into `CaptionChoice`s and scores them:

    rows = read_items(path, keys)                         the published JSON, every key there
    found, skipped = with_pictures(rows, [key], images)   the rows whose image is there
    run_grouped(name, encoder, ChoiceSet(…), context)     accuracy of each group, and their mean

The caption must score strictly above the others: a tie is wrong (vlp.eval.metrics says why).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vlp.eval import confidence, embed, metrics
from vlp.eval.datasets.annotated import Wanted
from vlp.eval.datasets.tables import need_keys as need_keys  # for the tasks too
from vlp.eval.datasets.tables import read_json as read_json
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError, Picture
from vlp.eval.result import TaskResult

MEAN = "mean"  # the score that is the mean over groups
SCORES = ("acc", "text_acc", "image_acc", MEAN)  # what stands beside the scores of groups
_MARK = "group:"


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

    def __post_init__(self) -> None:
        need_texts((choice.picture, choice.captions) for choice in self.choices)

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
    """The items of a published JSON file; a DataError unless there are some, and every one has the
    `keys`.
    """
    items = read_list(path)
    need_keys(items, keys, path)
    return items


def read_list(path: Path) -> list[Any]:
    """What a JSON file lists, by itself or as a mapping of numbers; a DataError for anything else,
    and for nothing.
    """
    value = read_json(path)
    if not isinstance(value, (list, dict)):
        raise DataError(
            f"{path}: found {type(value).__name__}, expected a list of items; "
            "is this the published file?"
        )
    if not value:
        raise DataError(f"{path} holds no items; is this the published file?")
    return value if isinstance(value, list) else list(value.values())


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


def need_texts(items: Iterable[tuple[Picture, Sequence[str]]]) -> None:
    """Raise DataError unless there are items, each with texts to choose among."""
    is_empty = True
    for picture, texts in items:
        is_empty = False
        is_listed = isinstance(texts, (list, tuple)) and len(texts) > 0
        if not is_listed or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"item of {picture.name}: found {str(texts)[:80]}, expected texts to choose among"
            )
    if is_empty:
        raise DataError("the set has no item to choose in; is this the published file?")


def cut(picture: Picture, row: dict[str, Any], keys: Sequence[str]) -> Picture:
    """The part of a picture inside a row's box: `keys` of its left, upper, width and height."""
    values = [row[key] for key in keys]
    try:
        left, upper, width, height = map(float, values)
    except (TypeError, ValueError):
        width = height = 0.0
    if not (width > 0 and height > 0):
        raise DataError(
            f"{picture.name}: found the box {', '.join(map(str, values))}, expected numbers for "
            f"{', '.join(keys)}, the last two above 0"
        )
    return replace(picture, box=(left, upper, left + width, upper + height))


def need_groups(items: Sequence[CaptionChoice], names: Sequence[str], path: object) -> None:
    """Raise DataError unless the groups of the items are those of the published set."""
    # Without one, or with another, the mean would be another score under the same name.
    present = {item.group for item in items}
    empty = [name for name in names if name not in present]
    if empty:
        raise DataError(
            f"{path} has no item of {', '.join(empty)}; the mean is over all {len(names)} subsets"
        )
    unknown = sorted(present - set(names))
    if unknown:
        raise DataError(
            f"{path} has items of {', '.join(map(repr, unknown[:5]))}; expected the subsets "
            f"{', '.join(names)}"
        )


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


def group_score(group: str) -> str:
    """The name of a group's score: the group's own, marked where that is empty or another score's.

    Different groups never share a name.
    """
    is_free = group and group not in SCORES and not group.startswith(_MARK)
    return group if is_free else f"{_MARK}{group}"


def score_groups(
    result: TaskResult,
    hits: Tensor,  # [n]
    by_guessing: Sequence[float],  # n, the chance of each item
    groups: Sequence[str],  # n, the group of each item
    order: Iterable[str] | None = None,  # of the groups in the result; None: as they come
    prefix: str = "",  # of the scores' names
) -> None:
    """Fill in accuracy and chance of each group, and of their mean, in which all weigh the same."""
    expected = torch.tensor(by_guessing, dtype=torch.float64)
    for group in order or dict.fromkeys(groups):
        belongs = torch.tensor([other == group for other in groups])
        name = f"{prefix}{group_score(group)}"
        result.items[name] = accuracy(hits[belongs])
        result.chance[name] = float(expected[belongs].mean())

    # Guessing is averaged as the score is: groups differ in size and in what guessing gives.
    result.items[f"{prefix}{MEAN}"] = macro(hits, groups)
    result.chance[f"{prefix}{MEAN}"] = confidence.score(macro(expected, groups))


def chances(captions: Sequence[Sequence[str]]) -> list[float]:
    """Of each item what guessing gives, 1 / number of its captions."""
    return [1 / len(of_item) for of_item in captions]


def chance(captions: Sequence[Sequence[str]]) -> float:
    """The expected share of right choices by guessing over all items."""
    return sum(chances(captions)) / len(captions)


def run_grouped(
    name: str,  # of the evaluation set
    encoder: Encoder,
    data: ChoiceSet,
    context: embed.Context,
    groups: Iterable[str] | None = None,  # in the order to report; None: as they come
) -> TaskResult:
    """The result of a set whose score is the accuracy of each group, and their mean."""
    hits = first_is_best(cosines(encoder, data.pictures, data.captions, context))
    result = TaskResult(
        name,
        counts={
            "items": len(hits),
            **data.counts,
            "skipped": len(data.skipped),
        },
        digest=context.digest(data.pictures, data.captions, data.groups),
    )
    score_groups(result, hits, chances(data.captions), data.groups, groups)
    return result
