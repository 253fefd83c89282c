"""The pairwise sigmoid loss: every pair of the batch is a decision of its own, match or not.

    L = −(1/n) Σ_ij log σ(y_ij·(scale·x_i·t_j + bias)),      y_ii = 1, y_ij = −1 for j ≠ i

x, t: [b, D] images and texts. Scale and bias are both learned (in the paper 10 and −10 at first:
nearly all of the n² decisions are "no match").

Relations:
- `infonce` normalises over a row; this loss has no normaliser, so a pair's term does not depend on
  the other candidates
- the per-pair loss ℓ_ij is what the selection `jest` scores learnability with

Papers:
- SigLIP (arXiv 2303.15343): `objective: {siglip: {}}` with `model: {scale: {init: 10}, bias: -10}`

Needs: image, text, scale, bias

Cost: one pass over the pairs, 8·b·n·D FLOPs forward and backward; O(b·D) memory

Use: at smaller batches; the paper finds 32k candidates sufficient. Needs a model with a bias
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs, softplus

NEEDS = frozenset({"image", "text", "scale", "bias"})


@dataclass(frozen=True)
class Options:
    pass


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L: the mean over its images of their row of decisions."""
    # −log σ(−z) of the others, −log σ(z) of the pair.
    others, positive = pairs.softplus_sum(inputs.image, inputs.text, inputs.scale, inputs.bias)
    return pairs.mean(others + softplus(-positive))
