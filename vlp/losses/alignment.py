"""Alignment: the mean squared distance of an image to its own text.

    L = mean_i ‖x_i − t_i‖²

x, t: [b, D] images and texts.

Relations:
- equivalent to 2 − 2·mean_i x_i·t_i on unit rows, so it pulls pairs together and pushes nothing
  apart: on its own it collapses

Papers:
- CUA (arXiv 2405.18570):
  `objective: {infonce: {}, uniformity: {}, alignment: {}}`
- alignment and uniformity on the sphere (Wang and Isola, arXiv 2005.10242):
  `objective: {alignment: {}, uniformity: {}}`

Needs: image, text

Cost: no pairs of different rows; O(b·D) memory and FLOPs

Use: beside `infonce` and `uniformity`, to close the gap between images and texts
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
    """This rank's share of L."""
    # Half precision would round the difference of rows that are close.
    inputs = inputs.wide()
    return pairs.mean((inputs.image - inputs.text).square().sum(1))
