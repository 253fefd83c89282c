"""Teaching CLIP to count to ten (arXiv 2302.12066).

    L = −mean over counting samples of log [ e^{g(x·t)} / (e^{g(x·t)} + Σ_c e^{g(x·t^cf_c)}) ]

x, t: [b, D]; t^cf: [b, D] or [b, C, D] is the caption with another number word. `one` (the paper)
takes the first, which the loader draws anew at each visit; `all` is the variant over all C. One
direction; counterfactuals are not candidates of the contrastive loss, which the configuration adds
as a term of its own (paper: weight 1 each). g is the `raw` cosine, or the cosine `scaled` by the
learned scale.
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
    inputs = inputs.wide()
    wrong = (
        inputs.counterfactual
        if inputs.counterfactual.dim() == 3
        else inputs.counterfactual.unsqueeze(1)
    )
    wrong = wrong[:, :1] if options.counterfactuals == "one" else wrong
    scale = inputs.scale if options.logits == "scaled" else 1.0
    positive = scale * (inputs.image * inputs.text).sum(1)
    others = scale * (inputs.image.unsqueeze(1) * wrong).sum(2)
    return pairs.mean(softplus(torch.logsumexp(others, 1) - positive), inputs.counterfactual_valid)
