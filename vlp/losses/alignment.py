"""Alignment of pairs (CUA, arXiv 2405.18570; Wang and Isola, arXiv 2005.10242).

L = mean_i ‖x_i − t_i‖²,   x, t: [b, D]
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs

NEEDS = frozenset({"image", "text"})


@dataclass(frozen=True)
class Options:
    pass


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    inputs = inputs.wide()
    return pairs.mean((inputs.image - inputs.text).square().sum(1))
