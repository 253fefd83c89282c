"""Barlow Twins between images and texts: their features agree one by one, and repeat nothing.

    L = Σ_d (1 − C_dd)² + λ Σ_{d≠e} C_de²,      C = X̂ᵀT̂ / n, [D, D]

x, t: [b, D] images and texts; X̂ and T̂ are the same with mean 0 and variance 1 of every feature,
over all rows of the group. With `views` L is the mean over the pair and all V² pairs of image_views
and text_views. As in `uniformity`, every rank of a group returns the group's value.

Relations:
- C = I gives 0: no two features of a modality may say the same
- no row is a negative of another; moments are all that ranks exchange

Papers:
- Barlow Twins (arXiv 2103.03230) of two modalities, as BarLIP of CLIP-rocket (arXiv 2305.08675),
  whose factor is .025: `objective: {infonce: {}, barlow: {weight: 0.025}}`; there features come
  from a projection of their own to 8,192, here they are the embeddings

Needs: image, text; with `views` image_views and text_views

Cost: D² numbers summed over ranks, 2·b·D² FLOPs forward; O(b·D + D²) memory

Use: beside a contrastive term, against features that repeat one another. The authors of BarLIP find
plain CLIP with the same augmentation to do better than all such additions
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs, widened

MIN_CANDIDATES = 2
SMALLEST_VARIANCE = 1e-12


@dataclass(frozen=True)
class Options:
    off_diagonal: float = 5e-3  # λ, weight of the correlations between different features
    views: bool = False  # further views of image and text are compared as well

    def __post_init__(self) -> None:
        if self.off_diagonal < 0:
            raise ValueError(f"off_diagonal: found {self.off_diagonal}, expected a number >= 0")


def needs(options: Options) -> frozenset[str]:
    views = {"image_views", "text_views"} if options.views else set()
    return frozenset({"image", "text"} | views)


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """L of the group, whole."""
    compared = [(inputs.image, inputs.text)]
    if options.views:
        compared += itertools.product(inputs.image_views, inputs.text_views)

    losses = [_redundancy(*sides, pairs, options.off_diagonal) for sides in compared]
    return torch.stack(losses).mean()


def _redundancy(image: Tensor, text: Tensor, pairs: Pairs, off_diagonal: float) -> Tensor:
    """L of one view each, of the group."""
    n = pairs.candidates(len(image))
    products = _standardised(image, pairs, n).T @ _standardised(text, pairs, n)
    correlation = pairs.sum_over_group(products) / n

    own = correlation.diagonal()
    others = correlation.square().sum() - own.square().sum()
    return (1 - own).square().sum() + off_diagonal * others


def _standardised(rows: Tensor, pairs: Pairs, n: int) -> Tensor:
    """Every feature with mean 0 and variance 1 over the group, [b, D]."""
    wide = widened(rows)
    centred = wide - pairs.sum_over_group(wide.sum(0)) / n
    variance = pairs.sum_over_group(centred.square().sum(0)) / n
    return centred * (variance + SMALLEST_VARIANCE).rsqrt()
