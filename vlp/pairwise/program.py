"""How one tile is reduced and differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vlp.pairwise.reduction import LOGSUMEXP, Gradients, Reduction, Tile, reduce_matrix


class Program(Protocol):
    """How one tile is reduced and differentiated."""

    # the scores arrive multiplied by shared[0], whose gradient the loop then takes from ⟨X, dX⟩
    prescaled: bool

    def forward(self, tile: Tile) -> tuple[Sequence[Tensor], Any]:
        """Partial statistics, and what backward can use instead of the scores (may overwrite them)."""

    def backward(
        self, tile: Tile, memo: Any, statistics: list[Tensor], upstream: list[Tensor]
    ) -> Gradients:
        """`memo` is None where the tile was recomputed; statistics and upstream gradients are the
        tile's slices.
        """


class Recompute:
    """The general path: any tile function, differentiated by autograd on the recomputed tile."""

    prescaled = False

    def __init__(self, reduction: Reduction) -> None:
        self.reduction = reduction

    def forward(self, tile: Tile) -> tuple[Sequence[Tensor], Any]:
        matrices, n_rows = self.reduction.function(tile), len(self.reduction.rows)
        kinds = (*self.reduction.rows, *self.reduction.columns)
        partials = [
            reduce_matrix(m, k, dim=int(i < n_rows))
            for i, (m, k) in enumerate(zip(matrices, kinds))
        ]
        return partials, tile.scores

    def backward(
        self, tile: Tile, memo: Any, statistics: list[Tensor], upstream: list[Tensor]
    ) -> Gradients:
        groups = (memo or tile.scores, tile.row_values, tile.column_values, tile.shared)
        leaves = [
            [t.detach().requires_grad_(t.is_floating_point()) for t in group] for group in groups
        ]
        flat = [t for group in leaves for t in group if t.requires_grad]
        with torch.enable_grad():
            matrices = self.reduction.function(Tile(*map(tuple, leaves), tile.offset))
        n_rows, kinds = len(self.reduction.rows), (*self.reduction.rows, *self.reduction.columns)
        weights = [
            _weight(m.detach(), kind, s, u, by_row=i < n_rows)
            for i, (m, kind, s, u) in enumerate(zip(matrices, kinds, statistics, upstream))
        ]
        live = [(m, w) for m, w in zip(matrices, weights) if m.requires_grad]
        found = iter(
            torch.autograd.grad([m for m, _ in live], flat, [w for _, w in live], allow_unused=True)
        )
        return Gradients(
            *([next(found) if t.requires_grad else None for t in group] for group in leaves)
        )


def _weight(matrix: Tensor, kind: str, statistic: Tensor, upstream: Tensor, by_row: bool) -> Tensor:
    """∂(Σ upstream·statistic)/∂matrix: the upstream itself for a sum, times e^{m − lse} for a
    log-sum-exp.
    """
    axis = 1 if by_row else 0
    weight = upstream.to(matrix.dtype).unsqueeze(axis).expand_as(matrix)
    if kind != LOGSUMEXP:
        return weight
    # An empty log-sum-exp (−∞) has no entries that could carry a gradient.
    statistic = (
        statistic.masked_fill(statistic == -torch.inf, torch.inf).to(matrix.dtype).unsqueeze(axis)
    )
    return weight * (matrix - statistic).exp()
