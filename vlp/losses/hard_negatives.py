"""Hard captions as negatives: one family, whose `form` gives the published terms.

x, t: [b, D] images and texts; n: [b, K, D], n_ik being caption k of sample i.

negclip   (NegCLIP, arXiv 2210.01936) softmax of each image over all texts and all hard captions of the candidates;
          of each text over images, unchanged; ½ each. Hard captions are never anchors.
triplet   (TripletCLIP, arXiv 2411.02545) negclip(x, t, n) + negclip(x⁻, n, t) with n = n_i1 and its own image x⁻;
          the second half is over the samples whose n_i1 is valid.
own       (TSVLC; DeGLA IGC; FSC-CLIP) softmax of x_i over {t_i, n_i1 … n_iK}. With the target
          y = (1−ε)δ + ε/(1 + #valid) on t_i and every valid caption: Σ_k y_k (1−p_k)^γ (−log p_k).
text      (DeGLA TGC, arXiv 2504.16801) softmax of t_i over {t̄_i, n_i1 … n_iK}, t̄ of the moving average, scale 10.
rank      (CE-CLIP CMR, arXiv 2306.08832) mean over valid of relu(m_k + z(x_i, n_ik) − z(x_i, t_i)) with an adaptive
          margin m_k = mean_i z(x_i, t_i) − mean_i z(x_i, n_ik) of the PREVIOUS step, in [0, 10], 0 at first; state.
intra     (CE-CLIP IMC) cross-entropy of [z(x_i, t_i); scale·t_i·every caption of the candidates] to the first.

`own`, `text` and `rank` are sample terms: means over samples (or pairs i, k) with a valid caption,
of all ranks. Invalid captions have no influence at all. Published weights: own .1 (IGC) or .5
(FSC), text .1, rank .2, intra .3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.losses._softmax import margin
from vlp.pairwise import Pairs, logaddexp, softplus

CAPTIONS = {"negatives", "negatives_valid"}
LARGEST_MARGIN = 10.0


@dataclass(frozen=True)
class Options:
    # negclip, triplet, intra: softmax over the batch; own, text, rank: over a sample's own captions
    form: Literal["negclip", "triplet", "own", "text", "rank", "intra"] = "negclip"
    focal: float = 0.0  # γ of `own` (FSC-CLIP: 2)
    smoothing: float = 0.0  # ε of `own` (FSC-CLIP: .02)
    text_scale: float = 10.0  # fixed scale of `text`

    def __post_init__(self) -> None:
        if (self.focal or self.smoothing) and self.form != "own":
            raise ValueError(
                f"focal and smoothing belong to form: own, not {self.form}; remove them"
            )
        if self.text_scale != 10 and self.form != "text":
            raise ValueError(f"text_scale belongs to form: text, not {self.form}; remove it")
        if self.focal < 0 or not 0 <= self.smoothing < 1 or self.text_scale <= 0:
            raise ValueError(
                f"expected focal >= 0, 0 <= smoothing < 1, text_scale > 0, found {self}"
            )


def label(options: Options) -> str:
    return f"hard_negatives.{options.form}"


def needs(options: Options) -> frozenset[str]:
    extra = {"triplet": {"negative_image"}, "text": {"ema_text"}}.get(options.form, set())
    return frozenset({"image", "text", "scale"} | CAPTIONS | extra)


def initial_state(options: Options) -> dict[str, Tensor]:
    """The margins of `rank`, one a caption position; empty until the first step says how many there
    are.
    """
    return {"margin": torch.zeros(0)} if options.form == "rank" else {}


def term(
    inputs: Inputs, pairs: Pairs, options: Options, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    if options.form == "rank":
        return rank(inputs, pairs, state["margin"])
    function = {"negclip": negclip, "triplet": triplet, "own": own, "text": text, "intra": intra}[
        options.form
    ]
    return function(inputs, pairs, options), state


def negclip(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    rows, columns, positive = pairs.logsumexp(inputs.image, inputs.text, inputs.scale)
    hard = _all_captions(inputs, pairs, inputs.image)
    return pairs.mean(softplus(logaddexp(rows, hard) - positive) + softplus(columns - positive)) / 2


def triplet(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    caption, valid = inputs.negatives[:, 0], inputs.negatives_valid[:, 0]
    x, scale, wide = inputs.negative_image, inputs.scale, inputs.wide()
    positive = torch.as_tensor(scale) * (wide.negative_image * wide.negatives[:, 0]).sum(1)
    rows = pairs.row_logsumexp(x, caption, scale, valid=valid, paired=True)
    columns = pairs.row_logsumexp(caption, x, scale, valid=valid, paired=True)
    hard = pairs.row_logsumexp(x, inputs.text, scale)
    second = (softplus(logaddexp(rows, hard) - positive) + softplus(columns - positive)) / 2
    first = Inputs(
        inputs.image,
        inputs.text,
        scale,
        negatives=caption.unsqueeze(1),
        negatives_valid=valid.unsqueeze(1),
    )
    return negclip(first, pairs, options) + pairs.mean(second, valid)


def own(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    inputs = inputs.wide()
    z, ε, valid = (
        _own_scores(inputs.image, inputs.text, inputs, inputs.scale),
        options.smoothing,
        inputs.negatives_valid,
    )
    loss = _focal(margin(z, 0), options.focal)

    if ε:
        share = ε / (1 + valid.sum(1)).to(z.dtype)
        loss = (1 - ε + share) * loss
        for k in range(valid.shape[1]):
            takes_part = valid[:, k]
            finite = z.masked_fill(
                ~takes_part.unsqueeze(1), 0
            )  # the margin of what takes no part would be infinite
            caption = _focal(margin(finite, k + 1), options.focal)
            loss = loss + share * torch.where(takes_part, caption, 0)
    return pairs.mean(loss, valid.any(1))


def text(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    inputs = inputs.wide()
    z = _own_scores(inputs.text, inputs.ema_text.detach(), inputs, options.text_scale)
    return pairs.mean(softplus(margin(z, 0)), inputs.negatives_valid.any(1))


def intra(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    wide = inputs.wide()
    positive = torch.as_tensor(inputs.scale) * (wide.image * wide.text).sum(1)
    return pairs.mean(softplus(_all_captions(inputs, pairs, inputs.text) - positive))


def rank(inputs: Inputs, pairs: Pairs, adaptive: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """adaptive: [K] the margins m_k of the previous step, or [0] before the first."""
    inputs = inputs.wide()
    scale, valid = torch.as_tensor(inputs.scale), inputs.negatives_valid
    positive = scale * (inputs.image * inputs.text).sum(1)
    hard = scale * torch.einsum("bd,bkd->bk", inputs.image, inputs.negatives)
    if adaptive.numel() == 0:
        adaptive = torch.zeros(hard.shape[1])
    adaptive = adaptive.to(hard)
    loss = pairs.mean(torch.relu(adaptive + hard - positive.unsqueeze(1)), valid)
    with torch.no_grad():
        count = pairs.sum_over_ranks(valid.to(hard).sum(0))
        total = pairs.sum_over_ranks(torch.where(valid, hard, 0).sum(0))
        mean = pairs.sum_over_ranks(positive.sum()) / pairs.sum_over_ranks(
            torch.ones_like(positive).sum()
        )
        gap = mean - total / count.clamp(min=1)
        moves = (count > 0) & gap.isfinite()
        adaptive = torch.where(moves, gap.clamp(0, LARGEST_MARGIN), adaptive)
    return loss, {"margin": adaptive}


def _all_captions(inputs: Inputs, pairs: Pairs, anchors: Tensor) -> Tensor:
    """LSE over every valid hard caption of the group, [b]."""
    return pairs.row_logsumexp(
        anchors,
        inputs.negatives.flatten(0, 1),
        inputs.scale,
        valid=inputs.negatives_valid.flatten(),
    )


def _own_scores(anchor: Tensor, positive: Tensor, inputs: Inputs, scale: Tensor | float) -> Tensor:
    """Scores of each anchor with its positive and its own captions, [b, 1 + K]; −∞ for those that
    are not valid.
    """
    candidates = torch.cat([positive.unsqueeze(1), inputs.negatives], 1)
    z = torch.as_tensor(scale) * torch.einsum("bd,bkd->bk", anchor, candidates)
    return torch.cat([z[:, :1], z[:, 1:].masked_fill(~inputs.negatives_valid, -torch.inf)], 1)


def _focal(q: Tensor, γ: float) -> Tensor:
    """(1 − p)^γ (−log p) of a probability p = σ(−q), by the logarithm of 1 − p = σ(q)."""
    loss = softplus(q)
    return loss * (-γ * softplus(-q)).exp() if γ else loss
