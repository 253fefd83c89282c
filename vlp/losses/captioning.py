"""Captioning with a multimodal decoder (CoCa, arXiv 2205.01917).

    L = −mean over tokens (i, l) that are no padding of log softmax(caption_logits[i, l])[caption_ids[i, l]]

caption_logits: [b, L, V] the decoder's, already shifted, so that position l predicts caption_ids[:, l]: [b, L] int64. A
sample term whose mean runs over the tokens of all ranks, so a long caption weighs more. CoCa: weight 2 beside InfoNCE
of weight 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.losses._objective import Inputs
from vlp.pairwise import Pairs

NEEDS = frozenset({"caption_logits", "caption_ids"})
OPTIONAL = frozenset({"caption_nll"})


@dataclass(frozen=True)
class Options:
    padding: int = 0  # the token id that is no part of a caption; negative ids are none either


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    ids = inputs.caption_ids
    valid = (ids != options.padding) & (ids >= 0)
    if inputs.caption_nll is not None:
        return pairs.mean(inputs.caption_nll, valid)
    logits = inputs.caption_logits
    if logits.shape[:2] != ids.shape:
        raise ValueError(f"caption_logits {tuple(logits.shape)} and caption_ids {tuple(ids.shape)}: expected [b, L, V] and [b, L]")
    target = torch.where(valid, ids, 0).flatten()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return pairs.mean(F.cross_entropy(logits.flatten(0, 1), target, reduction="none").view_as(ids), valid)
