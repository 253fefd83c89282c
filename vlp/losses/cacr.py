"""Contrastive attraction and repulsion: far positives pull more, near negatives push more.

    L = ½ Σ_directions mean_i [ α Σ_p a_ip d²_ip − β Σ_{j≠i} r_ij d²_ij ]
    a_ip = softmax_p(τ⁺ d²_ip),   r_ij = softmax_{j≠i}(−τ⁻ d²_ij),   d²_ij = ‖x_i − t_j‖²

x, t: [b, D] images and texts. Positives and negatives compete among themselves alone, and gradients
flow through both weights. The positive of a row is its pair; with `captions` an image has all
valid ones of [b, K', D] for positives, and a sample without any counts 0 there.

`ignore` is that of `infonce`: which other samples are no negatives of a row. A row without any has
no repulsion.

Relations:
- with one positive the attraction is `alignment`
- as `negative_scale` nears 0, a row's repulsion is its mean distance from the negatives

Papers:
- CACR (arXiv 2105.03746), of images and texts: `objective: {cacr: {}}`
- CACR of several positives: `objective: {cacr: {captions: true}}`; weights and scales are 1, as in
  the release, which repels in one direction

Needs: image, text; with `captions` captions and captions_valid, with `ignore` what it names

Cost: two passes over the pairs, the weights and then their mean; O(b·D) memory

Use: where data are noisy or badly balanced, which the paper finds it to bear better; weights shift
the force to few candidates, no temperature is learned
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.losses import _candidates
from vlp.losses._candidate_options import Ignoring
from vlp.losses._candidates import Masks
from vlp.losses._inputs import Inputs
from vlp.pairwise import LOGSUMEXP, SUM, Pairs, Tile, number, widened

NEEDS = frozenset({"image", "text"})
MIN_CANDIDATES = 2


@dataclass(frozen=True)
class Options(Ignoring):
    alpha: float = 1.0  # α, weight of the attraction
    beta: float = 1.0  # β, weight of the repulsion
    positive_scale: float = 1.0  # τ⁺: above 0, far positives weigh more
    negative_scale: float = 1.0  # τ⁻: above 0, near negatives weigh more
    captions: bool = False  # all captions of a sample are positives of its image

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = (self.alpha, self.beta, self.positive_scale, self.negative_scale)
        if min(weights) < 0:
            raise ValueError(
                "alpha, beta, positive_scale and negative_scale: found "
                f"{', '.join(map(str, weights))}, expected numbers >= 0"
            )


def needs(options: Options) -> frozenset[str]:
    of_captions = {"captions", "captions_valid"} if options.captions else set()
    return NEEDS | of_captions | options.ignore.needs()


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    repulsion = pairs.mean(_repulsion(inputs, pairs, options))
    return options.alpha * _attraction(inputs, pairs, options) - options.beta * repulsion


def _attraction(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of Σ_p a_ip d²_ip, the mean of both directions."""
    wide = inputs.wide()
    own = (wide.image - wide.text).square().sum(1)  # [b]
    if not options.captions:
        return pairs.mean(own)

    # A caption that is not valid has no share of the softmax. A sample without any counts 0.
    squares = (wide.image.unsqueeze(1) - wide.captions).square().sum(2)  # [b, K']
    valid = inputs.captions_valid
    scores = (options.positive_scale * squares).masked_fill(~valid, -torch.inf)
    scores = torch.where(valid.any(1, keepdim=True), scores, 0)
    of_image = (scores.softmax(1) * torch.where(valid, squares, 0)).sum(1)
    return (pairs.mean(of_image) + pairs.mean(own)) / 2


def _repulsion(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """Σ_{j≠i} r_ij d²_ij, the mean of both directions, [b]."""
    chosen = _candidates.of_batch(inputs, pairs, options.candidates())
    scale = number(options.negative_scale, inputs.image)
    norms = [widened(rows).square().sum(1) for rows in (inputs.image, inputs.text)]

    def exponents(tile: Tile, masks: Masks) -> tuple[Tensor, ...]:
        z = -tile.shared[0] * _squares(tile)
        return tuple(z.masked_fill(~kept, -torch.inf) for kept in masks.kept)

    log_sums = chosen.reduce(
        pairs,
        exponents,
        inputs.image,
        inputs.text,
        rows=(LOGSUMEXP,),
        columns=(LOGSUMEXP,),
        row_values=norms[:1],
        column_values=norms[1:],
        shared=[scale],
    )

    # A row without negatives has none to weigh: its sum stays 0.
    rows, columns = (
        log_sum.masked_fill(log_sum == -torch.inf, 0).to(scale.dtype) for log_sum in log_sums
    )

    def expected(tile: Tile, masks: Masks) -> tuple[Tensor, ...]:
        squares = _squares(tile)
        z = -tile.shared[0] * squares
        by_row = (z - tile.row_values[1].unsqueeze(1)).masked_fill(~masks.kept[0], -torch.inf)
        by_column = (z - tile.column_values[1]).masked_fill(~masks.kept[1], -torch.inf)
        return by_row.exp() * squares, by_column.exp() * squares

    by_image, by_text = chosen.reduce(
        pairs,
        expected,
        inputs.image,
        inputs.text,
        rows=(SUM,),
        columns=(SUM,),
        row_values=[norms[0], rows],
        column_values=[norms[1], columns],
        shared=[scale],
    )
    return (by_image + by_text) / 2


def _squares(tile: Tile) -> Tensor:
    """d² of the pairs of a tile, ‖x‖² + ‖t‖² − 2 x·t."""
    return tile.row_values[0].unsqueeze(1) + tile.column_values[0] - 2 * tile.scores[0]
