"""A pairwise reduction: matrices computed from scores, each summed or log-sum-exp'ed on one axis.

A `Block` holds the tensors of b rows and n columns. Its score matrices

    s_k = left_k · right_kᵀ,   [b, n]

are never meant to exist whole. A `Reduction` says what to do with them: `function(tile)` returns
matrices of the tile's shape; the first ones are reduced along columns, giving one number a row (a
row statistic), the others along rows, giving one number a column (a column statistic).

This description is all that an implementation needs: `dense` applies it to the whole block, `tiled`
to one tile at a time and again in backward, and the reductions that carry a `fused` name have
hand-derived gradients as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

SUM, LOGSUMEXP = "sum", "logsumexp"


@dataclass(frozen=True)
class Block:
    """b rows against n columns."""

    left: tuple[Tensor, ...]  # k matrices [b, D_k]
    right: tuple[Tensor, ...]  # k matrices [n, D_k]
    row_values: tuple[Tensor, ...] = ()  # [b]
    column_values: tuple[Tensor, ...] = ()  # [n]
    shared: tuple[Tensor, ...] = ()  # scale, bias, …: seen by every tile
    # the pair of row i is column i + offset; None: no column is a row's own pair
    offset: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(b, n)."""
        return self.left[0].shape[0], self.right[0].shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them in one order: what autograd sees, and the order of gradients."""
        return (*self.left, *self.right, *self.row_values, *self.column_values, *self.shared)

    def with_tensors(self, tensors: Sequence[Any]) -> Block:
        """The same block over other tensors, or over what stands for them (gradients, flags), in
        the order of `tensors`.
        """
        parts: dict[str, Any] = {}
        start = 0
        for name in ("left", "right", "row_values", "column_values", "shared"):
            end = start + len(getattr(self, name))
            parts[name] = tuple(tensors[start:end])
            start = end
        return replace(self, **parts)


@dataclass(frozen=True)
class Tile:
    """A rectangle of the score matrices, with the values of its rows and columns."""

    scores: tuple[Tensor, ...]  # k matrices [m, n]
    row_values: tuple[Tensor, ...]  # [m]
    column_values: tuple[Tensor, ...]  # [n]
    shared: tuple[Tensor, ...]
    offset: int | None  # the pair of the tile's row i is its column i + offset (perhaps outside)

    @property
    def positive(self) -> Tensor:
        """[m, n] bool: True where the column is the row's own pair."""
        m, n = self.scores[0].shape
        mask = torch.zeros(m, n, dtype=torch.bool, device=self.scores[0].device)

        # Most tiles lie off the diagonal, where `diagonal` would raise.
        if self.offset is not None and -m < self.offset < n:
            mask.diagonal(self.offset).fill_(True)
        return mask


@dataclass
class Gradients:
    """Gradients of one tile with respect to its score matrices and values; None stands for zero."""

    scores: Sequence[Tensor | None]
    row_values: Sequence[Tensor | None] = ()
    column_values: Sequence[Tensor | None] = ()
    shared: Sequence[Tensor | None] = ()


