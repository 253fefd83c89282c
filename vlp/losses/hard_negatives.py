"""Hard captions, or hard images, as negatives: seven published terms over what is nearly right.

x, t: [b, D] images and texts; n: [b, K, D], n_ik being caption k of sample i, z(a, c) =
scale·a·c. `form` gives the term L:

negclip   softmax of each image over all texts and all hard captions of the candidates, weight λ; of
          each text over images, unchanged, weight 1−λ; λ ½. Hard captions are never anchors.
triplet   negclip(x, t, n) + negclip(x⁻, n, t) with n = n_i1 and its own image x⁻_i1 of
          x⁻: [b, J, D]; the second half is over the samples where both are valid.
own       softmax of x_i over {t_i, n_i1 … n_iK}. With the target y = (1−ε)δ + ε/(1 + #valid) on
          t_i and every valid caption: Σ_k y_k (1−p_k)^γ (−log p_k).
text      softmax of t_i over {t̄_i, n_i1 … n_iK}, t̄ of the moving average, scale 10.
rank      mean over valid of relu(m_k + z(x_i, n_ik) − z(x_i, t_i)) with an adaptive margin
          m_k = mean_i z(x_i, t_i) − mean_i z(x_i, n_ik) of the PREVIOUS step, in [0, 10], 0 at
          first; state.
intra     cross-entropy of [z(x_i, t_i); scale·t_i·every caption of the candidates] to the first.
sigmoid   −log σ(z(x_i, t_i) + bias) − Σ_k log σ(−z(x_i, n_ik) − bias)

`negatives: images` exchanges the sides: each form then reads x⁻ for n, t for x and x for t, so
that `own` is the softmax of t_i over {x_i, x⁻_i1 … x⁻_iJ}. Not for triplet, which has both, and
text.

`own`, `text`, `rank` and `sigmoid` are sample terms: means over samples (or pairs i, k) with a
valid negative, of all ranks. Invalid ones have no influence at all.

Relations:
- negclip, where no caption is valid, equals `infonce`
- `self_distillation` beside them keeps what the model could do before
- sigmoid is a row of `siglip` whose candidates are the sample's own
- `vlp data negatives` writes captions, `vlp data mine` neighbours with their images; negatives that
  are pairs themselves need no term: `data.together` puts those of one origin into one batch

Papers:
- NegCLIP (arXiv 2210.01936): `objective: {hard_negatives: {form: negclip}}`
- E5-V (arXiv 2407.12580), of pairs of texts, the query in the image's place (data.pairs: text):
  `objective: {hard_negatives: {form: negclip, image_weight: 1}}`
- TripletCLIP (arXiv 2411.02545): `objective: {hard_negatives: {form: triplet}}`
- TSVLC: `objective: {infonce: {}, hard_negatives: {form: own}}`
- FSC-CLIP (arXiv 2410.05210), its global part:
  `objective: {infonce: {}, hard_negatives: {form: own, focal: 2, smoothing: 0.02, weight: 0.5}}`
- DeGLA (arXiv 2504.16801), IGC and TGC: `objective: {infonce: {}, hard_negatives: [{form: own,
  weight: 0.1}, {form: text, weight: 0.1}]}`
- CE-CLIP (arXiv 2306.08832), CMR and IMC: `objective: {hard_negatives: [{form: negclip}, {form:
  rank, weight: 0.2}, {form: intra, weight: 0.3}]}`
- MMCLIP (arXiv 2505.20152), both sides:
  `objective: {hard_negatives: [{form: own}, {form: sigmoid, negatives: images}]}`

Needs: image, text, scale, negatives, negatives_valid; images instead negative_images and
negative_images_valid, and triplet all four; text also ema_text; sigmoid also bias

Cost: negclip, triplet and intra a pass over b × n·K captions beside the pairs, O(b·K·D) memory; the
others O(b·K·D) memory and FLOPs. The text tower runs on b·K captions more, with images the image
tower on b·J pictures

Use: to fine-tune for composition (word order, attributes, relations). Report a compositional score
together with retrieval and zero-shot accuracy: the gain is easily paid for there
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.losses._own_sample import focal_loss
from vlp.losses._softmax import negative_log_probability
from vlp.pairwise import Pairs, logaddexp, softplus

CAPTIONS = {"negatives", "negatives_valid"}
IMAGES = {"negative_images", "negative_images_valid"}
LARGEST_MARGIN = 10.0


@dataclass(frozen=True)
class Options:
    # negclip, triplet, intra: softmax over the batch; own, text, rank, sigmoid: over a sample's own
    # captions
    form: Literal["negclip", "triplet", "own", "text", "rank", "intra", "sigmoid"] = "negclip"
    # captions that are wrong of an image; images: that a caption is wrong of, all sides exchanged
    negatives: Literal["captions", "images"] = "captions"
    # λ of `negclip`, the weight of the direction anchored at images; texts get 1 − λ
    image_weight: float = 0.5
    focal: float = 0.0  # γ of `own` (FSC-CLIP: 2)
    smoothing: float = 0.0  # ε of `own` (FSC-CLIP: .02)
    text_scale: float = 10.0  # fixed scale of `text`

    def __post_init__(self) -> None:
        if self.negatives == "images" and self.form in ("triplet", "text"):
            raise ValueError(
                f"form: {self.form} has no sides to exchange; remove negatives: images, or take "
                "negclip, own, rank, intra or sigmoid"
            )
        if (self.focal or self.smoothing) and self.form != "own":
            raise ValueError(
                f"focal and smoothing belong to form: own, not {self.form}; remove them"
            )
        if self.image_weight != 0.5 and self.form != "negclip":
            raise ValueError(f"image_weight belongs to form: negclip, not {self.form}; remove it")
        if not 0 <= self.image_weight <= 1:
            raise ValueError(f"image_weight: found {self.image_weight}, expected 0 <= λ <= 1")
        if self.text_scale != 10 and self.form != "text":
            raise ValueError(f"text_scale belongs to form: text, not {self.form}; remove it")
        if self.focal < 0 or not 0 <= self.smoothing < 1 or self.text_scale <= 0:
            raise ValueError(
                f"expected focal >= 0, 0 <= smoothing < 1, text_scale > 0, found {self}"
            )


def label(options: Options) -> str:
    side = "_images" if options.negatives == "images" else ""
    return f"hard_negatives.{options.form}{side}"


def needs(options: Options) -> frozenset[str]:
    of_form = {"triplet": IMAGES, "text": {"ema_text"}, "sigmoid": {"bias"}}
    negatives = IMAGES if options.negatives == "images" else CAPTIONS
    return frozenset({"image", "text", "scale"} | negatives | of_form.get(options.form, set()))


def initial_state(options: Options) -> dict[str, Tensor]:
    """The margins of `rank`, one a caption position.

    Empty until the first step says how many there are.
    """
    return {"margin": torch.zeros(0)} if options.form == "rank" else {}


def term(
    inputs: Inputs, pairs: Pairs, options: Options, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's share of L, and the margins of the next step."""
    if options.negatives == "images":
        inputs = _exchanged(inputs)
    if options.form == "rank":
        return rank(inputs, pairs, state["margin"])

    functions = {
        "negclip": negclip,
        "triplet": triplet,
        "own": own,
        "text": text,
        "intra": intra,
        "sigmoid": sigmoid,
    }
    return functions[options.form](inputs, pairs, options), state


