"""Distillation from a teacher: similarities, the order of hard captions, or concepts of an image.

`form` says what is taught:

similarity   the teacher's similarities of a whole row and column, z^T_ij = teacher_scale·u_i·v_j
                 L = ½ Σ_directions mean_i −Σ_j softmax_j(z^T_ij) · log softmax_j(z_ij)
             with z_ij = scale·x_i·t_j, and the teacher's u, v: [b, D'] of any width
ranking      the order in which it puts hard captions n: [b, K, D], by ListMLE over the valid ones
                 L = mean_i −Σ_r log [ e^{z(x_i, n_(r))} / Σ_{q≥r} e^{z(x_i, n_(q))} ]
             with n_(1), n_(2), … the captions by falling teacher_scores: [b, K]; or, with
             `divergence`, of the student's distribution Q from the teacher's P over the text and
             its captions, c_i0 = score_i, c_ik = teacher_scores_ik, at one temperature τ
                 L = mean_i KL(P_i‖Q_i), symmetric the mean with KL(Q_i‖P_i)
                 P_i = softmax_k(c_ik/τ), Q_i = softmax over {x_i·t_i/τ, x_i·n_ik/τ}
concepts     the concepts that it sees in an image, by an auxiliary head on the image tower
                 L = mean_i −Σ_c q_ic · log softmax(concept_logits_i)_c
             with q_i = concept_targets_i / Σ_c concept_targets_ic, both [b, M]

x, t: [b, D] images and texts. The last two are sample terms: over samples with a valid caption, and
with a target that is not zero; invalid captions have no influence. Nothing of the teacher has a
gradient.

Relations:
- similarity is `infonce` where the teacher is sure of every pair
- `self_distillation` keeps embeddings near the model's own moving average

Papers:
- MobileCLIP (arXiv 2311.17049) and TinyCLIP (arXiv 2309.12314), similarity:
  `objective: {infonce: {}, distill: {form: similarity}}`
- CPRD (arXiv 2407.07479), ranking: `objective: {infonce: {}, distill: {form: ranking}}`
- UniME-V2 (arXiv 2510.13515), scores of a judge:
  `objective: {distill: {form: ranking, divergence: symmetric, temperature: 0.01}}`
- U-MARVEL (arXiv 2507.14902), scores of a re-ranker, at a learned temperature:
  `objective: {distill: {form: ranking, divergence: forward}}`
- DiHT (arXiv 2301.02280), concepts: `objective: {hn_nce: {}, distill: {form: concepts}}`

Needs: image, text, scale, teacher_image, teacher_text, teacher_scale; ranking instead image, scale,
negatives, negatives_valid and teacher_scores, with a divergence also text and score; concepts
instead concept_logits and concept_targets

Cost: similarity three passes over pairs, student, teacher and both together, O(b·(D + D')) memory;
the others meet no other rows

Use: to train a small model from a large one. Stored embeddings (`vlp data embed`) save the
teacher's forward pass
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.losses._soft_targets import expected_gaps, log_normalisers
from vlp.losses._softmax import cross_entropy
from vlp.pairwise import Pairs, in_students_dtype, logsumexp, number, softplus

FORMS = {
    "similarity": {"image", "text", "scale", "teacher_image", "teacher_text", "teacher_scale"},
    "ranking": {"image", "scale", "negatives", "negatives_valid", "teacher_scores"},
    "concepts": {"concept_logits", "concept_targets"},
}


@dataclass(frozen=True)
class Options:
    # what is taught: similarities of a row, the order of hard captions, concepts
    form: Literal["similarity", "ranking", "concepts"] = "similarity"
    # ranking: not the order, but the distribution over the text and its hard captions: forward
    # KL(P‖Q) of teacher P and student Q, or the mean of both directions
    divergence: Literal["none", "forward", "symmetric"] = "none"
    # of both distributions of a divergence (UniME-V2: .01); null: the model's own, 1/scale
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.divergence != "none" and self.form != "ranking":
            raise ValueError(
                f"divergence: belongs to form: ranking, found form: {self.form}; drop one of them"
            )
        if self.temperature is not None and self.divergence == "none":
            raise ValueError("temperature: belongs to a divergence; name forward or symmetric")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"temperature: found {self.temperature}, expected a number > 0")


def label(options: Options) -> str:
    return "distill" if options.form == "similarity" else f"distill.{options.form}"


def needs(options: Options) -> frozenset[str]:
    # A distribution has a place for the text, whose score the data give.
    of_text = {"text", "score"} if options.divergence != "none" else set()
    return frozenset(FORMS[options.form] | of_text)


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    if options.divergence != "none":
        return divergence(inputs, pairs, options)
    functions: dict[str, Callable[[Inputs, Pairs], Tensor]] = {
        "similarity": similarity,
        "ranking": ranking,
        "concepts": concepts,
    }
    return functions[options.form](inputs, pairs)


def similarity(inputs: Inputs, pairs: Pairs) -> Tensor:
    """Cross-entropy to the teacher's rows and columns.

    Centred on the pair, −Σ_j p_j log softmax(z)_j = softplus(q_i) − Σ_{j≠i} p_j (z_ij − z_ii):
    nothing cancels where teacher and student are sure of it.
    """
    inputs = inputs.operands()
    u, v = (
        in_students_dtype(inputs.image, rows.detach())
        for rows in (inputs.teacher_image, inputs.teacher_text)
    )
    scale = number(inputs.scale, inputs.image)
    teacher_scale = number(inputs.teacher_scale, inputs.image).detach()
    rows, columns, positive = pairs.logsumexp(inputs.image, inputs.text, scale)

    # The teacher's normalisers come first. They must fit its scores in the second pass: made of
    # the same rows, and wide.
    values = log_normalisers(pairs, u, v, teacher_scale)

    # Then teacher and student in one tile: Σ_j p_j (s_ij − s_ii) of rows and columns.
    matrix = u, v
    row_gaps, column_gaps = expected_gaps(
        inputs, pairs, matrix, matrix, values, lambda a, lse: (teacher_scale * a - lse).exp()
    )
    row_terms = softplus(rows - positive) - scale * row_gaps
    column_terms = softplus(columns - positive) - scale * column_gaps
    return pairs.mean((row_terms + column_terms) / 2)


def ranking(inputs: Inputs, pairs: Pairs) -> Tensor:
    """ListMLE of each sample's valid captions."""
    inputs = inputs.wide()
    valid = inputs.negatives_valid
    z = torch.as_tensor(inputs.scale) * torch.einsum("bd,bkd->bk", inputs.image, inputs.negatives)

    # By the teacher's order; captions that are not valid come last.
    ranks_first = inputs.teacher_scores.masked_fill(~valid, -torch.inf)
    order = ranks_first.argsort(dim=1, descending=True, stable=True)
    z, ranked = z.gather(1, order), valid.gather(1, order)

    # −log of a softmax over what is left: its margin is over the captions below, q > r.
    n_captions = z.shape[1]
    below = torch.ones(n_captions, n_captions, dtype=torch.bool, device=z.device).triu(1)
    left = torch.where(below & ranked.unsqueeze(1), z.unsqueeze(1), -torch.inf)  # [b, r, q]
    losses = torch.where(ranked, softplus(logsumexp(left, 2) - z), 0).sum(1)
    return pairs.mean(losses, valid.any(1))


