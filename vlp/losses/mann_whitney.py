"""Mann-Whitney loss: every pair's score against every negative score of the batch.

    L = mean over i and over all k ≠ l of −log σ((s_ii − s_kl)/τ) = 1/(n·n(n−1)) Σ_{k≠l} F(s_kl)
    F(s) = Σ_i softplus((s − s_ii)/τ),   s_kl = x_k·t_l

x, t: [b, D] images and texts; τ is fixed. These are n³ comparisons. Up to `exact` candidates all
are made. Above, F and its slope are computed at nodes τ/8 apart (2·8/τ·n comparisons) and joined by
cubics: O(n²) work, with an error below 1e-7 a comparison in value and 3e-6/τ in slope (bounds of
Hermite interpolation: h⁴/384 and h³·√3/216 times the largest fourth derivative, 1/(8τ⁴)).

Relations:
- `infonce` compares a pair's score with those of its own row and column only

Papers:
- MW (arXiv 2510.00137): `objective: {mann_whitney: {tau: 0.01}}`

Needs: image, text

Cost: one pass over the pairs, which makes n³ comparisons up to `exact` candidates and O(n²) above;
O(b·D + 1/τ) memory

Use: where one threshold on the score must serve all queries: it maximises the area under the ROC
curve
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlp import dist
from vlp.losses._inputs import Inputs
from vlp.pairwise import SUM, Pairs, Reduction, Tile, softplus

NEEDS = frozenset({"image", "text"})
MIN_CANDIDATES = 2
BLOCK = 2**22  # comparisons at a time
NODES_A_TAU = 8
LIMIT = 1.01  # of the nodes: rounding takes cosines a little above 1


@dataclass(frozen=True)
class Options:
    tau: float = 0.01  # τ
    exact: int = 1024  # candidates up to which every comparison is made

    def __post_init__(self) -> None:
        if self.tau <= 0 or self.exact < 0:
            raise ValueError(f"expected tau > 0 and exact >= 0, found {self}")


def exported_scale(options: Options) -> float:
    """1/τ."""
    return 1 / options.tau


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    wide, τ = inputs.wide(), options.tau
    positives = pairs.gather((wide.image * wide.text).sum(1))  # [n]
    n = len(positives)

    # Few candidates: the tiles see the positives; many: the curve that stands for them.
    exact = n <= options.exact
    shared = [positives] if exact else curve(positives, τ)

    def losses(tile: Tile) -> tuple[Tensor, ...]:
        scores = tile.scores[0]
        if exact:
            (at,) = tile.shared
            values, _ = Compare.apply(scores, at, τ)
        else:
            nodes, slopes = tile.shared
            values = interpolate(scores, nodes, slopes, τ / NODES_A_TAU)
        return (values.masked_fill(tile.positive, 0),)

    reduction = Reduction(losses, rows=(SUM,))
    (rows,) = pairs.reduce(reduction, [inputs.image], [inputs.text], shared=shared)
    return pairs.mean(rows) / (n * (n - 1))


class Compare(torch.autograd.Function):
    """(scores s of any shape, positives [n], τ) -> F(s) and τF'(s), a block of positives at a time.

    Backward makes the comparisons again: a tile times n of them would not fit.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, positives: Tensor, τ: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(scores, positives)
        ctx.τ = τ
        total, slope = torch.zeros_like(scores), torch.zeros_like(scores)
        for gap, _ in _gaps(scores, positives, τ):
            # In this order: the sigmoid overwrites the gaps.
            total += softplus(gap).sum(0)
            slope += gap.sigmoid_().sum(0)
        return total, slope

    @staticmethod
    @dist.first_order
    def backward(ctx: Any, d_total: Tensor, d_slope: Tensor) -> tuple[Tensor, Tensor, None]:
        scores, positives = ctx.saved_tensors
        d_scores, d_positives = torch.zeros_like(scores), torch.empty_like(positives)
        for gap, block in _gaps(scores, positives, ctx.τ):
            # softplus' = σ, and σ' = σ (1 − σ).
            p = gap.sigmoid_()
            d_gap = p * (d_total + d_slope * (1 - p)) / ctx.τ
            d_scores += d_gap.sum(0)
            d_positives[block] = -d_gap.flatten(1).sum(1)
        return d_scores, d_positives, None


def _gaps(scores: Tensor, positives: Tensor, τ: float) -> Iterator[tuple[Tensor, slice]]:
    """((s − s_ii)/τ, [positives of a block, *shape of the scores], and the block)."""
    # As many positives at a time as keep the comparisons within BLOCK.
    size = max(BLOCK // scores.numel(), 1)
    for start in range(0, len(positives), size):
        block = slice(start, start + size)
        compared = positives[block].view(-1, *[1] * scores.dim())
        yield (scores - compared) / τ, block


def curve(positives: Tensor, τ: float) -> tuple[Tensor, Tensor]:
    """F and τF' at nodes τ/8 apart over [−1.01, 1.01]."""
    # F is a sum over positives whatever s is, so its nodes are computed as scores are.
    h = τ / NODES_A_TAU
    n_nodes = int(2 * LIMIT / h) + 2
    nodes = torch.arange(n_nodes, device=positives.device).to(positives) * h - LIMIT
    return Compare.apply(nodes, positives, τ)


def interpolate(
    scores: Tensor,
    values: Tensor,  # F at the nodes
    slopes: Tensor,  # τF' at the nodes
    h: float,  # distance of the nodes
) -> Tensor:
    """F of each score, by the cubic through value and slope at the nodes either side of it."""
    place = (scores + LIMIT) / h
    left = place.detach().floor().long().clamp(0, len(values) - 2)
    t = place - left

    # Hermite's cubic on [0, 1]; slopes per τ become slopes per node distance.
    f, g = values[left], values[left + 1]
    a, b = slopes[left] / NODES_A_TAU, slopes[left + 1] / NODES_A_TAU
    return f + t * (a + t * (3 * (g - f) - 2 * a - b + t * (2 * (f - g) + a + b)))
