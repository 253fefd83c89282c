"""How far a score can be trusted: Wilson intervals, bootstrap, and the paired bootstrap of a
difference.

A score is a ratio Σ numerator / Σ denominator over units that could have been drawn otherwise (an
image, with all its captions). `items` [U, 2] holds each unit's two parts: (hit, 1) for an accuracy,
(hits, captions) for image retrieval, (hit / class size, 1 / class size) for the mean per-class
recall. Every interval is at 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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
    # Exactly 0 and 1 at the ends, or rounding leaves the share outside of its own interval.
    low = max(0.0, centre - half) if hits > 0 else 0.0
    high = min(1.0, centre + half) if hits < n else 1.0
    return low, high


def interval(items: Tensor, seed: int = 0) -> tuple[float, float]:
    """Wilson for a plain accuracy (every unit 0 or 1, of weight 1), else the bootstrap's 2.5 and
    97.5 % quantiles.
    """
    # A plain accuracy has a closed form, sound at 0 and 1 where the bootstrap has no width.
    if _is_plain(items):
        return wilson(float(items[:, 0].sum()), len(items))
    return middle(resampled(items, seed))


def middle(values: Tensor) -> tuple[float, float]:
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
    """score(a) − score(b) on the same units, with the 95 % bounds of its paired bootstrap, or
    of its posterior for two shares on few units.

    The same units are drawn for both, so what makes a unit easy or hard for both models cancels.
    """
    if a.shape != b.shape:
        raise ValueError(f"paired scores need the same units, found {len(a)} and {len(b)}")

    if len(a) < FEW and _is_share(a) and _is_share(b):
        low, high = paired_posterior(a, b, seed)
    else:
        low, high = middle(resampled(a, seed) - resampled(b, seed))
    return score(a) - score(b), low, high


# --- few units ------------------------------------------------------------------------------------

FEW = 300  # units below which a bootstrap is too narrow
DRAWS = 20_000  # from a posterior


def paired_posterior(a: Tensor, b: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % bounds of the difference of two shares on the same few units, items [n, 2] each.

    Units weigh as drawn from a Dirichlet in which each of them has 1, and so has each of four made
    ones: both models right, either one, none, of the mean denominator. For accuracies that is a
    Dirichlet(1, 1, 1, 1) prior of the four counts of the 2×2 table. Of some width also where no
    unit differs, unlike a bootstrap.
    Source: Bowyer, Aitchison and Ivanova 2025, "Position: Don't use the CLT in LLM evals with fewer
    than a few hundred datapoints", for accuracies; for other shares the same with weights.
    """
    units = torch.cat([a, b], 1).double()  # numerator, denominator; of a, then of b
    both = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]], dtype=torch.float64)
    denominators = units[:, [1, 3]].mean(0)
    made = torch.stack([both * denominators, denominators.expand(4, 2)], 2).flatten(1)

    # Equal units are drawn together: a sum of gammas is a gamma.
    cells, counts = torch.cat([units, made]).unique(dim=0, return_counts=True)
    shape = counts.double().numpy()
    gammas = np.random.default_rng(seed).standard_gamma(shape, (DRAWS, len(shape)))
    parts = torch.from_numpy(gammas) @ cells
    return middle(parts[:, 0] / parts[:, 1] - parts[:, 2] / parts[:, 3])


def _is_share(items: Tensor) -> bool:
    """Whether every unit gives from none to all of its denominator, unlike a rank."""
    numerator, denominator = items.unbind(1)
    return bool(((numerator >= 0) & (numerator <= denominator)).all())


def _is_plain(items: Tensor) -> bool:
    """Whether the items are those of a plain accuracy: every unit 0 or 1, of weight 1."""
    numerator, denominator = items.double().unbind(1)
    is_hit_or_miss = (numerator == 0) | (numerator == 1)
    return bool((denominator == 1).all()) and bool(is_hit_or_miss.all())


# --- groups ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorstGroup:
    """The group of lowest accuracy, and how far the others are from it."""

    name: str
    accuracy: float
    interval: tuple[float, float]  # Wilson's
    gap: float  # from the best group
    n: int  # units of the group


def worst_group(hits: Tensor, groups: Sequence[str]) -> WorstGroup:
    """The worst of the groups of hits [n] (0 or 1) by accuracy; of equal ones the first."""
    of_group: dict[str, list[float]] = {}
    for hit, group in zip(hits.tolist(), groups, strict=True):
        of_group.setdefault(group, []).append(hit)

    accuracy = {name: sum(values) / len(values) for name, values in of_group.items()}
    name = min(accuracy, key=accuracy.__getitem__)
    values = of_group[name]
    bounds = wilson(sum(values), len(values))
    gap = max(accuracy.values()) - accuracy[name]
    return WorstGroup(name, accuracy[name], bounds, gap, len(values))