def divergence(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """Divergence of the student's distribution from the teacher's, over a text and its captions."""
    inputs = inputs.wide()
    valid = inputs.negatives_valid
    first = torch.ones_like(valid[:, :1])
    taking_part = torch.cat([first, valid], 1)  # [b, 1 + K]

    captions = torch.cat([inputs.text.unsqueeze(1), inputs.negatives], 1)
    cosines = torch.einsum("bd,bkd->bk", inputs.image, captions)
    scores = torch.cat([inputs.score.unsqueeze(1), inputs.teacher_scores], 1).detach()

    # Where both learn one temperature, the teacher's share of it has no gradient.
    scale = torch.as_tensor(inputs.scale, device=cosines.device)
    if options.temperature is not None:
        scale = torch.full_like(cosines[0, 0], 1 / options.temperature)
    student = _log_distribution(scale * cosines, taking_part)
    teacher = _log_distribution(scale.detach() * scores, taking_part)

    losses = _divergence(teacher, student)
    if options.divergence == "symmetric":
        losses = (losses + _divergence(student, teacher)) / 2
    return pairs.mean(losses, valid.any(1))


def _log_distribution(z: Tensor, taking_part: Tensor) -> Tensor:
    """log softmax over the entries that take part, [b, 1 + K]; −∞ for the others."""
    # Selected before the softmax: what does not take part may be NaN.
    chosen = torch.where(taking_part, z, -torch.inf)
    return torch.log_softmax(chosen, 1)


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL of two distributions given by their logarithms, [b]; entries of −∞ take no part."""
    taking_part = first > -torch.inf
    gaps = torch.where(taking_part, first - second, 0)
    return (first.exp() * gaps).sum(1)


def concepts(inputs: Inputs, pairs: Pairs) -> Tensor:
    """Cross-entropy to the teacher's distribution over concepts."""
    inputs = inputs.wide()
    target = inputs.concept_targets.detach()
    total = target.sum(1)
    named = total > 0

    # Rows without a concept take no part, be their logits NaN.
    logits = torch.where(named.unsqueeze(1), inputs.concept_logits, 0)
    share = target / torch.where(named, total, 1).unsqueeze(1)
    return pairs.mean(cross_entropy(logits, share), named)
