"""Exact reductions over image-text pairs in O(b·D) memory, on any number of ranks.

    pairs = Pairs.at(Backend(topology=Topology.read("global"), impl="auto"), step)
    rows, columns = pairs.margin_logsumexp(image, text, scale)
    loss = pairs.mean(softplus(rows) + softplus(columns)) / 2

`pairs` is what objectives call. Under it, from top to bottom:

    backend    which implementation computes, and which ranks share candidates
    exchange   how ranks take part, gathered; `ring` for columns that travel
    reduction  what is computed: matrices from scores, each summed or log-sum-exp'ed
    dense      the readable reference; `tiled` and `triton` compute the same in less memory
    products   in which dtype rows are multiplied
"""

from vlp.pairwise.backend import IMPLEMENTATIONS, Backend
from vlp.pairwise.pairs import Pairs
from vlp.pairwise.products import in_students_dtype, is_narrow
from vlp.pairwise.reduction import (
    LOGSUMEXP,
    SUM,
    Reduction,
    Tile,
    logaddexp,
    logsumexp,
    number,
    softplus,
    widened,
)
from vlp.pairwise.topology import Topology

__all__ = [
    "IMPLEMENTATIONS", "LOGSUMEXP", "SUM", "Backend", "Pairs", "Reduction", "Tile", "Topology",
    "in_students_dtype", "is_narrow", "logaddexp", "logsumexp", "number", "softplus", "widened",
]  # fmt: skip
