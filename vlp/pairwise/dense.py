"""The readable reference: every score matrix whole, plain autograd, any dtype. O(b·n) memory.

All other implementations equal this one in value and in every gradient; the tests compare them in
float64.
"""

from __future__ import annotations

from torch import Tensor

from vlp.pairwise.reduction import Block, Reduction, Tile, accumulation_dtype, reduce_matrix


def reduce(reduction: Reduction, block: Block) -> tuple[Tensor, ...]:
    """Row statistics [b], then column statistics [n], of the block's score matrices."""
    dtype = accumulation_dtype(block.left[0])
    scores = tuple(x.to(dtype) @ t.to(dtype).T for x, t in zip(block.left, block.right))
    tile = Tile(scores, block.row_values, block.column_values, block.shared, block.offset)
    matrices = reduction.function(tile)
    n_rows = len(reduction.rows)
    rows = [reduce_matrix(m, kind, dim=1) for m, kind in zip(matrices[:n_rows], reduction.rows)]
    columns = [
        reduce_matrix(m, kind, dim=0) for m, kind in zip(matrices[n_rows:], reduction.columns)
    ]
    return (*rows, *columns)
