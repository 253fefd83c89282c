"""Hand-derived tile programs: InfoNCE's margin and the sigmoid loss, one exponential an entry.

Both take scores multiplied by the scale already (`prescaled`) and work in place on a tile that sits
in cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlp.pairwise.reduction import Block, Gradients, Reduction, Tile, accumulation_dtype, softplus


class Margin:
    """Statistics r_i = LSE_{j≠i} z_ij, z_ii and c_j = LSE_{i≠j} z_ij, and their gradient

        dz_ij = g^r_i e^{z_ij − r_i} + g^c_j e^{z_ij − c_j}   (j ≠ i),      dz_ii = g^d_i.

    Rows and columns share ONE exponential E = e^{z − shift}: its sums are the statistics, and in
    backward dz = E·(g^r_i e^{shift − r_i} + g^c_j e^{shift − c_j}). That is safe while the values
    of a tile span less than `SPAN` (e^{±SPAN} is a normal float32 and so are sums of 10⁶ of them);
    wider tiles take one exponential each way.
    """

    prescaled = True
    SPAN = 80.0  # widest tile, hi − lo, for one exponential
    BOUND = 60.0  # |z| up to here needs no shift at all

    def __init__(self, reduction: Reduction, block: Block) -> None:
        self.both_ways = bool(reduction.columns)
        self.unshifted = self._bound(block) <= self.BOUND
        self.scratch: Tensor | None = None  # for dz, of one tile after another

    @staticmethod
    def _bound(block: Block) -> float:
        """max |z| ≤ scale · max‖x‖ · max‖t‖ (NaN compares false and takes the careful path)."""
        if not (len(block.left[0]) and len(block.right[0])):
            return 0.0
        dtype = accumulation_dtype(block.left[0])
        longest = [
            torch.linalg.vector_norm(m, dim=1, dtype=dtype).max()
            for m in (block.left[0], block.right[0])
        ]
        return float(block.shared[0].detach().abs() * longest[0] * longest[1])

    def forward(self, tile: Tile) -> tuple[list[Tensor], Any]:
        z = self._scores(tile)
        pairs = _Pairs(tile, *z.shape)
        positive = pairs.read(z)
        memo = self._exponentials(z, pairs)
        e, shift = memo
        if shift is None:  # e is still z, without positives
            rows, columns = torch.logsumexp(e, 1), torch.logsumexp(e, 0) if self.both_ways else None
        else:
            rows = e.sum(1).double().log_().add_(shift)
            columns = e.sum(0).double().log_().add_(shift) if self.both_ways else None
        return [rows, positive, columns][: 2 + self.both_ways], memo

    def backward(
        self, tile: Tile, memo: Any, statistics: list[Tensor], upstream: list[Tensor]
    ) -> Gradients:
        if memo is None:
            z = self._scores(tile)
            memo = self._exponentials(z, _Pairs(tile, *z.shape))
        e, shift = memo
        # An empty log-sum-exp (−∞) has no entries that could carry a gradient.
        rows, columns = (
            s.masked_fill(s == -torch.inf, torch.inf) for s in (statistics[0], statistics[-1])
        )
        by_row, by_column = upstream[0], upstream[-1]
        if shift is None:
            d = (e - rows.to(e.dtype).unsqueeze(1)).exp_().mul_(by_row.to(e.dtype).unsqueeze(1))
            if self.both_ways:
                d += (
                    (e - columns.to(e.dtype).unsqueeze(0))
                    .exp_()
                    .mul_(by_column.to(e.dtype).unsqueeze(0))
                )
        else:
            by_row = (by_row * (shift - rows).exp_()).to(e.dtype).unsqueeze(1)
            by_column = (by_column * (shift - columns).exp_()).to(e.dtype).unsqueeze(0)
            if self.scratch is None or self.scratch.numel() < e.numel():
                self.scratch = e.new_empty(e.numel())
            d = self.scratch[: e.numel()].view_as(e)
            if self.both_ways:
                torch.add(by_row, by_column, out=d).mul_(e)
            else:
                torch.mul(by_row, e, out=d)
        _Pairs(tile, *d.shape).write(d, upstream[1])
        return Gradients([d])

    @staticmethod
    def _scores(tile: Tile) -> Tensor:
        z = tile.scores[0]
        for offset in tile.column_values:
            z.add_(offset)
        return z

    def _exponentials(self, z: Tensor, pairs: _Pairs) -> tuple[Tensor, Tensor | float | None]:
        """(E, shift) with the positives at 0; or (z, None) with the positives at −∞ where one
        exponential cannot do.
        """
        if self.unshifted:
            e, shift = z.exp_(), 0.0
        else:
            low, high = z.aminmax()
            if not high - low < self.SPAN:
                pairs.fill(z, -torch.inf)
                return z, None
            e, shift = z.sub_(high).exp_(), high
        pairs.fill(e, 0.0)
        return e, shift


class Softplus:
    """Statistics Σ_{j≠i} log(1 + e^{z_ij}) and z_ii, with dz_ij = g_i σ(z_ij) for j ≠ i and dz_ii =
    g^d_i.
    """

    prescaled = True

    def __init__(self, reduction: Reduction, block: Block) -> None:
        pass

    def forward(self, tile: Tile) -> tuple[list[Tensor], Any]:
        z = tile.scores[0].add_(tile.shared[1])
        pairs = _Pairs(tile, *z.shape)
        positive = pairs.read(z)
        values = softplus(z)
        pairs.fill(values, 0.0)
        return [values.sum(1), positive], z

    def backward(
        self, tile: Tile, memo: Any, statistics: list[Tensor], upstream: list[Tensor]
    ) -> Gradients:
        z = tile.scores[0].add_(tile.shared[1]) if memo is None else memo
        d = torch.sigmoid(z).mul_(upstream[0].to(z.dtype).unsqueeze(1))
        _Pairs(tile, *d.shape).write(d, upstream[1])
        return Gradients([d], shared=(None, d.sum()))


class _Pairs:
    """The entries of a tile that are a row's own pair: a piece of one diagonal, perhaps empty."""

    def __init__(self, tile: Tile, m: int, n: int) -> None:
        self.m, self.offset = m, tile.offset
        self.present = tile.offset is not None and -m < tile.offset < n

    def read(self, matrix: Tensor) -> Tensor:
        """[m]: each row's own entry, 0 where it lies in another tile."""
        result = matrix.new_zeros(self.m)
        if self.present:
            result[self._rows(matrix)] = matrix.diagonal(self.offset)
        return result

    def fill(self, matrix: Tensor, value: float) -> None:
        if self.present:
            matrix.diagonal(self.offset).fill_(value)

    def write(self, matrix: Tensor, values: Tensor) -> None:
        if self.present:
            matrix.diagonal(self.offset).copy_(values[self._rows(matrix)])

    def _rows(self, matrix: Tensor) -> slice:
        start = max(0, -self.offset)
        return slice(start, start + matrix.diagonal(self.offset).shape[0])


PROGRAMS = {"margin": Margin, "softplus": Softplus}
