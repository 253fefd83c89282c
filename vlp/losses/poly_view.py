"""Poly-view contrast: every view of a sample finds every other one among all views of all samples.

    ℓ_iαβ = e^{z(iα, iβ)} / [ e^{z(iα, iβ)} + Σ_{j≠i} Σ_γ e^{z(iα, jγ)} ],
    z(iα, jγ) = scale·u_iα·u_jγ
    geometric    L = mean_i mean_α mean_{β≠α} −log ℓ_iαβ
    arithmetic   L = mean_i mean_α −log mean_{β≠α} ℓ_iαβ

u_iα: [b, D], α = 1 … M, the views of sample i: its image, its text, and further views as far as the
call carries them (`views`). Other samples' views of every kind γ, α among them, are negatives.

`ignore` is that of `infonce` but for its margin: which other samples are no negatives of a row.

Relations:
- with two views both forms are SimCLR's loss: with `views: image` and two of them, that of `slip`
  at scale 1/temperature
- `infonce` of image and text leaves out the negatives of the own modality; with `within: both` it
  equals this one of two views

Papers:
- Poly-View (arXiv 2403.05490): `objective: {poly_view: {}}`; its loss of sufficient statistics is
  not among the forms

Needs: image, text, scale; with `views` image_views, text_views or both, with `ignore` what it names

Cost: M(M+1)/2 passes over the pairs; O(M·b·D) memory, and the towers on the further views

Use: with three views or more, where the paper finds few samples with many views better than many
with two; arithmetic lets a view that fits no other be
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

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
    # mean over the other views of −log ℓ, or −log of the mean of ℓ
    form: Literal["geometric", "arithmetic"] = "geometric"


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    scores, views = Scores.of(inputs, pairs, options), options.of(inputs)
    negatives = [[scores.within(view)] for view in views]  # of each view, over all kinds
    positives: list[list[Tensor]] = [[] for _ in views]  # of each view, with all others
    for (a, first), (b, second) in itertools.combinations(enumerate(views), 2):
        rows, columns, positive = scores.between(first, second)
        negatives[a].append(rows)
        negatives[b].append(columns)
        positives[a].append(positive)
        positives[b].append(positive)

    losses = []
    for of_view, with_others in zip(negatives, positives):
        margins = logsumexp(torch.stack(of_view), 0) - torch.stack(with_others)  # [M − 1, b]
        of_form = softplus(margins).mean(0) if options.form == "geometric" else _of_mean(margins)
        losses.append(of_form)
    return pairs.mean(torch.stack(losses))


def _of_mean(margins: Tensor) -> Tensor:
    """−log of the mean of ℓ = σ(−margin) over the other views, [b]."""
    # Where ℓ is near 1 its complement has the digits, elsewhere ℓ itself.
    wrong = margins.sigmoid().mean(0)
    near = -torch.log1p(-wrong.clamp(max=0.5))
    far = math.log(len(margins)) - logsumexp(-softplus(margins), 0)
    return torch.where(wrong < 0.5, near, far)
