"""WinoGAViL (Bitton et al. 2022): which k of the pictures go with a cue; the Jaccard index.

Published: winogavil_dataset.csv (`candidates` and `associations` as lists, `cue`) and
winogavil_images/NAME.jpg. The k pictures nearest to "A cue" ("An" before a vowel) are chosen, k the
number of associations; with i of them right the score is i / (2k − i). Reported are all items,
those with 5 or 6 candidates and those with 10 or more, as DataComp does. At equal scores wrong
pictures are chosen first.

Source: mlfoundations/datacomp@4afedc4, `eval_utils/wino_eval.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlp.data.tables.values import texts as texts_in
from vlp.eval import choices, embed, metrics
from vlp.eval.datasets.tables import read_rows
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import Collection, DataError, Picture, refuse_missing
from vlp.eval.tasks import TaskResult

VERSION = 1
KNOWN_AS = "winogavil"
MAIN = "jaccard_10-12"
# How many candidates an item of a score has.
_PARTS: dict[str, Callable[[int], bool]] = {
    "jaccard": lambda n: True,
    "jaccard_5-6": lambda n: n <= 6,
    "jaccard_10-12": lambda n: n >= 10,
}
SCORES = tuple(_PARTS)


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the published file and the images are."""

    data: str  # the folder with winogavil_dataset.csv, or that file
    images: str | None = None  # None: winogavil_images beside it


@dataclass(frozen=True)
class Item:
    """A cue, its candidates, and which of them go with it."""

    cue: str
    pictures: tuple[Picture, ...]
    right: tuple[bool, ...]


@dataclass
class Data:
    """The items whose pictures are all there."""

    items: list[Item]
    skipped: list[str]


def read(options: Options) -> Data:
    """The items, every one with a right and a wrong candidate."""
    path = Path(options.data)
    path = path / "winogavil_dataset.csv" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"no table at {path}; fetch winogavil_dataset.csv and winogavil_images.zip")
    rows = read_rows(path)
    choices.need_keys(rows, ["candidates", "cue", "associations"], path)

    collection = Collection(options.images or path.parent / "winogavil_images")
    items: list[Item] = []
    absent: list[str] = []
    n_named = 0
    for number, row in enumerate(rows, 1):
        names = texts_in(row["candidates"])
        right = _right(row, names, f"{path}, item {number}")
        n_named += len(names)
        pictures = [collection.find(name) for name in names]
        absent += [name for name, picture in zip(names, pictures) if picture is None]
        present = tuple(picture for picture in pictures if picture is not None)
        if len(present) == len(names):
            items.append(Item(str(row["cue"]), present, right))

    refuse_missing(absent, n_named, collection, options.missing)
    return Data(items, absent)


def _right(row: dict[str, Any], names: list[str], place: str) -> tuple[bool, ...]:
    """Which candidates are associations; a DataError where that is all, none, or another name."""
    right = set(texts_in(row["associations"]))
    if not right or not right < set(names):
        raise DataError(
            f"{place}: associations {row['associations']}, expected some but not all of the "
            f"candidates {row['candidates']}"
        )
    return tuple(name in right for name in names)


def prompt(cue: str) -> str:
    """A cue as a text."""
    lower = cue.lower()
    article = "An" if lower[:1] in tuple("aeiou") else "A"
    return f"{article} {lower}"


def run(encoder: Encoder, data: Data, options: Options, context: Context) -> TaskResult:
    """The mean Jaccard index of all items and of those of few and of many candidates."""
    pictures = list(chain.from_iterable(item.pictures for item in data.items))
    cues = [prompt(item.cue) for item in data.items]
    image = embed.images(encoder, pictures, context).double()
    text = embed.texts(encoder, cues, context).double()

    of_items = image.split([len(item.pictures) for item in data.items])
    scores = [rows @ cue_row for rows, cue_row in zip(of_items, text)]
    tie = metrics.tie_of_groups(scores)
    values = [jaccard(s, torch.tensor(i.right), tie) for s, i in zip(scores, data.items)]

    result = TaskResult(
        "winogavil",
        counts={"items": len(values), "skipped": len(data.skipped)},
        digest=context.digest(pictures, cues, [item.right for item in data.items]),
    )
    sizes = [len(item.right) for item in data.items]
    by_guessing = [chance(len(item.right), sum(item.right)) for item in data.items]
    for name, belongs in _PARTS.items():
        places = [place for place, size in enumerate(sizes) if belongs(size)]
        if places:
            # One of weight 1 an item, as an accuracy's, so that the score is their mean.
            part = torch.tensor([values[place] for place in places], dtype=torch.float64)
            result.items[name] = torch.stack([part, torch.ones_like(part)], 1)
            result.chance[name] = sum(by_guessing[place] for place in places) / len(places)
    return result


def jaccard(scores: Tensor, right: Tensor, tie: float) -> float:
    """The index of the right candidates and as many of the highest, wrong ones first at ties."""
    k = int(right.sum())
    lowered = scores - tie * right
    chosen = lowered.topk(k).indices
    n_hits = int(right[chosen].sum())
    return n_hits / (2 * k - n_hits)


def chance(n: int, k: int) -> float:
    """The expected index of k drawn at random among n, of which k are right."""
    draws = math.comb(n, k)
    hits = range(max(0, 2 * k - n), k + 1)
    return sum(math.comb(k, i) * math.comb(n - k, k - i) / draws * i / (2 * k - i) for i in hits)
