"""Captioning with a multimodal decoder (CoCa, arXiv 2205.01917).

    L = −mean over tokens (i, l) that are no padding of log softmax(caption_logits[i, l])[caption_ids[i, l]]

caption_logits: [b, L, Z] the decoder's, already shifted, so that position l predicts caption_ids[:,
l]: [b, L] int64. A sample term whose mean runs over the tokens of all ranks, so a long caption
weighs more. CoCa: weight 2 beside InfoNCE of weight 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.losses._inputs import HALF, Inputs
from vlp.losses._softmax import margin
from vlp.pairwise import Pairs, softplus

NEEDS = frozenset({"caption_nll", "caption_ids"})
OPTIONAL = frozenset({"caption_logits"})  # instead of caption_nll


@dataclass(frozen=True)
class Options:
    padding: int = 0  # the token id that is no part of a caption; negative ids are none either


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    ids = inputs.caption_ids
    valid = (ids != options.padding) & (ids >= 0)
    if inputs.caption_nll is not None:
        return pairs.mean(inputs.caption_nll, valid)
    # Padding is cut off before the softmax, whose gradient would carry a NaN there into everything.
    logits = torch.where(valid.unsqueeze(2), inputs.caption_logits, 0)
    logits = logits.float() if logits.dtype in HALF else logits
    return pairs.mean(softplus(margin(logits, torch.where(valid, ids, 0))), valid)
