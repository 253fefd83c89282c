"""Multi-view DHEL: views of a sample attract across kinds, samples repel within each kind of view.

    L = mean_i [ Σ_l log Σ_{j≠i} e^{z(il, jl)} − log Σ_{l≠l'} e^{z(il, il')} ],
    z(il, jl') = scale·u_il·u_jl'

u_il: [b, D], l = 1 … M, the views of sample i: its image, its text, and further views as far as the
call carries them (`views`).

`ignore` is that of `infonce` but for its margin: which other samples are no negatives of a row. A
view without any adds nothing.

Relations:
- with two views, image and text, negatives are of one modality alone: images of images, texts of
  texts
- `uniformity` and `alignment` part the two as well, each with a weight of its own

Papers:
- MV-DHEL (arXiv 2507.06979): `objective: {mv_dhel: {}}`; the release, which multiplies the sums,
  counts each pair of views once in the numerator: log 2 more

Needs: image, text, scale; with `views` image_views, text_views or both, with `ignore` what it names

Cost: M passes over the pairs; O(M·b·D) memory, and the towers on the further views

Use: with several views, and where a batch is small: attraction does not fade as negatives are easy.
As in `mv_infonce` one pair of views may attract alone: keep `infonce` beside it
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.losses._views import Scores, Viewed
from vlp.losses._views import min_views as min_views  # what the house asks of a term
from vlp.losses._views import needs as needs
from vlp.losses._views import optional as optional
from vlp.pairwise import Pairs, logsumexp, widened

MIN_CANDIDATES = 2


@dataclass(frozen=True)
class Options(Viewed):
    pass


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    scores, views = Scores.of(inputs, pairs, options), options.of(inputs)

    # A product of the sums would overflow from four views on; −∞ stands for an empty sum.
    negatives = torch.stack([scores.within(view) for view in views])
    repulsion = negatives.masked_fill(negatives == -torch.inf, 0).sum(0)

    # Each unordered pair of views is in the numerator twice.
    attraction = torch.stack(
        [
            scores.scale * (widened(first) * widened(second)).sum(1)
            for first, second in itertools.combinations(views, 2)
        ]
    )
    return pairs.mean(repulsion - logsumexp(attraction, 0) - math.log(2))
