"""How scores of matching and of other pairs lie: moments, overlap, AUC; tolerance within classes.

AUC         P(s⁺ > s⁻) + ½ P(s⁺ = s⁻) over matching and other scores
tolerance   mean of x_i · x_j over pairs i ≠ j of one class, and over all pairs the mean of that
            times whether the class is one
            (Wang and Liu 2021, "Understanding the Behaviour of Contrastive Loss")
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 20_000  # scores of a kind that are sorted; more are counted in bins
BINS = 1 << 16  # of a cosine, from −1 to 1
WIDE = 128  # bins of the overlap
_TILE = 1024


def auc(matching: Tensor, other: Tensor) -> float:
    """The AUC of scores [n] against [m], by sorting; ties count half."""
    sorted_other = other.double().sort().values
    matching = matching.double().contiguous()
    below = torch.searchsorted(sorted_other, matching, right=False)
    up_to = torch.searchsorted(sorted_other, matching, right=True)
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


def pair_scores(image: Tensor, text: Tensor) -> dict[str, float]:
    """Moments, overlap and AUC of the scores of [n, D] pairs: each pair's own, and all others.

    `score_overlap` is Σ_b min(p_b, q_b) over the wide bins of both histograms.
    """
    n = len(image)
    own = (image.double() * text.double()).sum(1)
    own_counts = histogram(own)

    # All n² scores in tiles: counts and sums, never the matrix.
    total, squares, counts = 0.0, 0.0, torch.zeros(BINS, dtype=torch.int64)
    every_other = []
    for start in range(0, n, _TILE):
        rows = slice(start, start + _TILE)
        scores = image[rows].double() @ text.double().T
        is_other = torch.ones_like(scores, dtype=torch.bool)
        places = torch.arange(len(scores))
        is_other[places, places + start] = False
        others = scores[is_other]

        total, squares = total + float(others.sum()), squares + float(others.square().sum())
        counts += histogram(others)
        if n * (n - 1) <= EXACT:
            every_other.append(others)

    n_others = n * (n - 1)
    mean = total / n_others
    area = (
        auc(own, torch.cat(every_other))
        if every_other
        else auc_of_histograms(own_counts, counts)[0]
    )
    # In wide bins: in narrow ones few scores meet, however alike both kinds lie.
    shares = (own_counts.view(WIDE, -1).sum(1) / n, counts.view(WIDE, -1).sum(1) / n_others)
    overlap = torch.minimum(*shares).sum()
    return {
        "score_mean": float(own.mean()),
        "score_sd": float(own.std(correction=0)),
        "other_score_mean": mean,
        "other_score_sd": max(0.0, squares / n_others - mean * mean) ** 0.5,
        "score_overlap": float(overlap),
        "auc": area,
    }


def tolerance(rows: Tensor, labels: Tensor) -> tuple[float, float]:
    """(mean over pairs of one class, mean over all pairs with those of other classes as zero) of
    x_i · x_j, i ≠ j, for unit rows [n, D] of classes [n]. NaN where no class has two rows.
    """
    # Σ_{i≠j} x_i·x_j of a class is |Σ x|² − Σ |x|².
    _, inverse, sizes = labels.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(sizes), rows.shape[1], dtype=torch.float64)
    sums.index_add_(0, inverse, rows.double())
    total = float(sums.square().sum() - rows.double().square().sum())

    n_pairs = int((sizes * (sizes - 1)).sum())
    n = len(rows)
    within = total / n_pairs if n_pairs else float("nan")
    return within, total / (n * (n - 1))
