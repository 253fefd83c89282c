"""The face of the engine: `Backend` says how and over which ranks; `Pairs` is the engine at one
step, used by losses.

Everything a loss takes from here obeys one convention (see `vlp.dist`): the average over ranks of
the values that ranks return has exactly the value and the gradient of the single-process term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlp import dist
from vlp.pairwise import exchange, tiled
from vlp.pairwise.backend import Backend
from vlp.pairwise.reduction import (
    MARGIN,
    ROW_MARGIN,
    SOFTPLUS,
    SUM,
    Block,
    Reduction,
    Tile,
    logsumexp,
)


@dataclass(frozen=True)
class Pairs:
    """Reductions over all (row, candidate) pairs of a group of ranks, at one step.

    Embeddings are this rank's [b, D] unit rows; results are for this rank's own rows and own
    columns, against the candidates of the whole group.
    """

    backend: Backend
    group: dist.Group

    def candidates(self, n_rows: int) -> int:
        """n: the candidates of a row."""
        return self.group.size * n_rows

    @classmethod
    def at(cls, backend: Backend, step: int | None = None) -> Pairs:
        return cls(backend, backend.group(step or 0))

    @property
    def alone(self) -> Pairs:
        """The same for columns that every rank holds whole, like a queue: they are gathered from
        nobody, and must not need a gradient.
        """
        return replace(self, group=dist.Group((self.group.ranks[self.group.index],)))

    # Reductions of scores

    def reduce(
        self,
        reduction: Reduction,
        left: Sequence[Tensor],  # k matrices [b, D_k]
        right: Sequence[Tensor],  # k matrices [c, D_k], this rank's columns
        *,
        row_values: Sequence[Tensor] = (),  # [b]
        column_values: Sequence[Tensor] = (),  # [c]
        shared: Sequence[Tensor] = (),
        paired: bool = True,  # column i is row i's own pair
    ) -> tuple[Tensor, ...]:
        """The general form: any tile function over any score matrices. Row statistics [b], column
        statistics [c].

        `shared` tensors are seen by every tile; differentiable ones must be equal on all ranks (the
        scale, gathered diagonals), and their gradients are sums over this rank's own rows.
        """
        left, right = _same_dtype(left, right)
        offset = 0 if paired else None
        block = Block(left, right, tuple(row_values), tuple(column_values), tuple(shared), offset)
        return exchange.reduce(reduction, block, self.backend.execution(self.group, block))

    def logsumexp(
        self, image: Tensor, text: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z = scale·x_i·t_j: LSE_{j≠i} z_ij [b], LSE_{j≠i} z_ji [b] and the positive z_ii [b].

        The positive is excluded: with it, r_i − z_ii cancels for well-aligned pairs. −∞ where there
        is no other.
        """
        rows, positive, columns = self.reduce(MARGIN, [image], [text], shared=[_wide(scale, image)])
        return rows, columns, positive

    def margin_logsumexp(self, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """q_i = LSE_{j≠i} z_ij − z_ii of the rows and likewise of the columns, [b] each.

        InfoNCE is the mean of softplus(q), decoupled contrastive learning the mean of q, and 1 −
        P_i = σ(q_i).
        """
        rows, columns, positive = self.logsumexp(image, text, scale)
        return rows - positive, columns - positive

    def row_logsumexp(
        self,
        left: Tensor,
        right: Tensor,
        scale: Tensor,
        *,
        valid: Tensor | None = None,
        paired: bool = False,
    ) -> Tensor:
        """LSE_j scale·l_i·r_j [b] over all columns of the group, in one direction.

        right: [c, D], this rank's columns (hard captions [b·K, D], or the rows themselves for a
        modality with itself); valid: [c] bool, columns that take part; paired: leave out j = i. −∞
        where no column remains.
        """
        masks = [] if valid is None else [_mask(valid, left)]
        shared = [_wide(scale, left)]
        return self.reduce(
            ROW_MARGIN, [left], [right], column_values=masks, shared=shared, paired=paired
        )[0]

    def softplus_sum(
        self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """z = scale·x_i·t_j + bias: Σ_{j≠i} log(1 + e^{z_ij}) [b] and the positive z_ii [b]."""
        shared = [_wide(scale, image), _wide(bias, image)]
        return self.reduce(SOFTPLUS, [image], [text], shared=shared)

    def multiples_logsumexp(
        self, image: Tensor, text: Tensor, scale: Tensor, multiples: Sequence[float]
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """For each multiple m: (LSE_{j≠i} m·z_ij, LSE_{j≠i} m·z_ji), [b] each; and the positive
        z_ii. One pass.
        """
        reduction = _multiples(tuple(multiples))
        found = self.reduce(reduction, [image], [text], shared=[_wide(scale, image)])
        k = len(multiples)
        return list(zip(found[:k], found[k + 1 :])), found[k]

    def linear_sums(self, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_j z_ij [b] and Σ_j z_ji [b], the positive included: x_i·Σ_j t_j needs no tile at all."""
        sums = [
            dist.all_reduce(_wide_rows(e).sum(0, keepdim=True), self.group)[0]
            for e in (text, image)
        ]
        return scale * (_wide_rows(image) @ sums[0]), scale * (_wide_rows(text) @ sums[1])

    def top_k(
        self, left: Tensor, right: Tensor, k: int, *, paired: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The k columns of the group with the highest l_i·r_j, best first, without the own pair if
        `paired`.

        Returns scores [b, k] and columns [b, k, D], differentiable in both towers, and positions
        [b, k] of the columns in group order. The choice itself has no gradient. ValueError where
        fewer than k columns remain.
        """
        gathered, positions = self._hardest(left, right, k, paired)
        columns = gathered[positions]
        return torch.einsum("bd,bkd->bk", _wide_rows(left), _wide_rows(columns)), columns, positions

    def hardest(self, left: Tensor, right: Tensor, k: int, *, paired: bool = True) -> Tensor:
        """Only the positions [b, k] of `top_k`, in O(b·k) memory."""
        return self._hardest(left, right, k, paired)[1]

    def _hardest(self, left: Tensor, right: Tensor, k: int, paired: bool) -> tuple[Tensor, Tensor]:
        gathered = dist.all_gather(right, self.group)
        remaining = len(gathered) - int(paired)
        if k > remaining:
            raise ValueError(
                f"top {k} of {remaining} candidates; use at most {remaining}, or a larger batch"
            )
        offset = self.group.index * len(right) if paired else None
        return gathered, tiled.top_columns(left.detach(), gathered.detach(), k, offset)

    # Means and sums over rows

    def mean(self, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """This rank's share of the mean of `values` over the rows of ALL ranks: the average of the
        shares is the mean.

        valid: mask or weights w ≥ 0 of the shape of `values`; then the share is (W/N)·Σ w·value
        with N = Σ w over all ranks, and exactly 0, with zero gradient, where N = 0. Values at w = 0
        have no influence, be they NaN.
        """
        if valid is None:
            return values.mean()
        weights = valid.to(values.dtype)
        total = dist.all_reduce(weights.detach().sum(), self.backend.ranks)
        kept = torch.where(valid != 0, values, 0) * weights
        return kept.sum() * (self.backend.ranks.size / torch.where(total > 0, total, 1))

    def sum(self, values: Tensor) -> Tensor:
        """Σ values over the rows of the group, whole on each of its ranks: for terms that are no
        mean over rows.
        """
        return dist.all_reduce(values.sum(), self.group)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Elementwise sum of `values` over ALL ranks, whole on each of them."""
        return dist.all_reduce(values, self.backend.ranks)

    def log_sum(self, values: Tensor) -> Tensor:
        """log Σ e^values over the rows of the group, whole on each of its ranks. values: [b]."""
        return logsumexp(dist.all_gather(values, self.group), dim=0)

    def gather_over_ranks(self, values: Tensor) -> Tensor:
        """[b, ...] of each rank -> [W·b, ...] of ALL ranks."""
        return dist.all_gather(values, self.backend.ranks)

    def gather(self, values: Tensor) -> Tensor:
        """[b, ...] of each rank -> [n, ...] in group order; what ranks ask of it is summed. O(n)
        memory.
        """
        return dist.all_gather(values, self.group)


def _multiples(multiples: tuple[float, ...]) -> Reduction:
    def function(tile: Tile) -> tuple[Tensor, ...]:
        z, positive = tile.shared[0] * tile.scores[0], tile.positive
        others = tuple((m * z).masked_fill(positive, -torch.inf) for m in multiples)
        return (*others, z.masked_fill(~positive, 0), *others)

    kinds = ("logsumexp",) * len(multiples)
    return Reduction(function, rows=(*kinds, SUM), columns=kinds)


def _same_dtype(
    left: Sequence[Tensor], right: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    dtypes = [torch.promote_types(x.dtype, t.dtype) for x, t in zip(left, right)]
    return (
        tuple(x.to(d) for x, d in zip(left, dtypes)),
        tuple(t.to(d) for t, d in zip(right, dtypes)),
    )


def _wide(value: Any, like: Tensor) -> Tensor:
    """A number or 0-d tensor in the accumulation dtype of `like`."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.as_tensor(value, device=like.device, dtype=dtype)


def _wide_rows(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def _mask(valid: Tensor, like: Tensor) -> Tensor:
    """0 for columns that take part, −∞ for the others."""
    zeros = torch.zeros(valid.shape, dtype=_wide_rows(like[:0]).dtype, device=like.device)
    return zeros.masked_fill(~valid.bool(), -torch.inf)
