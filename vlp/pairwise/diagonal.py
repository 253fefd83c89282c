"""The positives of a tile: where they lie in it, and how they are read and set in place."""

from __future__ import annotations

from torch import Tensor

from vlp.pairwise.reduction import Tile


class Diagonal:
    """The entries of a tile [m, n] that are a row's own pair: a piece of one diagonal, or none."""

    def __init__(self, tile: Tile, m: int, n: int) -> None:
        self.m, self.offset = m, tile.offset or 0
        self.present = tile.offset is not None and -m < tile.offset < n

    def read(self, matrix: Tensor) -> Tensor:
        """[m]: each row's own entry, 0 where it lies in another tile."""
        result = matrix.new_zeros(self.m)
        if self.present:
            rows, _ = self.places(matrix)
            result[rows] = matrix.diagonal(self.offset)
        return result

    def fill(self, matrix: Tensor, value: float) -> None:
        """Set every own entry to `value`."""
        if self.present:
            matrix.diagonal(self.offset).fill_(value)

    def write(self, matrix: Tensor, values: Tensor) -> None:
        """Set each row's own entry to its value of `values` [m]."""
        if self.present:
            rows, _ = self.places(matrix)
            matrix.diagonal(self.offset).copy_(values[rows])

    def places(self, matrix: Tensor) -> tuple[slice, slice]:
        """The rows whose own entry lies in this tile, and the columns of those entries."""
        # A diagonal that enters the tile from the left begins in a later row.
        start, length = max(0, -self.offset), matrix.diagonal(self.offset).shape[0]
        first_column = start + self.offset
        return slice(start, start + length), slice(first_column, first_column + length)
