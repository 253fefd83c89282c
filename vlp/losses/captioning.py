"""Captioning: cross-entropy of every next token of the caption, by a decoder that sees the image.

    L = −mean over tokens (i, l) that are no padding of log softmax(logits[i, l])[ids[i, l]]

`caption_nll`: [b, L], −log p of each token `caption_ids`[:, l]; or, Z times larger, the logits
themselves: [b, L, Z] `caption_logits` of the decoder, already shifted, so that position l predicts
the token `caption_ids`[:, l]. The mean runs over the tokens of all ranks, so a long caption weighs
more.

Relations:
- a sample term: rows of a batch do not meet

Papers:
- CoCa (arXiv 2205.01917): `objective: {infonce: {}, captioning: {weight: 2}}`

Needs: caption_nll, caption_ids

Cost: the decoder's own; its logits are held 256 MiB at a time and computed again in backward

Use: where the model also describes, or for a denser signal than one pair a caption; the decoder is
the model's own (`model.decoder`, or an architecture that has one: coca_*), which exports keep, or
`model.heads.captions`, which is training's alone
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.losses._inputs import HALF, Inputs
from vlp.losses._softmax import negative_log_probability
from vlp.pairwise import Pairs

NEEDS = frozenset({"caption_nll", "caption_ids"})
OPTIONAL = frozenset({"caption_logits"})  # instead of caption_nll


@dataclass(frozen=True)
class Options:
    # the tokenizer's padding, no part of a caption; negative ids are none either
    padding: int = 0


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    ids = inputs.caption_ids
    valid = (ids != options.padding) & (ids >= 0)

    # What the decoder computed itself stands for its logits.
    if inputs.caption_nll is not None:
        return pairs.mean(inputs.caption_nll, valid)

    # Padding is cut off before the softmax, whose gradient would carry a NaN there into everything.
    logits = torch.where(valid.unsqueeze(2), inputs.caption_logits, 0)
    if logits.dtype in HALF:
        logits = logits.float()
    token_losses = negative_log_probability(logits, torch.where(valid, ids, 0))
    return pairs.mean(token_losses, valid)
