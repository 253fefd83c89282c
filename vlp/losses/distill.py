"""Distillation from a teacher: similarities, the order of hard captions, or concepts of an image.

`form` says what is taught:

similarity   the teacher's similarities of a whole row and column, z^T_ij = teacher_scale·u_i·v_j
                 L = ½ Σ_directions mean_i −Σ_j softmax_j(z^T_ij) · log softmax_j(z_ij)
             with z_ij = scale·x_i·t_j, and the teacher's u, v: [b, D'] of any width
ranking      the order in which it puts hard captions n: [b, K, D], by ListMLE over the valid ones
                 L = mean_i −Σ_r log [ e^{z(x_i, n_(r))} / Σ_{q≥r} e^{z(x_i, n_(q))} ]
             with n_(1), n_(2), … the captions by falling teacher_scores: [b, K]
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
- DiHT (arXiv 2301.02280), concepts: `objective: {hn_nce: {}, distill: {form: concepts}}`

Needs: image, text, scale, teacher_image, teacher_text, teacher_scale; ranking instead image, scale,
negatives, negatives_valid and teacher_scores; concepts instead concept_logits and concept_targets

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
from vlp.losses._softmax import cross_entropy
from vlp.pairwise import (
    SUM,
    Pairs,
    Reduction,
    Tile,
    in_students_dtype,
    logsumexp,
    softplus,
    widened,
)

FORMS = {
    "similarity": {"image", "text", "scale", "teacher_image", "teacher_text", "teacher_scale"},
    "ranking": {"image", "scale", "negatives", "negatives_valid", "teacher_scores"},
    "concepts": {"concept_logits", "concept_targets"},
}


@dataclass(frozen=True)
class Options:
    # what is taught: similarities of a row, the order of hard captions, concepts
    form: Literal["similarity", "ranking", "concepts"] = "similarity"


def label(options: Options) -> str:
    return "distill" if options.form == "similarity" else f"distill.{options.form}"


def needs(options: Options) -> frozenset[str]:
    return frozenset(FORMS[options.form])


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
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
    wide = inputs.wide()
    u, v = (
        in_students_dtype(inputs.image, rows.detach())
        for rows in (inputs.teacher_image, inputs.teacher_text)
    )
    scale, teacher_scale = (
        torch.as_tensor(value, device=u.device) for value in (wide.scale, wide.teacher_scale)
    )
    rows, columns, positive = pairs.logsumexp(inputs.image, inputs.text, scale)

    # The teacher's normalisers come first. They must fit its scores in the second pass: made of
    # the same rows, and wide.
    with torch.no_grad():
        margins = pairs.margin_logsumexp(u, v, teacher_scale)
        teacher_positive = teacher_scale * (widened(u) * widened(v)).sum(1)
        by_row, by_column = (
            (teacher_positive + softplus(q)).to(teacher_positive.dtype) for q in margins
        )

    # Then teacher and student in one tile: Σ_j p_j (s_ij − s_ii) of rows and columns.
    cosine = (wide.image * wide.text).sum(1)
    row_gaps, column_gaps = pairs.reduce(
        Reduction(_expected_gaps, rows=(SUM,), columns=(SUM,)),
        [inputs.image, u],
        [inputs.text, v],
        row_values=[by_row, cosine],
        column_values=[by_column, cosine],
        shared=[teacher_scale.detach()],
    )
    row_terms = softplus(rows - positive) - scale * row_gaps
    column_terms = softplus(columns - positive) - scale * column_gaps
    return pairs.mean((row_terms + column_terms) / 2)


def _expected_gaps(tile: Tile) -> tuple[Tensor, ...]:
    """s_ij − s_ii and s_ij − s_jj times the teacher's probability of the row and of the column.

    0 at the pair.
    """
    student, teacher = tile.scores[0], tile.shared[0] * tile.scores[1]
    gaps = []
    for (normaliser, cosine), axis in ((tile.row_values, 1), (tile.column_values, 0)):
        probability = (teacher - normaliser.unsqueeze(axis)).exp().masked_fill(tile.positive, 0)
        gaps.append(probability * (student - cosine.unsqueeze(axis)))
    return tuple(gaps)


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
