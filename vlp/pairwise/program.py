"""How one tile is reduced and differentiated: the contract, and the general path by autograd."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from vlp.pairwise.reduction import (
    LOGSUMEXP,
    Gradients,
    Reduction,
    Tile,
    reduce_matrix,
    without_empty,
)


class Program(Protocol):
    """How one tile is reduced and differentiated."""

    # the scores arrive multiplied by shared[0], whose gradient the loop then takes from ⟨X, dX⟩
    prescaled: bool

    def forward(self, tile: Tile) -> tuple[Sequence[Tensor], Any]:
        """Partial statistics, and a memo: what backward can use instead of the scores.

        May overwrite the scores.
        """

    def backward(
        self, tile: Tile, memo: Any, statistics: list[Tensor], upstream: list[Tensor]
    ) -> Gradients:
        """Gradients of Σ upstream·statistics of this tile.

        `memo` is None where the tile was recomputed; statistics and upstream gradients are the
        tile's slices.
        """


class Recompute:
    """The general path: any tile function, differentiated by autograd on the recomputed tile."""

    prescaled = False

    def __init__(self, reduction: Reduction) -> None:
        self.reduction = reduction

    def forward(self, tile: Tile) -> tuple[Sequence[Tensor], Any]:
        matrices, n_row_kinds = self.reduction.function(tile), len(self.reduction.rows)
        partials = []
        for i, (matrix, kind) in enumerate(zip(matrices, self.reduction.kinds)):
            # A row statistic sums over columns.
            along_columns = i < n_row_kinds
            partials.append(reduce_matrix(matrix, kind, dim=1 if along_columns else 0))
        return partials, tile.scores

    def backward(
        self, tile: Tile, memo: Any, statistics: list[Tensor], upstream: list[Tensor]
    ) -> Gradients:
        # The tile again, as leaves of a graph of its own.
        scores = tile.scores if memo is None else memo
        groups = (scores, tile.row_values, tile.column_values, tile.shared)
        leaves = [tuple(_leaf(tensor) for tensor in group) for group in groups]
        with torch.enable_grad():
            scores, row_values, column_values, shared = leaves
            again = Tile(scores, row_values, column_values, shared, tile.offset)
            matrices = self.reduction.function(again)

        # Autograd starts at the matrices: their reduction is differentiated by its statistic.
        outputs, weights = [], []
        for i, (matrix, kind) in enumerate(zip(matrices, self.reduction.kinds)):
            if matrix.requires_grad:
                by_row = i < len(self.reduction.rows)
                outputs.append(matrix)
                weights.append(
                    _weight(matrix.detach(), kind, statistics[i], upstream[i], by_row=by_row)
                )

        differentiable = [leaf for leaf in chain(*leaves) if leaf.requires_grad]
        gradients = iter(torch.autograd.grad(outputs, differentiable, weights, allow_unused=True))
        by_group = []
        for group in leaves:
            by_group.append([next(gradients) if leaf.requires_grad else None for leaf in group])
        return Gradients(*by_group)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _weight(matrix: Tensor, kind: str, statistic: Tensor, upstream: Tensor, by_row: bool) -> Tensor:
    """∂(Σ upstream·statistic)/∂matrix: upstream for a sum, times e^{m − lse} for a log-sum-exp."""
    axis = 1 if by_row else 0
    weight = upstream.to(matrix.dtype).unsqueeze(axis).expand_as(matrix)
    if kind != LOGSUMEXP:
        return weight

    statistic = without_empty(statistic).to(matrix.dtype).unsqueeze(axis)
    return weight * (matrix - statistic).exp()
