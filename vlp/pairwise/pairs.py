"""The functions that objectives call: reductions over pairs, and sums and means over the rows of
all ranks.

Everything a loss takes from here obeys one convention (see `vlp.dist`): the average over ranks of
the values that ranks return has exactly the value and the gradient of the single-process term.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vlp import dist
from vlp.pairwise import exchange, tiled
from vlp.pairwise.arriving import Arriving
from vlp.pairwise.backend import Backend
from vlp.pairwise.products import in_students_dtype
from vlp.pairwise.reduction import (
    MARGIN,
    ROW_MARGIN,
    SOFTPLUS,
    SUM,
    Block,
    Reduction,
    Tile,
    accumulation_dtype,
    logsumexp,
    number,
    widened,
)


@dataclass(frozen=True)
class Pairs:
    """Reductions over all (row, candidate) pairs of a group of ranks, at one step.

    Embeddings are this rank's [b, D] unit rows; results are for this rank's own rows and own
    columns, against the n = g·b candidates of the whole group. Scores are s_ij = x_i·t_j, and
    z_ij = scale·s_ij.
    """

    backend: Backend
    group: dist.Group
    # what a term has to say beside its value, by name (see `note`)
    noted: dict[str, Tensor] = field(default_factory=dict, compare=False)
    # the texts, whose exchange may be under way; None: what is asked for is exchanged then
    texts: Arriving | None = field(default=None, compare=False)

    @classmethod
    def at(cls, backend: Backend, step: int | None = None) -> Pairs:
        """The pairs of the group that shares candidates at this step."""
        return cls(backend, backend.group(step or 0))

    def candidates(self, n_rows: int) -> int:
        """n: the candidates of a row."""
        return self.group.size * n_rows

    @property
    def alone(self) -> Pairs:
        """The same for columns that every rank holds whole, like a queue.

        They are gathered from nobody, and must not need a gradient.
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
        """Row statistics [b] and column statistics [c] of any tile function over any scores.

        `shared` tensors are seen by every tile; differentiable ones must be equal on all ranks (the
        scale, gathered diagonals), and their gradients are sums over this rank's own rows.
        """
        # A product of two dtypes would raise.
        left, right = _same_dtype(left, right)

        offset = 0 if paired else None
        block = Block(left, right, tuple(row_values), tuple(column_values), tuple(shared), offset)
        execution = self.backend.execution(self.group, block)
        return exchange.reduce(reduction, block, execution, self._gather)

    def logsumexp(
        self,
        image: Tensor,  # [b, D]
        text: Tensor,  # [b, D]
        scale: Tensor | float,  # []
    ) -> tuple[Tensor, Tensor, Tensor]:
        """LSE_{j≠i} z_ij [b], LSE_{j≠i} z_ji [b] and the positive z_ii [b].

        The positive is excluded: with it, the difference to z_ii cancels for well-aligned pairs.
        −∞ where there is no other.
        """
        rows, positive, columns = self.reduce(
            MARGIN, [image], [text], shared=[number(scale, image)]
        )
        return rows, columns, positive

    def margin_logsumexp(
        self,
        image: Tensor,  # [b, D]
        text: Tensor,  # [b, D]
        scale: Tensor | float,  # []
    ) -> tuple[Tensor, Tensor]:
        """The margins q_i = LSE_{j≠i} z_ij − z_ii of the rows, and of the columns, [b] each.

        InfoNCE is the mean of softplus(q), decoupled contrastive learning the mean of q, and
        1 − P_i = σ(q_i) with P_i the softmax probability of the pair.
        """
        rows, columns, positive = self.logsumexp(image, text, scale)
        return rows - positive, columns - positive

    def row_logsumexp(
        self,
        left: Tensor,  # [b, D]
        right: Tensor,  # [c, D], this rank's columns
        scale: Tensor | float,  # []
        *,
        valid: Tensor | None = None,  # [c] bool: columns that take part
        paired: bool = False,  # leave out j = i
    ) -> Tensor:
        """LSE_j scale·l_i·r_j [b] over all columns of the group, in one direction.

        right: hard captions [b·K, D], say, or the rows themselves for a modality with itself. −∞
        where no column remains.
        """
        masks = [] if valid is None else [_mask(valid, left)]
        row_statistic, _ = self.reduce(
            ROW_MARGIN,
            [left],
            [right],
            column_values=masks,
            shared=[number(scale, left)],
            paired=paired,
        )
        return row_statistic

    def softplus_sum(
        self,
        image: Tensor,  # [b, D]
        text: Tensor,  # [b, D]
        scale: Tensor | float,  # []
        bias: Tensor | float,  # []
    ) -> tuple[Tensor, Tensor]:
        """Σ_{j≠i} log(1 + e^{z_ij + bias}) [b] and the positive z_ii + bias [b]."""
        shared = [number(scale, image), number(bias, image)]
        sums, positive = self.reduce(SOFTPLUS, [image], [text], shared=shared)
        return sums, positive

    def multiples_logsumexp(
        self, image: Tensor, text: Tensor, scale: Tensor | float, multiples: Sequence[float]
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """(LSE_{j≠i} m·z_ij, LSE_{j≠i} m·z_ji) [b] for each multiple m; and the positive z_ii.

        One pass over the scores, whatever the number of multiples.
        """
        reduction = _multiples(tuple(multiples))
        statistics = self.reduce(reduction, [image], [text], shared=[number(scale, image)])

        # The positive stands between the statistics of rows and those of columns.
        k = len(multiples)
        rows, positive, columns = statistics[:k], statistics[k], statistics[k + 1 :]
        return list(zip(rows, columns)), positive

    def linear_sums(
        self, image: Tensor, text: Tensor, scale: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Σ_j z_ij [b] and Σ_j z_ji [b], the positive included.

        x_i·Σ_j t_j needs no tile at all.
        """
        # One row for each modality is all that ranks exchange.
        text_sum, image_sum = (
            dist.all_reduce(widened(rows).sum(0, keepdim=True), self.group)[0]
            for rows in (text, image)
        )
        return scale * (widened(image) @ text_sum), scale * (widened(text) @ image_sum)

    def top_k(
        self, left: Tensor, right: Tensor, k: int, *, paired: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The k columns of the group with the highest l_i·r_j, best first; `paired`: not the pair.

        Returns scores [b, k] and columns [b, k, D], differentiable in both towers, and positions
        [b, k] of the columns in group order. The choice itself has no gradient. ValueError where
        fewer than k columns remain.
        """
        gathered, positions = self._hardest(left, right, k, paired)
        # Widened before rows are picked: a popular row's gradient is a sum of many.
        columns = widened(gathered)[positions]
        scores = torch.einsum("bd,bkd->bk", widened(left), columns)
        return scores, columns, positions

    def hardest(self, left: Tensor, right: Tensor, k: int, *, paired: bool = True) -> Tensor:
        """Only the positions [b, k] of `top_k`, in O(b·k) memory."""
        return self._hardest(left, right, k, paired)[1]

    def _hardest(self, left: Tensor, right: Tensor, k: int, paired: bool) -> tuple[Tensor, Tensor]:
        # The columns are needed whole: their positions are over the group.
        gathered = self._gather(right, self.group)
        remaining = len(gathered) - int(paired)
        if k > remaining:
            raise ValueError(
                f"top {k} of {remaining} candidates; use at most {remaining}, or a larger batch"
            )

        offset = self.group.index * len(right) if paired else None
        rows, columns = _same_dtype([left.detach()], [gathered.detach()])
        block = Block(rows, columns, offset=offset)
        return gathered, tiled.best_columns(block, k, tiled.scores_of_others)[1]

    @torch.no_grad()
    def highest(
        self,
        scores_of: Callable[[Tile], Tensor],
        left: Sequence[Tensor],  # k matrices [b, D_k]
        right: Sequence[Tensor],  # k matrices [c, D_k], this rank's columns
        k: int,
        *,
        row_values: Sequence[Tensor] = (),  # [b]
        column_values: Sequence[Tensor] = (),  # [c]
        paired: bool = True,
    ) -> Tensor:
        """The k highest of any scores over the group, [b, k], best first, without gradient.

        scores_of: a tile to its scores [m, n], −∞ for what is out of the question. O(n·D) memory,
        on a ring too.
        """
        left, right = _same_dtype(left, right)
        offset = self.group.index * right[0].shape[0] if paired else None
        block = Block(
            left,
            tuple(self._gather(columns, self.group) for columns in right),
            tuple(row_values),
            tuple(dist.all_gather(values, self.group) for values in column_values),
            offset=offset,
        )
        return tiled.best_columns(block, k, scores_of, self.backend.tile_size)[0]

    # Means and sums over rows

    def mean(self, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """This rank's share of the mean of `values` over the rows of ALL ranks.

        The average of the shares is the mean. valid: mask or weights w ≥ 0 of the shape of
        `values`; then the share is (W/N)·Σ w·value with N = Σ w over all ranks, and exactly 0, with
        zero gradient, where N = 0. Values at w = 0 have no influence, be they NaN.

        This and the sums below are in float32 at least, whatever the dtype of `values`.
        """
        # In half precision a count ends at 256, and a sum over ranks is rounded at every one.
        values = widened(values)

        # Every rank has the same number of rows, so that its own mean is its share.
        if valid is None:
            return values.mean()

        weights = valid.to(values.dtype)
        total_weight = dist.all_reduce(weights.detach().sum(), self.backend.ranks)
        # Not just a product: 0·NaN would be NaN.
        weighted = torch.where(valid != 0, values, 0) * weights
        divisor = torch.where(total_weight > 0, total_weight, 1)
        return weighted.sum() * (self.backend.ranks.size / divisor)

    def sum(self, values: Tensor) -> Tensor:
        """Σ values over the rows of the group, whole on each of its ranks.

        For terms that are no mean over rows.
        """
        return dist.all_reduce(widened(values).sum(), self.group)

    def log_sum(self, values: Tensor) -> Tensor:
        """log Σ e^values over the rows of the group, whole on each of its ranks. values: [b]."""
        return logsumexp(dist.all_gather(widened(values), self.group), dim=0)

    def note(self, name: str, share: Tensor) -> None:
        """Log a number beside the term's value: this rank's share, whose mean over ranks it is."""
        self.noted[name] = share.detach()

    def gather(self, values: Tensor) -> Tensor:
        """[b, ...] of each rank -> [n, ...] in group order, in O(n) memory.

        What ranks ask of a row in their backward is summed.
        """
        return self._gather(values, self.group)

    def _gather(self, values: Tensor, group: dist.Group) -> Tensor:
        if self.texts is None:
            return dist.all_gather(values, group)
        return self.texts.gather(values, group)

    def sum_over_group(self, values: Tensor) -> Tensor:
        """Elementwise sum of `values` over the ranks of the group, whole on each of them."""
        return dist.all_reduce(widened(values), self.group)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Elementwise sum of `values` over ALL ranks, whole on each of them."""
        return dist.all_reduce(widened(values), self.backend.ranks)

    def gather_over_ranks(self, values: Tensor) -> Tensor:
        """[b, ...] of each rank -> [W·b, ...] of ALL ranks."""
        return dist.all_gather(values, self.backend.ranks)


def _multiples(multiples: tuple[float, ...]) -> Reduction:
    """Log-sum-exps of m·z, row and column, for each m, and the positive z_ii."""

    # The same matrices serve rows and columns.
    def function(tile: Tile) -> tuple[Tensor, ...]:
        z, positive = tile.shared[0] * tile.scores[0], tile.positive
        others = tuple((m * z).masked_fill(positive, -torch.inf) for m in multiples)
        return (*others, z.masked_fill(~positive, 0), *others)

    kinds = ("logsumexp",) * len(multiples)
    return Reduction(function, rows=(*kinds, SUM), columns=kinds, multiples=multiples)


def _same_dtype(
    left: Sequence[Tensor], right: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Both sides of each product in one dtype, the wider of the two."""
    same_left, same_right = [], []
    for x, t in zip(left, right):
        # What has no gradient is stored: it must not widen what has one.
        t = in_students_dtype(x, t)
        x = in_students_dtype(t, x)

        dtype = torch.promote_types(x.dtype, t.dtype)
        same_left.append(x.to(dtype))
        same_right.append(t.to(dtype))
    return tuple(same_left), tuple(same_right)


def _mask(valid: Tensor, like: Tensor) -> Tensor:
    """[c]: 0 for columns that take part, −∞ for the others."""
    zeros = torch.zeros(valid.shape, dtype=accumulation_dtype(like), device=like.device)
    return zeros.masked_fill(~valid.bool(), -torch.inf)
