"""Stored embeddings of a byte or a bit a number, the search over them, and rescoring by float rows.

int8     x̂_d = lo_d + c_d·(hi_d − lo_d)/255, c_d the nearest of 0 … 255, lo_d and hi_d the least and
         largest of all stored rows; a query q stays float: its score is q·x̂
binary   the bits x_d > 0, eight a byte; a query is made binary too: its score is D − 2·(bits that
         differ), the dot product of signs

Rescoring: of the k·m best by these scores, the k best by the cosine of float rows. Equal scores
count against the model both times: a right candidate is among the k·m only before every wrong one
that scores as high, and all that score as high as the last of them are compared with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlp.eval import metrics

KINDS = ("int8", "binary")
Kind = Literal["int8", "binary"]
_LEVELS = 255  # steps between the least and the largest value
_TILE = 2**24  # scores that are compared at a time
_WEIGHTS = (128, 64, 32, 16, 8, 4, 2, 1)  # of the bits of a byte, the first number highest


@dataclass(frozen=True)
class Int8:
    """A byte a number; see the module."""

    low: Tensor  # [D] float32
    step: Tensor  # [D] float32, (hi − lo)/255; 1 where all rows agree
    tie: float = 1e-5  # the rounding of a product with levels up to 255

    def encode(self, rows: Tensor) -> Tensor:
        """[n, D] unit rows -> [n, D] uint8."""
        levels = ((rows - self.low) / self.step).round()
        return levels.clamp(0, _LEVELS).to(torch.uint8)

    def scores(self, queries: Tensor, stored: Tensor) -> Tensor:
        """Queries [b, D] float32 against stored rows -> [b, n] float32."""
        # q·x̂ = (q∘step)·c + q·lo: the stored rows are never written out as floats of their own.
        return (queries * self.step) @ stored.float().T + (queries @ self.low).unsqueeze(1)


@dataclass(frozen=True)
class Binary:
    """A bit a number; see the module. Of a width that is no multiple of 8 the last byte's other
    bits are 0 in every row.
    """

    width: int  # D
    tie: float = 0.5  # scores are whole numbers

    def encode(self, rows: Tensor) -> Tensor:
        """[n, D] unit rows -> [n, D/8, rounded up] uint8."""
        n_bytes = bytes_a_row("binary", self.width)
        bits = torch.zeros(len(rows), n_bytes * 8, dtype=torch.uint8)
        bits[:, : self.width] = rows > 0
        weights = torch.tensor(_WEIGHTS, dtype=torch.uint8)
        return (bits.view(len(rows), n_bytes, 8) * weights).sum(2, dtype=torch.uint8)

    def scores(self, queries: Tensor, stored: Tensor) -> Tensor:
        """Queries [b, D] float32 against stored rows -> [b, n] float32."""
        return _signs(self.encode(queries), self.width) @ _signs(stored, self.width).T


Code = Int8 | Binary  # how rows become stored bytes, and how queries are compared with these


def _signs(stored: Tensor, width: int) -> Tensor:
    """[n, bytes a row] -> [n, D] float32 of −1 and 1."""
    weights = torch.tensor(_WEIGHTS, dtype=torch.uint8)
    bits = (stored.unsqueeze(2) & weights) > 0
    return bits.flatten(1)[:, :width].float() * 2 - 1


def fitted(kind: Kind, blocks: Iterable[Tensor]) -> Code:
    """The code for rows that come in blocks [n, D]; one at least holds a row."""
    low = high = None
    for block in blocks:
        if not len(block):
            continue
        least, largest = block.float().aminmax(dim=0)
        low = least if low is None else torch.minimum(low, least)
        high = largest if high is None else torch.maximum(high, largest)
    assert low is not None and high is not None, "no row to fit a code to"

    if kind == "binary":
        return Binary(len(low))
    step = (high - low) / _LEVELS
    return Int8(low, torch.where(step > 0, step, 1))


def bytes_a_row(kind: Kind, width: int) -> int:
    """What a stored row of D = `width` takes; the two numbers a dimension of int8 aside."""
    return width if kind == "int8" else -(-width // 8)


# --- recalls --------------------------------------------------------------------------------------


def hits(
    queries: Tensor,  # [n, D] unit rows
    rows: Tensor,  # [m, D] unit rows, of which the stored ones are made
    of_queries: Tensor,  # [n] int64; a row is right for a query of its own number
    of_rows: Tensor,  # [m] int64
    kind: Kind,
    ks: tuple[int, ...],
    rescore: int,  # m of the module
) -> Tensor:  # [n, len(ks)] bool
    """Whether a right row is among the k best, by stored rows and rescoring (see the module)."""
    code = fitted(kind, [rows])
    stored, exact_rows = code.encode(rows), rows.double()
    tie = metrics.tie_of_products(queries, rows)

    # Tiles of queries against all rows: the k·m best are of all.
    n_tile = max(1, _TILE // len(rows))
    tiles = zip(queries.split(n_tile), of_queries.split(n_tile))
    found = []
    for tile, numbers in tiles:
        right = numbers.unsqueeze(1) == of_rows
        # A right row steps back behind the wrong ones that score as high.
        coarse = code.scores(tile, stored) - code.tie * right
        fine = tile.double() @ exact_rows.T
        found.append(_hits(coarse, fine, right, ks, rescore, tie))
    return torch.cat(found)


def _hits(
    coarse: Tensor, fine: Tensor, right: Tensor, ks: tuple[int, ...], rescore: int, tie: float
) -> Tensor:
    """[n, len(ks)] bool of a tile [n, m]."""
    n_rows = coarse.shape[1]
    lengths = [min(n_rows, k * rescore) for k in ks]
    best = coarse.topk(max(lengths), dim=1).values

    of_ks = []
    for k, length in zip(ks, lengths):
        listed = coarse >= best[:, length - 1 : length]
        reached = fine.masked_fill(~(listed & right), -torch.inf).amax(1)
        rivals = listed & ~right & (fine >= reached.unsqueeze(1) - tie)
        of_ks.append(reached.isfinite() & (rivals.sum(1) < k))
    return torch.stack(of_ks, 1)


def nearest(
    query: Tensor,  # [1, D] unit row
    code: Code,
    blocks: Iterable[tuple[Tensor, Tensor]],  # numbers [n] int64, stored rows [n, bytes a row]
    length: int,
) -> Iterator[int]:
    """The numbers of the `length` best by stored rows, by falling score; memory is of a block."""
    best, numbers = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    for of_block, stored in blocks:
        joined = torch.cat([best, code.scores(query, stored)[0]])
        joined_numbers = torch.cat([numbers, of_block])
        best, places = joined.topk(min(length, len(joined)))
        numbers = joined_numbers[places]
    yield from numbers.tolist()
