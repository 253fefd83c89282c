"""What a certainty is worth: hits over the share of queries that is kept, and by their certainty.

Queries of one certainty stand together: each counts as the mean of them, whatever their order.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
BINS = 10


def kept(hits: Tensor, certainty: Tensor, shares: tuple[float, ...] = SHARES) -> list[float]:
    """The mean of `hits` [n] over the most certain share of the queries, for each share; at least
    one query is kept. `certainty` [n]: higher is more certain.
    """
    ordered = _ordered(hits, certainty)
    means = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1)
    places = [max(1, round(share * len(ordered))) - 1 for share in shares]
    return means[places].tolist()


def by_bin(hits: Tensor, certainty: Tensor, n_bins: int = BINS) -> list[float]:
    """The mean of `hits` in bins of equally many queries, the least certain first; fewer bins where
    there are fewer queries.
    """
    ordered = _ordered(hits, certainty).flip(0)
    bins = torch.tensor_split(ordered, min(n_bins, len(ordered)))
    return [values.mean().item() for values in bins]


def spearman(values: list[float]) -> float:
    """Spearman's correlation of values with their places: 1 where they rise throughout, −1 where
    they fall; 0 where all are equal, or there is one.
    """
    ranks = _ranks(torch.tensor(values, dtype=torch.float64))
    places = torch.arange(len(values), dtype=torch.float64)
    ranks, places = ranks - ranks.mean(), places - places.mean()
    scale = ranks.norm() * places.norm()
    return 0.0 if scale == 0 else ((ranks @ places) / scale).item()


def _ordered(hits: Tensor, certainty: Tensor) -> Tensor:
    """The hits as float64, the most certain first, each the mean of those of its certainty."""
    if len(hits) != len(certainty) or not len(hits):
        raise ValueError(f"{len(hits)} hits and {len(certainty)} certainties; expected as many")
    if certainty.isnan().any():
        raise ValueError(f"{int(certainty.isnan().sum())} of {len(certainty)} certainties are NaN")

    levels, level, counts = certainty.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, level, hits.double())
    means = sums / counts
    return means[level.sort(descending=True).values]


def _ranks(values: Tensor) -> Tensor:
    """The rank of each value; equal ones have the mean of theirs."""
    _, level, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[level]
