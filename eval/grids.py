"""Choices among several pictures and several texts: which belong to which, scored strictly.

A `Grid` holds P pictures and C texts and says which texts are right for each picture. With s[p, c]
the cosines and T_p the right texts of picture p,

    text     every picture chooses its texts:  min or max_{c ∈ T_p} s[p, c] > max_{c ∉ T_p} s[p, c]
    image    every text chooses its pictures, the same over columns
    acc      both; over a single picture the text score alone

"all" takes the minimum (every right one above every wrong one), "any" the maximum. Ties are wrong.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from vlp.eval import choices, embed, metrics
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import Picture
from vlp.eval.result import TaskResult

Which = Literal["all", "any"]  # of several right ones must win
Right = tuple[tuple[int, ...], ...]  # of each picture, the texts that are right for it
_EXACT = 6  # scores of a grid whose orders are counted; more are drawn
_DRAWS = 100_000
_DRAWN_SCORES = 20_000_000  # of a large grid fewer orders are drawn: bounded memory


@dataclass(frozen=True)
class Grid:
    """Pictures and texts, and which of them belong together."""

    pictures: tuple[Picture, ...]
    texts: tuple[str, ...]
    right: Right
    group: str = ""  # the subset, relation or phenomenon that it tests


def matched(pictures: Sequence[Picture], texts: Sequence[str], group: str = "") -> Grid:
    """A grid whose first text belongs to the first picture, the second to the second, and so on."""
    right = tuple((place,) for place in range(len(pictures)))
    return Grid(tuple(pictures), tuple(texts), right, group)


@dataclass
class GridSet:
    """An evaluation set of grids, opened and checked."""

    grids: Sequence[Grid]
    skipped: list[str]  # images that are not there
    name: str = ""
    counts: dict[str, int] = field(default_factory=dict)  # what else reading has counted

    def __post_init__(self) -> None:
        choices.need_texts((grid.pictures[0], grid.texts) for grid in self.grids)


def cosines(encoder: Encoder, grids: Sequence[Grid], context: Context) -> list[Tensor]:
    """[P, C] float64 cosines of each grid."""
    pictures = list(itertools.chain.from_iterable(grid.pictures for grid in grids))
    texts = list(itertools.chain.from_iterable(grid.texts for grid in grids))
    # Texts first: where the model cannot read them, no time goes into pictures.
    text = embed.texts(encoder, texts, context).double()
    image = embed.images(encoder, pictures, context).double()

    of_grids = zip(
        image.split([len(grid.pictures) for grid in grids]),
        text.split([len(grid.texts) for grid in grids]),
    )
    return [pictures_of_grid @ texts_of_grid.T for pictures_of_grid, texts_of_grid in of_grids]


def mask(right: Right, n_texts: int) -> Tensor:
    """[P, C] bool: where a text is right for a picture."""
    belongs = torch.zeros(len(right), n_texts, dtype=torch.bool)
    for row, places in zip(belongs, right):
        row[list(places)] = True
    return belongs


def rows_right(scores: Tensor, belongs: Tensor, tie: float, which: Which) -> Tensor:
    """[...] bool: where every row of [..., P, C] scores has its right ones above its wrong ones.

    A row without right or without wrong ones has nothing to choose.
    """
    worst = torch.inf if which == "all" else -torch.inf
    of_right = scores.masked_fill(~belongs, worst)
    reached = of_right.amin(-1) if which == "all" else of_right.amax(-1)
    to_beat = scores.masked_fill(belongs, -torch.inf).amax(-1)

    chooses = belongs.any(-1) & ~belongs.all(-1)
    return (metrics.strictly_above(reached, to_beat, tie) | ~chooses).all(-1)


def hits(scores: Sequence[Tensor], grids: Sequence[Grid], which: Which) -> dict[str, Tensor]:
    """[n] float64 of text, image and acc; of acc alone where every grid has one picture."""
    # Rows and columns are told apart by themselves: each has a spread of its own.
    row_tie = metrics.tie_of_groups(itertools.chain.from_iterable(scores))
    column_tie = metrics.tie_of_groups(itertools.chain.from_iterable(s.T for s in scores))
    by_text, by_image = [], []
    for of_grid, grid in zip(scores, grids):
        belongs = mask(grid.right, len(grid.texts))
        by_text.append(bool(rows_right(of_grid, belongs, row_tie, which)))
        by_image.append(bool(rows_right(of_grid.T, belongs.T, column_tie, which)))

    text = torch.tensor(by_text, dtype=torch.float64)
    if all(len(grid.pictures) == 1 for grid in grids):
        return {"acc": text}
    image = torch.tensor(by_image, dtype=torch.float64)
    return {"text_acc": text, "image_acc": image, "acc": text * image}


@lru_cache(maxsize=1024)
def chance(right: Right, n_texts: int, which: Which) -> dict[str, float]:
    """The share of text, image and acc that random scores reach: rows and columns by counting, both
    by counting the orders of up to six scores, else from 100,000 drawn ones (of more than 200
    scores from fewer).
    """
    belongs = mask(right, n_texts)
    by_row = [_of_row(int(row.sum()), len(row), which) for row in belongs]
    by_column = [_of_row(int(column.sum()), len(column), which) for column in belongs.T]
    both = math.prod(by_row)
    if len(right) > 1:
        scores = _orders(belongs.numel()).view(-1, *belongs.shape)
        text = rows_right(scores, belongs, 0.0, which)
        image = rows_right(scores.mT, belongs.T, 0.0, which)
        both = float((text & image).double().mean())
    return {"text_acc": math.prod(by_row), "image_acc": math.prod(by_column), "acc": both}


def _of_row(n_right: int, n: int, which: Which) -> float:
    """By guessing, that all right ones are on top, or that one of them is."""
    if n_right in (0, n):
        return 1.0
    return 1 / math.comb(n, n_right) if which == "all" else n_right / n


@lru_cache(maxsize=8)
def _orders(n: int) -> Tensor:
    """[orders, n] scores: all orders of n, or drawn ones where there are too many."""
    if n <= _EXACT:
        return torch.tensor(list(itertools.permutations(range(n))), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    n_draws = min(_DRAWS, max(1, _DRAWN_SCORES // n))
    return torch.rand(n_draws, n, generator=generator, dtype=torch.float64)


def chances(grids: Sequence[Grid], which: Which, score: str) -> list[float]:
    """Of each grid what guessing gives."""
    return [chance(grid.right, len(grid.texts), which)[score] for grid in grids]


def run(
    name: str,  # of the evaluation set
    encoder: Encoder,
    data: GridSet,
    context: Context,
    which: Which = "all",
    scores: Sequence[str] = ("text_acc", "image_acc", "acc"),  # to report, where there are such
    of_groups: str = "acc",  # the score that is also reported for each group
) -> TaskResult:
    """Accuracies over all grids, and of every group and their mean where there are several, or
    where no score over all is asked for.
    """
    grids = data.grids
    every_hit = hits(cosines(encoder, grids, context), grids, which)
    result = TaskResult(
        name,
        counts={"items": len(grids), **data.counts, "skipped": len(data.skipped)},
        digest=context.digest(
            list(itertools.chain.from_iterable(grid.pictures for grid in grids)),
            [(grid.texts, grid.right, grid.group) for grid in grids],
            which,
        ),
    )
    for score in [score for score in scores if score in every_hit]:
        result.items[score] = choices.accuracy(every_hit[score])
        result.chance[score] = sum(chances(grids, which, score)) / len(grids)

    groups = [grid.group for grid in grids]
    if len(set(groups)) > 1 or not scores:
        by_guessing = chances(grids, which, of_groups)
        choices.score_groups(result, every_hit[of_groups], by_guessing, groups)
    return result
