"""Measures of ranked lists with several right answers, or with answers of several grades.

A list is what a query finds, best first: `hits` [k] bool, or `gains` [k] of its grades. R is the
number of right answers that there are.

    precision@r       Σ_{i ≤ r} hit_i / r
    R-precision       precision@R
    mAP@R             1/R Σ_{r ≤ R} precision@r · hit_r
    DCG@k             Σ_{r ≤ k} gain_r / log2(1 + r); nDCG: over that of the best order
    ERR               Σ_r 1/r · p_r Π_{i < r} (1 − p_i), p = (2^gain − 1) / 2^max_gain
    RBP               (1 − p) Σ_r gain_r p^{r−1}, gains in [0, 1]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from vlp.eval import metrics

_TILE = 64  # queries that are scored together


def found(
    queries: Tensor,  # [n, D] unit rows
    candidates: Tensor,  # [m, D] unit rows
    right: Sequence[Sequence[int]],  # of each query, the places of its right candidates
    k: int,  # length of the lists, at least; those with more right answers are as long as these
) -> Iterator[Tensor]:  # [max(k, R)] bool, or [m]
    """For each query where its ranked list is right. Ties count against the model: a wrong
    candidate as high as a right one stands before it.
    """
    gains = [dict.fromkeys(places, 1.0) for places in right]
    for of_query in graded(queries, candidates, gains, k):
        yield of_query > 0


def graded(
    queries: Tensor,  # [n, D] unit rows
    candidates: Tensor,  # [m, D] unit rows
    gains: Sequence[Mapping[int, float]],  # of each query, place -> grade; all others have 0
    k: int,  # length of the lists, at least; those with more grades are as long as these
) -> Iterator[Tensor]:  # [max(k, R)] float64, or [m]
    """The grades of each query's ranked list. Ties count against the model: of candidates as high
    the lower grade stands first.
    """
    tie = metrics.tie_of_products(queries, candidates)
    candidates = candidates.double()
    tiles = (tile.double() @ candidates.T for tile in queries.split(_TILE))
    for scores, of_query in zip(chain.from_iterable(tiles), gains):
        grades = torch.zeros(len(candidates), dtype=torch.float64)
        grades[list(of_query)] = torch.tensor(list(of_query.values()), dtype=torch.float64)

        # The highest grade steps back by a whole tie, the others in proportion.
        highest = grades.max().clamp_min(torch.finfo(torch.float64).tiny)
        length = min(len(candidates), max(k, len(of_query)))
        order = (scores - tie * grades / highest).topk(length).indices
        yield grades[order]


def r_precision(hits: Tensor, n_right: int) -> float:
    """The share of right ones among the first R."""
    return float(hits[:n_right].double().sum()) / n_right


def map_at_r(hits: Tensor, n_right: int) -> float:
    """The mean over the first R places of the precision there, zero where the place is wrong."""
    first = hits[:n_right].double()
    precision = first.cumsum(0) / torch.arange(1, len(first) + 1, dtype=torch.float64)
    return float((precision * first).sum()) / n_right


def ndcg(gains: Tensor, every_gain: Tensor, k: int) -> float:
    """DCG@k of a ranked list over that of the best order of all grades; 0 if nothing is right."""
    best = every_gain.double().sort(descending=True).values
    ideal = _dcg(best[:k])
    return _dcg(gains[:k]) / ideal if ideal else 0.0


def _dcg(gains: Tensor) -> float:
    ranks = torch.arange(1, len(gains) + 1, dtype=torch.float64)
    return float((gains.double() / (1 + ranks).log2()).sum())


def expected_reciprocal_rank(gains: Tensor, max_gain: float) -> float:
    """How soon somebody who reads down the list is satisfied."""
    stops = (2 ** gains.double() - 1) / 2**max_gain
    ranks = torch.arange(1, len(gains) + 1, dtype=torch.float64)
    reached = torch.cat([torch.ones(1, dtype=torch.float64), (1 - stops).cumprod(0)[:-1]])
    return float((stops * reached / ranks).sum())


def rank_biased_precision(gains: Tensor, persistence: float) -> float:
    """What somebody finds who goes on to the next with this probability (Moffat, Zobel 2008)."""
    places = torch.arange(len(gains), dtype=torch.float64)
    return float((1 - persistence) * (gains.double() * persistence**places).sum())


# --- by guessing ----------------------------------------------------------------------------------


def chance(n_right: int, n: int, k: int) -> dict[str, float]:
    """What a random order of n candidates reaches with R right ones among them: recall@k,
    R-precision and mAP@R.
    """
    share = n_right / n
    # Given a hit at rank r, each of the r − 1 before it is right with probability (R−1)/(n−1).
    others = (n_right - 1) / max(1, n - 1)
    by_rank = [share * (1 + (r - 1) * others) / r for r in range(1, n_right + 1)]
    return {
        f"recall@{k}": 1 - math.comb(n - n_right, k) / math.comb(n, min(k, n)),
        "r_precision": share,
        "map_at_r": sum(by_rank) / n_right,
    }


def graded_chance(
    gains: Sequence[float],  # of a query's judged candidates; all others have 0
    n: int,  # candidates
    k: int,
    max_gain: float,
    persistence: float,
) -> dict[str, float]:
    """What a random order of n candidates reaches on average: nDCG@k, ERR and RBP over k places."""
    places = range(1, min(k, n) + 1)
    mean_gain = sum(gains) / n
    discounts = sum(1 / math.log2(1 + place) for place in places)
    best = _dcg(torch.tensor(sorted(gains, reverse=True)[:k], dtype=torch.float64))

    # The mean over draws of Π (1 − p) among the first r: what is left of those who read on.
    left = _mean_products([1 - (2**gain - 1) / 2**max_gain for gain in gains], n, len(places))
    discounted = sum(persistence ** (place - 1) for place in places)
    return {
        f"ndcg@{k}": mean_gain * discounts / best,
        f"err@{k}": sum((left[place - 1] - left[place]) / place for place in places),
        f"rbp@{k}": (1 - persistence) * mean_gain / max_gain * discounted,
    }


def _mean_products(factors: Sequence[float], n: int, most: int) -> list[float]:
    """For r = 0 … `most` the mean product of r of n numbers drawn without replacement, which are
    these factors and ones.
    """
    # Of the subsets of r among m factors r in m hold the last one.
    of_factors = [1.0, *[0.0] * most]
    for m, factor in enumerate(factors, 1):
        for r in range(min(m, most), 0, -1):
            with_last, without = r / m, (m - r) / m
            of_factors[r] = without * of_factors[r] + with_last * factor * of_factors[r - 1]

    # Of all n: j of the r drawn are factors, the others ones.
    n_factors = len(factors)
    means = []
    for r in range(most + 1):
        mean = 0.0
        for j in range(min(r, n_factors) + 1):
            ways = math.comb(n_factors, j) * math.comb(n - n_factors, r - j)
            mean += ways / math.comb(n, r) * of_factors[j]
        means.append(mean)
    return means
