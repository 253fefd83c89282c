"""Self-distillation from the model's own moving average (DeGLA, arXiv 2504.16801).

    L = mean_i [ ‖x_i − x̄_i‖² + ‖t_i − t̄_i‖² + Σ_k valid_ik ‖n_ik − n̄_ik‖² ]

with x̄, t̄: [b, D] and n̄: [b, K, D] the embeddings of the moving average (decay .9996), without
gradient. Squares are summed over the embedding and over image, text and hard captions, and averaged
over samples; the release sums over its batch of 256 with weight .005, which is weight 1.28 here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs


@dataclass(frozen=True)
class Options:
    negatives: bool = False  # hard captions take part


def needs(options: Options) -> frozenset[str]:
    captions = {"negatives", "negatives_valid", "ema_negatives"} if options.negatives else set()
    return frozenset({"image", "text", "ema_image", "ema_text"} | captions)


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    inputs = inputs.wide()
    distance = _squared(inputs.image, inputs.ema_image) + _squared(inputs.text, inputs.ema_text)
    if options.negatives:
        captions = _squared(inputs.negatives, inputs.ema_negatives)
        distance = distance + torch.where(inputs.negatives_valid, captions, 0).sum(1)
    return pairs.mean(distance)


def _squared(embedding: Tensor, average: Tensor) -> Tensor:
    return (embedding - average.detach()).square().sum(-1)
