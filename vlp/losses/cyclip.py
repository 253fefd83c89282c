"""Cyclic consistency: similarities must agree between modalities and in both directions.

    L = in_modal·(1/n) Σ_ij (x_i·x_j − t_i·t_j)² + cross_modal·(1/n) Σ_ij (x_i·t_j − x_j·t_i)²

x, t: [b, D] images and texts; raw cosines, no temperature.

Relations:
- the contrastive loss is a term of its own

Papers:
- CyCLIP (arXiv 2205.14459):
  `objective: {infonce: {}, cyclip: {in_modal: 0.25, cross_modal: 0.25}}`

Needs: image, text

Cost: one pass over four score matrices at once (x·x, t·t, x·t, t·x); O(b·D) memory

Use: where images and texts should be interchangeable, such as a classifier that mixes both
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import SUM, Pairs, Reduction, Tile

NEEDS = frozenset({"image", "text"})


@dataclass(frozen=True)
class Options:
    in_modal: float = 0.25  # weight of the part within images and texts
    cross_modal: float = 0.25  # weight of the part between images and texts

    def __post_init__(self) -> None:
        if min(self.in_modal, self.cross_modal) < 0 or not self.in_modal + self.cross_modal:
            raise ValueError(
                "in_modal and cross_modal: expected numbers >= 0, one of them positive, found "
                f"{self}"
            )


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    # All four scores of a pair (i, j) at once: a square needs two of them in one tile.
    x, t = inputs.image, inputs.text
    in_modal, cross_modal = pairs.reduce(
        Reduction(_squares, rows=(SUM, SUM)), [x, t, x, t], [x, t, t, x], paired=False
    )
    return pairs.mean(options.in_modal * in_modal + options.cross_modal * cross_modal)


def _squares(tile: Tile) -> tuple[Tensor, ...]:
    xx, tt, xt, tx = tile.scores
    return (xx - tt).square(), (xt - tx).square()
