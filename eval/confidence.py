"""How far a score can be trusted: Wilson intervals, bootstrap, and the paired bootstrap of a
difference.

A score is a ratio Σ numerator / Σ denominator over units that could have been drawn otherwise (an
image, with all its captions). `items` [U, 2] holds each unit's two parts: (hit, 1) for an accuracy,
(hits, captions) for image retrieval, (hit / class size, 1 / class size) for the mean per-class
recall. Every interval is at 95 %.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Z = 1.959963984540054  # the normal quantile at 97.5 %
RESAMPLES = 1000


def score(items: Tensor) -> float:
    """Σ numerator / Σ denominator."""
    numerator, denominator = items.double().sum(0).tolist()
    return numerator / denominator


def wilson(hits: float, n: int, z: float = Z) -> tuple[float, float]:
    """The Wilson score interval of a share of `hits` in `n` (Wilson 1927): sound near 0 and 1,
    where ±1.96 σ is not.
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"expected 0 <= hits <= n and n >= 1, found {hits} of {n}")

    # The shares p at which `share` lies z standard errors of p away: the roots of a quadratic.
    share = hits / n
    shrink = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def interval(items: Tensor, seed: int = 0) -> tuple[float, float]:
    """Wilson for a plain accuracy (every unit 0 or 1, of weight 1), else the bootstrap's 2.5 and
    97.5 % quantiles.
    """
    # A plain accuracy has a closed form, sound at 0 and 1 where the bootstrap has no width.
    numerator, denominator = items.double().unbind(1)
    is_hit_or_miss = (numerator == 0) | (numerator == 1)
    if bool((denominator == 1).all()) and bool(is_hit_or_miss.all()):
        return wilson(float(numerator.sum()), len(items))
    return _middle(resampled(items, seed))


def _middle(values: Tensor) -> tuple[float, float]:
    """The bounds of the middle 95 % of values [resamples]."""
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(values, bounds).tolist()
    return low, high


def resampled(items: Tensor, seed: int = 0, resamples: int = RESAMPLES) -> Tensor:
    """[resamples] scores of as many units drawn with replacement. What they compete with (the
    gallery) stays.
    """
    generator = torch.Generator().manual_seed(seed)
    items, n = items.double(), len(items)
    at_once = max(1, 2_000_000 // n)  # resamples drawn together: bounded memory, few calls

    scores = []
    for done in range(0, resamples, at_once):
        drawn = torch.randint(n, (min(at_once, resamples - done), n), generator=generator)
        parts = items[drawn].sum(1)
        scores.append(parts[:, 0] / parts[:, 1])
    # A resample may hold no denominator at all, such as no unit of a class.
    return torch.cat(scores).nan_to_num(0.0)


def paired_difference(a: Tensor, b: Tensor, seed: int = 0) -> tuple[float, float, float]:
    """score(a) − score(b) on the same units, with the 95 % bounds of its paired bootstrap.

    The same units are drawn for both, so what makes a unit easy or hard for both models cancels.
    """
    if a.shape != b.shape:
        raise ValueError(f"paired scores need the same units, found {len(a)} and {len(b)}")

    low, high = _middle(resampled(a, seed) - resampled(b, seed))
    return score(a) - score(b), low, high
