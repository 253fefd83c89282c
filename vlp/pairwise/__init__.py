"""Exact reductions over image-text pairs in O(b·D) memory, on any number of ranks.

    pairs = Pairs.at(Backend(topology=Topology.read("global"), impl="auto"), step)
    rows, columns = pairs.margin_logsumexp(image, text, scale)
    loss = pairs.mean(softplus(rows) + softplus(columns)) / 2

Read `dense.py` for what is computed, `tiled.py` for how memory stays small, `exchange.py` for how
ranks take part.
"""

from vlp.pairwise.backend import IMPLEMENTATIONS, Backend
from vlp.pairwise.pairs import Pairs
from vlp.pairwise.reduction import LOGSUMEXP, SUM, Reduction, Tile, logaddexp, logsumexp, softplus
from vlp.pairwise.topology import Topology

__all__ = [
    "IMPLEMENTATIONS", "LOGSUMEXP", "SUM", "Backend", "Pairs", "Reduction", "Tile", "Topology", "logaddexp", "logsumexp",
    "softplus",
]  # fmt: skip
