"""Counting: an image must prefer its caption to the same caption with another number word.

    L = −mean over counting samples of log [ e^{g(x·t)} / (e^{g(x·t)} + Σ_c e^{g(x·t^cf_c)}) ]

x, t: [b, D] images and texts; t^cf: [b, D] or [b, C, D], the caption with another number word. g is
the `raw` cosine, or the cosine `scaled` by the learned scale. `one` (the paper) takes the first
counterfactual, which the loader draws anew at each visit; `all` is the variant over all C.

Relations:
- one direction, and counterfactuals are no candidates of the contrastive loss, which is a term of
  its own
- `hard_negatives` with form own is the same softmax over captions of any kind

Papers:
- Teaching CLIP to count to ten (arXiv 2302.12066): `objective: {infonce: {}, counting: {}}`

Needs: image, text, scale, counterfactual, counterfactual_valid

Cost: no pairs of different rows; O(b·C·D) memory and FLOPs, and the text tower on b·C captions more

Use: to fine-tune on captions with a verified number (`vlp data counting`)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs, softplus

NEEDS = frozenset({"image", "text", "scale", "counterfactual", "counterfactual_valid"})


@dataclass(frozen=True)
class Options:
    logits: Literal["raw", "scaled"] = "raw"  # g: the cosine itself, or times the learned scale
    counterfactuals: Literal["one", "all"] = "one"  # one, drawn anew at each visit, or all C


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    inputs = inputs.wide()
    wrong = inputs.counterfactual
    # One counterfactual a sample may come without a dimension of its own.
    if wrong.dim() == 2:
        wrong = wrong.unsqueeze(1)
    if options.counterfactuals == "one":
        wrong = wrong[:, :1]

    scale = inputs.scale if options.logits == "scaled" else 1.0
    positive = scale * (inputs.image * inputs.text).sum(1)  # [b]
    others = scale * (inputs.image.unsqueeze(1) * wrong).sum(2)  # [b, C]

    # −log of the caption's share, by its margin.
    losses = softplus(torch.logsumexp(others, 1) - positive)
    return pairs.mean(losses, inputs.counterfactual_valid)
