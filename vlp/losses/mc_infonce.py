"""InfoNCE of embeddings that are distributions: each row says how certain it is.

    L = ½ Σ_directions mean_i −log mean_s [ e^{scale·u_is·v_is} /
            (e^{scale·u_is·v_is} + mean_{j≠i} e^{scale·u_is·v_js}) ]
    u_is ~ vMF(x_i, κ_i),    v_is ~ vMF(t_i, κ'_i),    s = 1 … samples

x, t: [b, D] unit rows; κ and κ': [b] > 0 the concentrations of images and of texts, by a head of
the model; vMF(μ, κ) has the density ∝ e^{κ μ·z} on the unit sphere. Negatives are averaged, not
summed. What is drawn is a function of (seed, step, row of the step), whatever the ranks, and has
exact gradients in direction and concentration.

Relations:
- with κ, κ' → ∞ it is `infonce` whose negatives are averaged: margins less log(n − 1)

Papers:
- MCInfoNCE (arXiv 2302.02865), where a network trained so predicts the true posteriors:
  `objective: {mc_infonce: {}}` with `model.scale.init: 20`; it takes one negative by default, and
  its release learns the scale from 20 on

Needs: image, text, scale, image_concentration, text_concentration

Cost: a pass over the pairs for each sample; O(samples·b·D) memory

Use: where captions are vague and pictures ambiguous, and a certainty beside each embedding is worth
having
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.losses import _von_mises_fisher
from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs, softplus
from vlp.seeds import derive

NEEDS = frozenset({"image", "text", "scale", "image_concentration", "text_concentration"})
MIN_CANDIDATES = 2


@dataclass(frozen=True)
class Options:
    samples: int = 16  # S, draws of each row, a pass over the pairs each

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples: found {self.samples}, expected at least 1")


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    inputs = inputs.wide()
    n_rows = len(inputs.image)
    first_row = pairs.backend.ranks.index * n_rows
    rows = first_row + torch.arange(n_rows, device=inputs.image.device)
    n_others = math.log(pairs.candidates(n_rows) - 1)

    log_shares: list[list[Tensor]] = [[], []]  # by direction, of each sample [b]
    drawn = (_drawn(inputs, side, rows, pairs, options.samples) for side in ("image", "text"))
    for image, text in zip(*drawn):
        margins = pairs.margin_logsumexp(image, text, inputs.scale)
        for of_direction, margin in zip(log_shares, margins):
            of_direction.append(-softplus(margin - n_others))

    for side in ("image", "text"):
        concentration = getattr(inputs, f"{side}_concentration")
        pairs.note(f"{side}_concentration", pairs.mean(concentration.detach()))
    losses = [math.log(options.samples) - torch.stack(shares).logsumexp(0) for shares in log_shares]
    return pairs.mean(losses[0] + losses[1]) / 2


def _drawn(
    inputs: Inputs, side: str, rows: Tensor, pairs: Pairs, n_samples: int
) -> Iterator[Tensor]:
    """The draws of each row of a side, [b, D] each."""
    step = inputs.step or 0
    seeds = [derive(pairs.backend.seed, "mc_infonce", side, step, s) for s in range(n_samples)]
    concentration = getattr(inputs, f"{side}_concentration")
    return _von_mises_fisher.samples(getattr(inputs, side), concentration, rows, seeds)
