"""Multi-view InfoNCE: all pairs of views of a sample in one numerator, all others below it.

    L = mean_i −log [ Σ_{l≠l'} e^{z(il, il')} / Σ_{l≠l'} Σ_j e^{z(il, jl')} ],
    z(il, jl') = scale·u_il·u_jl'

u_il: [b, D], l = 1 … M, the views of sample i: its image, its text, and further views as far as the
call carries them (`views`). Views of one kind, l = l', are not compared.

`ignore` is that of `infonce` but for its margin: which other samples are no negatives of a row.

Relations:
- with two views, image and text, one softmax over both directions: as `infonce` where the two
  denominators of a pair are one sum
- `poly_view` gives each pair of views a loss of its own

Papers:
- MV-InfoNCE (arXiv 2507.06979): `objective: {mv_infonce: {}}`; the release adds pairs of l = l' to
  the denominator

Needs: image, text, scale; with `views` image_views, text_views or both, with `ignore` what it names

Cost: M(M−1)/2 passes over the pairs; O(M·b·D) memory, and the towers on the further views

Use: where data give several views of a sample. The best-matched pair of views dominates the
numerator: with further views of one modality keep `infonce` beside it, or images and texts may stay
apart
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
from vlp.pairwise import Pairs, logsumexp, softplus


@dataclass(frozen=True)
class Options(Viewed):
    pass


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    scores, positives, negatives = Scores.of(inputs, pairs, options), [], []
    for first, second in itertools.combinations(options.of(inputs), 2):
        rows, columns, positive = scores.between(first, second)
        positives.append(positive)
        negatives += [rows, columns]

    # Each unordered pair of views is in the numerator twice.
    positive = logsumexp(torch.stack(positives), 0) + math.log(2)
    return pairs.mean(softplus(logsumexp(torch.stack(negatives), 0) - positive))
