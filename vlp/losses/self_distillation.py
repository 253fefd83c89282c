"""Self-distillation: embeddings stay near those of the model's own moving average.

    L = mean_i [ ‖x_i − x̄_i‖² + ‖t_i − t̄_i‖² + Σ_k valid_ik ‖n_ik − n̄_ik‖² ]

x, t: [b, D] images and texts, n: [b, K, D] hard captions (with `negatives`), and x̄, t̄, n̄ the
same by the moving average, without gradient. Squares are summed over the embedding and over image,
text and hard captions, and averaged over samples.

Relations:
- `distill` compares similarities with another model's; this one compares embeddings with its own
- the release of DeGLA sums over its batch of 256 with weight .005, which is weight 1.28 here

Papers:
- DeGLA (arXiv 2504.16801), with `teacher: {ema: 0.9996}`:
  `objective: {self_distillation: {weight: 1.28, negatives: true}}`

Needs: image, text, ema_image, ema_text; with `negatives` also negatives, negatives_valid and
ema_negatives

Cost: no pairs of different rows; O(b·K·D) memory, and one forward pass more of the average

Use: beside hard negatives in fine-tuning, to keep what the model could do before
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
    """This rank's share of L."""
    inputs = inputs.wide()
    distance = _squared(inputs.image, inputs.ema_image) + _squared(inputs.text, inputs.ema_text)

    # A sum over captions, as the release has it: samples with more of them weigh more.
    if options.negatives:
        captions = _squared(inputs.negatives, inputs.ema_negatives)  # [b, K]
        distance = distance + torch.where(inputs.negatives_valid, captions, 0).sum(1)
    return pairs.mean(distance)


def _squared(embedding: Tensor, average: Tensor) -> Tensor:
    """‖embedding − average‖² of each row; the average has no gradient."""
    return (embedding - average.detach()).square().sum(-1)
