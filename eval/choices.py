"""What the compositional tasks share: cosines between a picture and the captions it must choose
among.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlp.data import tables
from vlp.eval import embed, metrics
from vlp.eval.models import Encoder
from vlp.eval.pictures import Collection, DataError, Picture, refuse_missing


def cosines(
    encoder: Encoder,
    pictures: Sequence[Picture],
    captions: Sequence[Sequence[str]],
    context: embed.Context,
) -> list[Tensor]:
    """For each picture the cosines with its captions, [number of its captions]."""
    image = embed.images(encoder, pictures, context)
    text = embed.texts(encoder, [c for group in captions for c in group], context)
    parts = text.split([len(group) for group in captions])
    return [part @ row for row, part in zip(image, parts)]


def first_is_best(scores: Sequence[Tensor]) -> Tensor:
    """[n] float64: 1 where the first caption is strictly above all others (a tie is wrong)."""
    return torch.tensor(
        [float(metrics.strictly_above(s[0], s[1:]).all()) for s in scores], dtype=torch.float64
    )


def accuracy(hits: Tensor) -> Tensor:
    """[n, 2] items of a plain accuracy."""
    return torch.stack([hits.double(), torch.ones(len(hits), dtype=torch.float64)], 1)


def macro(hits: Tensor, groups: Sequence[Any]) -> Tensor:
    """[n, 2] items whose score is the mean over groups of the group's accuracy."""
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    weights = metrics.per_class_weights(torch.tensor([number[g] for g in groups]))
    return torch.stack([hits.double() * weights, weights], 1)


def read_json(path: Path) -> Any:
    """A JSON file; a DataError says what is missing or broken."""
    try:
        return tables.read_json(path)
    except FileNotFoundError:
        raise DataError(
            f"no annotations at {path}; fetch the published files and give their folder as data="
        ) from None
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from None


def entries(path: Path) -> list[Any]:
    """The items of a published JSON file: a list, or a mapping of their numbers to them."""
    value = read_json(path)
    if not isinstance(value, (list, dict)):
        raise DataError(
            f"{path}: found {type(value).__name__}, expected a list of items; is this the published file?"
        )
    return value if isinstance(value, list) else list(value.values())


def need_keys(rows: Sequence[dict[str, Any]], keys: Sequence[str], path: object) -> None:
    """Raise DataError unless every row has the keys."""
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: item {i} is {str(row)[:60]!r}, expected a mapping with {', '.join(keys)}"
            )
        lost = [k for k in keys if k not in row]
        if lost:
            raise DataError(
                f"{path}: item {i} lacks {', '.join(lost)} (it has {', '.join(row)}); is this the published file?"
            )


def attach(
    rows: list[dict[str, Any]], names: Sequence[str], images: Path, missing: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows whose image is there, each with "picture" added, and the names of the absent;
    refuses as `missing` says.
    """
    collection = Collection(images)
    found = [collection.find(name) for name in names]
    absent = [name for name, picture in zip(names, found) if picture is None]
    refuse_missing(absent, len(rows), collection, missing)
    return [row | {"picture": picture} for row, picture in zip(rows, found) if picture], absent