def _exchanged(inputs: Inputs) -> Inputs:
    """Images as texts and texts as images, so that hard images stand where hard captions did."""
    return replace(
        inputs,
        image=inputs.text,
        text=inputs.image,
        negatives=inputs.negative_images,
        negatives_valid=inputs.negative_images_valid,
    )


# Batch terms


def negclip(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """InfoNCE whose rows have every valid hard caption of the group as candidates too."""
    rows, columns, positive = pairs.logsumexp(inputs.image, inputs.text, inputs.scale)

    # Hard captions join the images' candidates, and are no anchors themselves.
    rows = logaddexp(rows, _all_captions(inputs, pairs, inputs.image))
    λ = options.image_weight
    by_image, by_text = softplus(rows - positive), softplus(columns - positive)
    return pairs.mean(λ * by_image + (1 - λ) * by_text)


def triplet(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """negclip of the pairs, and of the first hard captions with their own images."""
    caption = inputs.negatives[:, 0]
    valid = inputs.negatives_valid[:, 0] & inputs.negative_images_valid[:, 0]

    # Roles exchanged: (x⁻, n) are the pairs, and the true texts are what is nearly right.
    x = torch.where(valid.unsqueeze(1), inputs.negative_images[:, 0], 0)
    scale, wide = inputs.scale, inputs.wide()
    own_scores = (x.to(wide.negatives.dtype) * wide.negatives[:, 0]).sum(1)
    positive = torch.as_tensor(scale) * own_scores
    rows = pairs.row_logsumexp(x, caption, scale, valid=valid, paired=True)
    columns = pairs.row_logsumexp(caption, x, scale, valid=valid, paired=True)
    rows = logaddexp(rows, pairs.row_logsumexp(x, inputs.text, scale))
    second = (softplus(rows - positive) + softplus(columns - positive)) / 2

    first = Inputs(
        inputs.image,
        inputs.text,
        scale,
        negatives=inputs.negatives[:, :1],
        negatives_valid=inputs.negatives_valid[:, :1],
    )
    return negclip(first, pairs, options) + pairs.mean(second, valid)


def intra(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """A text must score higher with its image than with any hard caption of the group."""
    # The text is the anchor: what competes with its image is text, too.
    wide = inputs.wide()
    positive = torch.as_tensor(inputs.scale) * (wide.image * wide.text).sum(1)
    return pairs.mean(softplus(_all_captions(inputs, pairs, inputs.text) - positive))


# Sample terms


def own(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """An image must prefer its text to its own hard captions."""
    inputs = inputs.wide()
    valid = inputs.negatives_valid
    z = _own_scores(inputs.image, inputs.text, inputs, inputs.scale)
    return pairs.mean(focal_loss(z, valid, options.focal, options.smoothing), valid.any(1))


def text(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """A text must prefer its embedding by the moving average to its own hard captions."""
    inputs = inputs.wide()
    z = _own_scores(inputs.text, inputs.ema_text.detach(), inputs, options.text_scale)
    return pairs.mean(negative_log_probability(z, 0), inputs.negatives_valid.any(1))


def sigmoid(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """A pair matches and none of its own hard captions does, each a decision by itself."""
    inputs = inputs.wide()
    valid = inputs.negatives_valid
    scale, bias = torch.as_tensor(inputs.scale), torch.as_tensor(inputs.bias)
    positive = scale * (inputs.image * inputs.text).sum(1) + bias  # [b]
    hard = scale * torch.einsum("bd,bkd->bk", inputs.image, inputs.negatives) + bias  # [b, K]

    losses = softplus(-positive) + torch.where(valid, softplus(hard), 0).sum(1)
    return pairs.mean(losses, valid.any(1))


def rank(
    inputs: Inputs,
    pairs: Pairs,
    adaptive: Tensor,  # [K] the margins m_k of the previous step, or [0] before the first
) -> tuple[Tensor, dict[str, Tensor]]:
    """An image must score its text higher than each hard caption by a margin."""
    inputs = inputs.wide()
    scale, valid = torch.as_tensor(inputs.scale), inputs.negatives_valid
    positive = scale * (inputs.image * inputs.text).sum(1)  # [b]
    hard = scale * torch.einsum("bd,bkd->bk", inputs.image, inputs.negatives)  # [b, K]

    # The number of caption positions is not known before the first batch.
    if adaptive.numel() == 0:
        adaptive = torch.zeros(hard.shape[1])
    adaptive = adaptive.to(hard)
    loss = pairs.mean(torch.relu(adaptive + hard - positive.unsqueeze(1)), valid)
    return loss, {"margin": _next_margins(adaptive, positive, hard, valid, pairs)}


@torch.no_grad()
def _next_margins(
    adaptive: Tensor, positive: Tensor, hard: Tensor, valid: Tensor, pairs: Pairs
) -> Tensor:
    """[K] mean positive − mean hard score over all ranks; as before where nothing was valid."""
    n_valid = pairs.sum_over_ranks(valid.to(hard).sum(0))
    total_hard = pairs.sum_over_ranks(torch.where(valid, hard, 0).sum(0))
    total_positive = pairs.sum_over_ranks(positive.sum())
    n_rows = pairs.sum_over_ranks(torch.ones_like(positive).sum())

    # A position without a valid caption keeps its margin, and so does a step that is not finite.
    gap = total_positive / n_rows - total_hard / n_valid.clamp(min=1)
    moves = (n_valid > 0) & gap.isfinite()
    return torch.where(moves, gap.clamp(0, LARGEST_MARGIN), adaptive)


# Scores with hard captions


def _all_captions(inputs: Inputs, pairs: Pairs, anchors: Tensor) -> Tensor:
    """LSE over every valid hard caption of the group, [b]."""
    return pairs.row_logsumexp(
        anchors,
        inputs.negatives.flatten(0, 1),
        inputs.scale,
        valid=inputs.negatives_valid.flatten(),
    )


def _own_scores(
    anchor: Tensor,  # [b, D]
    positive: Tensor,  # [b, D]
    inputs: Inputs,
    scale: Tensor | float,
) -> Tensor:
    """Scores of each anchor with its positive, then its captions, [b, 1 + K]; −∞ if not valid."""
    # −∞ leaves a caption out of every sum.
    candidates = torch.cat([positive.unsqueeze(1), inputs.negatives], 1)
    z = torch.as_tensor(scale) * torch.einsum("bd,bkd->bk", anchor, candidates)
    return torch.cat([z[:, :1], z[:, 1:].masked_fill(~inputs.negatives_valid, -torch.inf)], 1)
