"""Hand-derived tile programs: InfoNCE's margin and the sigmoid loss, one exponential an entry.

Both take scores multiplied by the scale already (`prescaled`) and work in place on a tile that sits
in cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlp.pairwise.diagonal import Diagonal
from vlp.pairwise.reduction import (
    Block,
    Gradients,
    Reduction,
    Tile,
    accumulation_dtype,
    may_ask,
    softplus,
    without_empty,
)

# (E, shift), or (z, None) where one exponential cannot serve rows and columns
Memo = tuple[Tensor, Tensor | float | None]


class Margin:
    """Statistics r_i = LSE_{j≠i} z_ij, z_ii and c_j = LSE_{i≠j} z_ij, and their gradient

        dz_ij = g^r_i e^{z_ij − r_i} + g^c_j e^{z_ij − c_j}   (j ≠ i),      dz_ii = g^d_i.

    Rows and columns share ONE exponential E = e^{z − shift}: its sums are the statistics, and in
    backward dz = E·(g^r_i e^{shift − r_i} + g^c_j e^{shift − c_j}). That is safe while the values
    of a tile span less than `SPAN` (e^{±SPAN} is a normal float32 and so are sums of 10⁶ of them);
    wider tiles take one exponential each way, and so do all tiles on a device, where the host would
    wait for the answer.
    """

    prescaled = True
    SPAN = 80.0  # widest tile, highest − lowest z, for one exponential
    BOUND = 60.0  # |z| up to here needs no shift at all

    def __init__(self, reduction: Reduction, block: Block) -> None:
        self.both_ways = bool(reduction.columns)
        self.may_ask = may_ask(block.left[0])
        self.unshifted = self.may_ask and self._bound(block) <= self.BOUND
        self.scratch: Tensor | None = None  # for dz, of one tile after another

    @staticmethod
    def _bound(block: Block) -> float:
        """max |z| ≤ scale · max‖x‖ · max‖t‖ (NaN compares false and takes the careful path)."""
        # Torch has no maximum of nothing.
        x, t = block.left[0], block.right[0]
        if not (len(x) and len(t)):
            return 0.0

        dtype = accumulation_dtype(x)
        longest_x, longest_t = (
            torch.linalg.vector_norm(rows, dim=1, dtype=dtype).max() for rows in (x, t)
        )
        return float(block.shared[0].detach().abs() * longest_x * longest_t)

    def forward(self, tile: Tile) -> tuple[list[Tensor], Memo]:
        z = self._scores(tile)

        # The positive is read first, then leaves the sums: it would cancel in the margin.
        pairs = Diagonal(tile, *z.shape)
        positive = pairs.read(z)
        memo = self._exponentials(z, pairs)

        statistics = [_log_sums(memo, dim=1), positive]
        if self.both_ways:
            statistics.append(_log_sums(memo, dim=0))
        return statistics, memo

    def backward(
        self, tile: Tile, memo: Memo | None, statistics: list[Tensor], upstream: list[Tensor]
    ) -> Gradients:
        if memo is None:
            z = self._scores(tile)
            memo = self._exponentials(z, Diagonal(tile, *z.shape))

        # In one direction the last statistic is the positive, which both functions leave alone.
        rows, columns = without_empty(statistics[0]), without_empty(statistics[-1])
        weights = upstream[0], upstream[-1]
        if memo[1] is None:
            d = self._from_scores(memo[0], rows, columns, *weights)
        else:
            d = self._from_exponentials(memo, rows, columns, *weights)

        Diagonal(tile, *d.shape).write(d, upstream[1])
        return Gradients([d])

    def _from_scores(
        self, z: Tensor, rows: Tensor, columns: Tensor, by_row: Tensor, by_column: Tensor
    ) -> Tensor:
        """dz with an exponential each way, for tiles too wide for one."""
        # Statistics are float64, the tile is not.
        rows, by_row = (v.to(z.dtype).unsqueeze(1) for v in (rows, by_row))
        d = (z - rows).exp_().mul_(by_row)
        if self.both_ways:
            columns, by_column = (v.to(z.dtype).unsqueeze(0) for v in (columns, by_column))
            d += (z - columns).exp_().mul_(by_column)
        return d

    def _from_exponentials(
        self, memo: Memo, rows: Tensor, columns: Tensor, by_row: Tensor, by_column: Tensor
    ) -> Tensor:
        """dz = E·(g^r_i e^{shift − r_i} + g^c_j e^{shift − c_j}), in memory used for every tile."""
        e, shift = memo
        assert shift is not None  # E, and not scores
        # E may be kept for another backward, so dz has memory of its own, reused by every tile.
        if self.scratch is None or self.scratch.numel() < e.numel():
            self.scratch = e.new_empty(e.numel())
        d = self.scratch[: e.numel()].view_as(e)

        row_factor = (by_row * (shift - rows).exp_()).to(e.dtype).unsqueeze(1)
        if not self.both_ways:
            return torch.mul(row_factor, e, out=d)
        column_factor = (by_column * (shift - columns).exp_()).to(e.dtype).unsqueeze(0)
        return torch.add(row_factor, column_factor, out=d).mul_(e)

    @staticmethod
    def _scores(tile: Tile) -> Tensor:
        z = tile.scores[0]
        for offset in tile.column_values:
            z.add_(offset)
        return z

    def _exponentials(self, z: Tensor, pairs: Diagonal) -> Memo:
        """(E, shift) with the positives at 0; or (z, None) with the positives at −∞."""
        shift = self._shift(z)
        if shift is None:
            pairs.fill(z, -torch.inf)
            return z, None

        # Small scores are spared the subtraction.
        e = z.exp_() if self.unshifted else z.sub_(shift).exp_()
        pairs.fill(e, 0.0)
        return e, shift

    def _shift(self, z: Tensor) -> Tensor | float | None:
        """What all entries of a tile may be lowered by; None where one exponential is not safe."""
        # Small scores need no look at the tile's range.
        if self.unshifted:
            return 0.0
        if not self.may_ask:
            return None
        lowest, highest = z.aminmax()
        # NaN compares false and takes the careful path.
        return highest if highest - lowest < self.SPAN else None


def _log_sums(memo: Memo, dim: int) -> Tensor:
    """LSE of z along `dim`, without the positives."""
    e, shift = memo
    if shift is None:  # e is still z
        return torch.logsumexp(e, dim)
    return e.sum(dim).double().log_().add_(shift)


class Softplus:
    """Statistics Σ_{j≠i} log(1 + e^{z_ij}) and z_ii, and their gradient

    dz_ij = g_i σ(z_ij)   (j ≠ i),      dz_ii = g^d_i.
    """

    prescaled = True

    def __init__(self, reduction: Reduction, block: Block) -> None:
        pass

    def forward(self, tile: Tile) -> tuple[list[Tensor], Tensor]:
        z = self._scores(tile)
        pairs = Diagonal(tile, *z.shape)
        positive = pairs.read(z)

        # z itself stays as it is: backward needs it, not its softplus.
        values = softplus(z)
        pairs.fill(values, 0.0)
        return [values.sum(1), positive], z

    def backward(
        self, tile: Tile, memo: Tensor | None, statistics: list[Tensor], upstream: list[Tensor]
    ) -> Gradients:
        z = self._scores(tile) if memo is None else memo
        d = torch.sigmoid(z).mul_(upstream[0].to(z.dtype).unsqueeze(1))
        Diagonal(tile, *d.shape).write(d, upstream[1])

        # The bias is added to every score; the scale's gradient is the loop's.
        return Gradients([d], shared=(None, d.sum()))

    @staticmethod
    def _scores(tile: Tile) -> Tensor:
        return tile.scores[0].add_(tile.shared[1])


PROGRAMS: dict[str, type[Margin] | type[Softplus]] = {"margin": Margin, "softplus": Softplus}
