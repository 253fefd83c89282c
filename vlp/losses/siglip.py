"""The pairwise sigmoid loss: every pair of the batch is a decision of its own, match or not.

    L = −(1/n) Σ_ij log σ(y_ij·(scale·x_i·t_j + bias)),      y_ii = 1, y_ij = −1 for j ≠ i

x, t: [b, D] images and texts. Scale and bias are both learned (in the paper 10 and −10 at first:
nearly all of the n² decisions are "no match").

With `positives` y_ij = 1 for all j of the row's label; a candidate that `ignore` or `hardest`
leaves out is no decision at all, by the rule of the image; `within` adds decisions "no match"
between rows of one modality. As there is no normaliser, there is no form to choose.

Relations:
- `infonce` normalises over a row; this loss has no normaliser, so a pair's term does not depend on
  the other candidates
- the per-pair loss ℓ_ij is what the selection `jest` scores learnability with

Papers:
- SigLIP (arXiv 2303.15343): `objective: {siglip: {}}` with `model: {scale: {init: 10}, bias: -10}`

Needs: image, text, scale, bias; with positives and ignore what `infonce` needs

Cost: one pass over the pairs, 8·b·n·D FLOPs forward and backward; O(b·D) memory. With positives or
masks the general path, and a pass more for `hardest` (O(n·D) memory) and for each `within`

Use: at smaller batches; the paper finds 32k candidates sufficient. Needs a model with a bias
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.losses import _candidates, _masked
from vlp.losses._candidate_options import Candidates
from vlp.losses._candidates import Chosen, Masks
from vlp.losses._inputs import Inputs
from vlp.pairwise import SUM, Pairs, Tile, number, softplus

NEEDS = frozenset({"image", "text", "scale", "bias"})


@dataclass(frozen=True)
class Options(Candidates):
    pass


def needs(options: Options) -> frozenset[str]:
    return NEEDS | options.needs()


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L: the mean over its images of their row of decisions."""
    if not options.plain:
        return pairs.mean(_decisions(inputs, pairs, options))

    # −log σ(−z) of the others, −log σ(z) of the pair.
    others, positive = pairs.softplus_sum(inputs.image, inputs.text, inputs.scale, inputs.bias)
    return pairs.mean(others + softplus(-positive))


def _decisions(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """Σ of the decisions of each image, [b]: match for every positive, no match for negatives."""
    chosen = _candidates.of_batch(inputs, pairs, options)
    scale, bias = (number(value, inputs.image) for value in (inputs.scale, inputs.bias))

    def function(tile: Tile, masks: Masks) -> tuple[Tensor, ...]:
        z = tile.shared[0] * tile.scores[0] + tile.shared[1]
        match = masks.further | tile.positive
        decided = masks.hard[0] | match
        return (
            softplus(torch.where(match, -z, z)).masked_fill(~decided, 0),
            masks.kept[0].to(z.dtype),
            masks.further.to(z.dtype),
        )

    losses, n_kept, n_further = chosen.reduce(
        pairs,
        function,
        inputs.image,
        inputs.text,
        rows=(SUM, SUM, SUM),
        shared=[scale, bias],
    )
    side = {"n_kept": n_kept, "n_further": n_further}
    _masked.note(pairs, options, [side], [pairs.candidates(len(losses)) - 1])

    for name, rows in (("image", inputs.image), ("text", inputs.text)):
        if options.within in (name, "both"):
            losses = losses + _within(chosen, pairs, rows, scale, bias)
    return losses


def _within(chosen: Chosen, pairs: Pairs, rows: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Σ over the negatives of the row's own modality, [b]: none of them is a match."""

    def function(tile: Tile, masks: Masks) -> tuple[Tensor, ...]:
        z = tile.shared[0] * tile.scores[0] + tile.shared[1]
        return (softplus(z).masked_fill(~masks.kept[0], 0),)

    (sums,) = chosen.reduce(pairs, function, rows, rows, rows=(SUM,), shared=[scale, bias])
    return sums