@dataclass(frozen=True)
class Reduction:
    """`function(tile)` returns len(rows) + len(columns) matrices; the kinds say how to reduce each.

    rows, columns: `SUM` or `LOGSUMEXP` for each matrix, those of the rows first.
    """

    function: Callable[[Tile], tuple[Tensor, ...]]
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    fused: str = ""  # the hand-derived implementation that equals `function`, where there is one
    # `function` is (m·z without the pairs) of each m, the positive z_ii, and the same by column
    multiples: tuple[float, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every matrix, in the order in which `function` returns them."""
        return (*self.rows, *self.columns)


def negatives(tile: Tile) -> tuple[Tensor, ...]:
    """z = scale·s (+ column offsets): LSE_{j≠i} z_ij, the positive z_ii, LSE_{i≠j} z_ij."""
    # −∞ leaves a log-sum-exp as it is, 0 a sum.
    z, positive = _scaled(tile), tile.positive
    others = z.masked_fill(positive, -torch.inf)
    return others, z.masked_fill(~positive, 0), others


def row_negatives(tile: Tile) -> tuple[Tensor, ...]:
    """`negatives` of the rows only: LSE_{j≠i} z_ij and the positive z_ii."""
    return negatives(tile)[:2]


def softplus_sums(tile: Tile) -> tuple[Tensor, ...]:
    """z = scale·s + bias: Σ_{j≠i} log(1 + e^{z_ij}) and the positive z_ii."""
    scale, bias = tile.shared
    z, positive = scale * tile.scores[0] + bias, tile.positive
    return softplus(z).masked_fill(positive, 0), z.masked_fill(~positive, 0)


def _scaled(tile: Tile) -> Tensor:
    z = tile.shared[0] * tile.scores[0]
    for offset in tile.column_values:
        z = z + offset
    return z


# The three reductions worth a hand-derived gradient. InfoNCE's margin is row statistic − positive:
# with the positive left out of the sum nothing cancels, however well the pairs are aligned.
MARGIN = Reduction(negatives, rows=(LOGSUMEXP, SUM), columns=(LOGSUMEXP,), fused="margin")
ROW_MARGIN = Reduction(row_negatives, rows=(LOGSUMEXP, SUM), fused="margin")
SOFTPLUS = Reduction(softplus_sums, rows=(SUM, SUM), fused="softplus")


# Arithmetic that stays exact where torch's own does not


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z) = −log σ(−z), exact to 1e-26.

    Torch's default turns linear above 20, where it is wrong by 2e-9; here that begins at 60.
    """
    return torch.nn.functional.softplus(z, threshold=60)


def logsumexp(values: Tensor, dim: int) -> Tensor:
    """log Σ e^v; −∞ with zero gradient where all values are −∞ (torch's gradient is NaN there)."""
    # Rows that are all −∞ are computed from zeros, which keeps their gradient finite.
    empty = (values == -torch.inf).all(dim, keepdim=True)
    result = torch.logsumexp(values.masked_fill(empty, 0), dim)
    return result.masked_fill(empty.squeeze(dim), -torch.inf)


def logaddexp(first: Tensor, second: Tensor) -> Tensor:
    """log(e^first + e^second); −∞ with zero gradient where both are −∞ (torch: NaN gradient)."""
    empty = (first == -torch.inf) & (second == -torch.inf)
    result = torch.logaddexp(first.masked_fill(empty, 0), second.masked_fill(empty, 0))
    return result.masked_fill(empty, -torch.inf)


# Statistics: how they start, and how parts of them join


def empty_statistic(kind: str, size: int, device: torch.device) -> Tensor:
    """[size] float64: the statistic of no entries at all.

    float64, because [b] numbers cost nothing, and at a scale of 100 float32 would round each merge
    by 4e-6, which the gradients then carry.
    """
    neutral = 0.0 if kind == SUM else -torch.inf
    return torch.full((size,), neutral, dtype=torch.float64, device=device)


def merge(kind: str, first: Tensor, second: Tensor) -> Tensor:
    """The statistic of two parts together, from the statistics of each."""
    # No gradient passes here, so that torch's own will do.
    return first + second if kind == SUM else torch.logaddexp(first, second)


def reduce_matrix(values: Tensor, kind: str, dim: int) -> Tensor:
    """The statistic of one matrix along `dim`."""
    return values.sum(dim) if kind == SUM else logsumexp(values, dim)


def without_empty(statistic: Tensor) -> Tensor:
    """A log-sum-exp with +∞ for −∞, so that e^{z − statistic} is 0 there and not NaN.

    An empty log-sum-exp has no entries that could carry a gradient.
    """
    return statistic.masked_fill(statistic == -torch.inf, torch.inf)


# Devices and dtypes


def on_device(tensor: Tensor) -> bool:
    """Whether the tensor lies on an accelerator, which computes while the host goes on.

    There bfloat16 products are fast, and a number that the host asks for has to be waited for.
    """
    return tensor.is_cuda


def may_ask(tensor: Tensor) -> bool:
    """Whether the host may look at numbers of the tensor to choose how to go on."""
    return not on_device(tensor)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays; everything narrower is multiplied exactly and accumulated in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """The tensor in its accumulation dtype."""
    return tensor.to(accumulation_dtype(tensor))


def number(value: Tensor | float, like: Tensor) -> Tensor:
    """A number or 0-d tensor in the accumulation dtype of `like`."""
    dtype = accumulation_dtype(like)
    if isinstance(value, Tensor):
        return value.to(like.device, dtype)
    # Filled on the device: a copy from the host would wait for it.
    return torch.full((), value, device=like.device, dtype=dtype)
