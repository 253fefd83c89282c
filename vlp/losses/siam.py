"""Siamese prediction: an image predicts its text and a text its image, without any negative.

    L = mean_i [ 1 − p(x_i)·sg(t_i) + 1 − p(t_i)·sg(x_i) ] = ½ mean_i [ ‖p(x_i) − sg(t_i)‖² + … ]

x, t: [b, D] images and texts, p(x): [b, D] the unit rows that a predictor of each side makes of
them; sg: without gradient. The target is the row itself, or with `target: ema` that of the moving
average.

Relations:
- with a predictor that changes nothing and gradients through both sides it is `alignment`, which
  collapses; the predictor and sg keep it from that
- `self_distillation` compares a row with its own average, not with the other side's

Papers:
- SimSiam (arXiv 2011.10566) of two modalities, as SiamLIP of CLIP-rocket (arXiv 2305.08675):
  `objective: {infonce: {}, siam: {}}`; there projections with batch norm come before the predictor,
  and strong views are compared as well
- BYOL-LIP of the same, with `teacher: {ema: 0.99}`: `objective: {infonce: {}, siam: {target: ema}}`

Needs: image, text, predicted_image, predicted_text; with `target: ema` ema_image and ema_text for
image and text

Cost: no pairs of different rows; O(b·D) memory and FLOPs, and the predictor's

Use: beside a contrastive term. The paper finds plain CLIP with the same augmentation to do better
than this addition
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs

PREDICTED = frozenset({"predicted_image", "predicted_text"})


@dataclass(frozen=True)
class Options:
    # whose rows are predicted: the model's, or its moving average's (BYOL)
    target: Literal["model", "ema"] = "model"


def needs(options: Options) -> frozenset[str]:
    of_average = {"ema_image", "ema_text"} if options.target == "ema" else {"image", "text"}
    return PREDICTED | of_average


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    # Half precision would round the difference of rows that are close.
    inputs = inputs.wide()
    image, text = inputs.image, inputs.text
    if options.target == "ema":
        image, text = inputs.ema_image, inputs.ema_text

    distances = _squared(inputs.predicted_text, text) + _squared(inputs.predicted_image, image)
    return pairs.mean(distances) / 2


def _squared(predicted: Tensor, target: Tensor) -> Tensor:
    """‖p − sg(target)‖² of each row, [b]."""
    return (predicted - target.detach()).square().sum(1)
