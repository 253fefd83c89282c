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
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vlp.eval import metrics


def found(
    queries: Tensor,  # [n, D] unit rows
    candidates: Tensor,  # [m, D] unit rows
    right: Sequence[Sequence[int]],  # of each query, the places of its right candidates
    k: int,  # length of the lists, at least; those with more right answers are as long as these
) -> Iterator[Tensor]:  # [max(k, R)] bool, or [m]
    """For each query where its ranked list is right. Ties count against the model: a wrong
    candidate as high as a right one stands before it.
    """
    tie = metrics.tie_of_products(queries, candidates)
    candidates = candidates.double()
    for query, places in zip(queries.double(), right):
        belongs = torch.zeros(len(candidates), dtype=torch.bool)
        belongs[list(places)] = True
        scores = candidates @ query - tie * belongs.double()

        length = min(len(candidates), max(k, len(places)))
        yield belongs[scores.topk(length).indices]


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
