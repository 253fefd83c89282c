"""The readable reference: every score matrix whole, plain autograd, any dtype. O(b·n) memory.

All other implementations equal this one in value and in every gradient; the tests compare them in
float64.
"""

from __future__ import annotations

from torch import Tensor

from vlp.pairwise.reduction import Block, Reduction, Tile, accumulation_dtype, reduce_matrix


def reduce(reduction: Reduction, block: Block) -> tuple[Tensor, ...]:
    """Row statistics [b], then column statistics [n], of the block's score matrices [b, n]."""
    dtype = accumulation_dtype(block.left[0])

    # The whole block is one tile.
    scores = tuple(x.to(dtype) @ t.to(dtype).T for x, t in zip(block.left, block.right))
    tile = Tile(scores, block.row_values, block.column_values, block.shared, block.offset)
    matrices = reduction.function(tile)

    # The first matrices give a number a row, the others a number a column.
    n_row_kinds = len(reduction.rows)
    by_row = zip(matrices[:n_row_kinds], reduction.rows)
    by_column = zip(matrices[n_row_kinds:], reduction.columns)
    rows = [reduce_matrix(matrix, kind, dim=1) for matrix, kind in by_row]
    columns = [reduce_matrix(matrix, kind, dim=0) for matrix, kind in by_column]
    return (*rows, *columns)
