"""How scores of matching and of other pairs lie: moments, overlap, AUC; tolerance within classes.

AUC         P(s⁺ > s⁻) + ½ P(s⁺ = s⁻) over matching and other scores; also of every query, whose own
            score competes with those of its other candidates alone
tolerance   mean of x_i · x_j over pairs i ≠ j of one class, and over all pairs the mean of that
            times whether the class is one
            (Wang and Liu 2021, "Understanding the Behaviour of Contrastive Loss")
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 20_000  # scores of a kind that are sorted; more are counted in bins
BINS = 1 << 16  # of a cosine, from −1 to 1
WIDE = 128  # bins of the overlap
_TILE_ROWS, _TILE_COLUMNS = 1024, 2048  # a tile of scores is 16 MiB in float64
_EQUAL = 1e-12  # two ways to the float64 product of the same rows differ by less


def auc(matching: Tensor, other: Tensor) -> float:
    """The AUC of scores [n] against [m], by sorting; ties count half."""
    sorted_other = other.double().sort().values
    matching = matching.double().contiguous()
    below = torch.searchsorted(sorted_other, matching - _EQUAL, right=False)
    up_to = torch.searchsorted(sorted_other, matching + _EQUAL, right=True)
    return float((below + up_to).double().mean()) / 2 / len(other)


def auc_of_histograms(matching: Tensor, other: Tensor) -> tuple[float, float]:
    """The AUC of two histograms [BINS] of scores, and by how much it may be wrong at most: half of
    the pairs that share a bin.
    """
    matching, other = matching.double(), other.double()
    matching, other = matching / matching.sum(), other / other.sum()
    below = other.cumsum(0) - other
    shared = float((matching * other).sum())
    return float((matching * below).sum()) + shared / 2, shared / 2


def histogram(scores: Tensor) -> Tensor:
    """[BINS] counts of cosines."""
    places = ((scores.double() + 1) / 2 * BINS).long().clamp(0, BINS - 1)
    return torch.bincount(places.flatten(), minlength=BINS)


@dataclass(frozen=True)
class PairScores:
    """How the scores of pairs lie beside those of all other combinations."""

    values: dict[str, float]  # moments, overlap and AUC of both kinds
    auc_by_image: Tensor  # [n] of each image, whose own text competes with all others
    auc_by_text: Tensor  # [n] the same of each text
    shares: tuple[Tensor, Tensor]  # [WIDE] each: of pairs' scores and of the others in wide bins


def pair_scores(image: Tensor, text: Tensor) -> PairScores:
    """The scores of n ≥ 2 pairs of unit rows [n, D]: each pair's own, and all others.

    `score_overlap` is Σ_b min(p_b, q_b) over the wide bins of both histograms; `auc_error` is by
    how much `auc` may be wrong at most, 0 where scores were sorted. Memory O(n + tile).
    """
    n = len(image)
    own = _own_scores(image, text)
    own_counts = histogram(own)

    # All n² scores in tiles: counts and sums, never the matrix.
    total, squares, counts = 0.0, 0.0, torch.zeros(BINS, dtype=torch.int64)
    above_others = torch.zeros(2, n, dtype=torch.float64)  # of images' and of texts' own scores
    every_other = []
    for rows, columns, scores in _tiles(image, text):
        above_others[0, rows] += _above(own[rows, None], scores).sum(1)
        above_others[1, columns] += _above(own[columns], scores).sum(0)

        others = scores[_is_other(rows, columns)]
        total, squares = total + float(others.sum()), squares + float(others.square().sum())
        counts += histogram(others)
        if n * (n - 1) <= EXACT:
            every_other.append(others)

    n_others = n * (n - 1)
    mean = total / n_others
    area, error = (
        (auc(own, torch.cat(every_other)), 0.0)
        if every_other
        else auc_of_histograms(own_counts, counts)
    )
    # In wide bins: in narrow ones few scores meet, however alike both kinds lie.
    shares = (own_counts.view(WIDE, -1).sum(1) / n, counts.view(WIDE, -1).sum(1) / n_others)
    values = {
        "score_mean": float(own.mean()),
        "score_sd": float(own.std(correction=0)),
        "other_score_mean": mean,
        "other_score_sd": max(0.0, squares / n_others - mean * mean) ** 0.5,
        "score_overlap": float(torch.minimum(*shares).sum()),
        "auc": area,
        "auc_error": error,
    }

    # A pair's own score ties with itself, which counted half.
    by_image, by_text = (above_others - 0.5) / (n - 1)
    return PairScores(values, by_image, by_text, shares)


def _own_scores(image: Tensor, text: Tensor) -> Tensor:
    """[n] float64 cosine of each pair; in tiles, or both kinds take a copy in float64."""
    pairs = zip(image.split(_TILE_ROWS), text.split(_TILE_ROWS))
    return torch.cat([(rows.double() * columns.double()).sum(1) for rows, columns in pairs])


def _tiles(image: Tensor, text: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, their float64 scores) over all n²."""
    for first_row in range(0, len(image), _TILE_ROWS):
        rows = slice(first_row, min(first_row + _TILE_ROWS, len(image)))
        of_rows = image[rows].double()
        for first_column in range(0, len(text), _TILE_COLUMNS):
            columns = slice(first_column, min(first_column + _TILE_COLUMNS, len(text)))
            yield rows, columns, of_rows @ text[columns].double().T


def _is_other(rows: slice, columns: slice) -> Tensor:
    """[rows, columns] bool: where a tile holds no pair's own score."""
    row_places = torch.arange(rows.start, rows.stop)
    return row_places[:, None] != torch.arange(columns.start, columns.stop)


def _above(own: Tensor, scores: Tensor) -> Tensor:
    """Where an own score is above others, as 1; where both are equal, as one half."""
    above = (scores < own - _EQUAL).double()
    return (above + (scores <= own + _EQUAL)) / 2


def tolerance(rows: Tensor, labels: Tensor) -> tuple[float, float]:
    """(mean over pairs of one class, mean over all pairs with those of other classes as zero) of
    x_i · x_j, i ≠ j, for unit rows [n, D] of classes [n]. NaN where no class has two rows.
    """
    # Σ_{i≠j} x_i·x_j of a class is |Σ x|² − Σ |x|².
    _, inverse, sizes = labels.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(sizes), rows.shape[1], dtype=torch.float64)
    squares = 0.0
    for tile, classes in zip(rows.split(_TILE_ROWS), inverse.split(_TILE_ROWS)):
        sums.index_add_(0, classes, tile.double())
        squares += float(tile.double().square().sum())
    total = float(sums.square().sum()) - squares

    n_pairs = int((sizes * (sizes - 1)).sum())
    n = len(rows)
    within = total / n_pairs if n_pairs else float("nan")
    return within, total / (n * (n - 1))
