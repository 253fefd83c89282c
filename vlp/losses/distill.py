"""Distillation from a teacher: one family, whose `form` says what is taught.

similarity  (TinyCLIP, MobileCLIP, arXiv 2311.17049) the teacher's similarities of a whole row and column,
                L = ½ Σ_directions mean_i −Σ_j softmax_j(z^T_ij) · log softmax_j(z_ij),   z^T = teacher_scale·u·v
            with the teacher's embeddings u, v: [b, D'], of any width, and its own scale (1/temperature)
ranking     (CPRD) the order in which the teacher puts hard captions, by ListMLE over the valid ones: with n_(1), n_(2), …
            the captions by falling teacher_scores [b, K],
                L = mean_i −Σ_r log [ e^{z(x_i, n_(r))} / Σ_{q≥r} e^{z(x_i, n_(q))} ]
            a sample term over the samples with a valid caption; invalid ones have no influence
concepts    (DiHT, arXiv 2301.02280) the concepts that a teacher sees in an image, by auxiliary heads on the image tower,
                L = mean_i −Σ_c q_ic · log softmax(concept_logits_i)_c,   q_i = concept_targets_i / Σ_c concept_targets_ic
            both [b, M]; a sample term over the samples with a target that is not zero

Nothing of the teacher has a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.losses._softmax import cross_entropy
from vlp.pairwise import SUM, Pairs, Reduction, Tile, logsumexp, softplus

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
    function = {"similarity": similarity, "ranking": ranking, "concepts": concepts}[options.form]
    return function(inputs.wide(), pairs)


def similarity(inputs: Inputs, pairs: Pairs) -> Tensor:
    """Two passes: the teacher's normalisers (why scores must be wide: they have to fit), then the
    weighted sums.

    Centred on the pair, −Σ_j p_j log softmax(z)_j = softplus(q_i) − Σ_{j≠i} p_j (z_ij − z_ii):
    nothing cancels where teacher and student are sure of it.
    """
    u, v = inputs.teacher_image.detach(), inputs.teacher_text.detach()
    scale, teacher_scale = (
        torch.as_tensor(s, device=u.device) for s in (inputs.scale, inputs.teacher_scale)
    )
    rows, columns, positive = pairs.logsumexp(inputs.image, inputs.text, scale)
    with torch.no_grad():
        margins, teacher_own = (
            pairs.margin_logsumexp(u, v, teacher_scale),
            teacher_scale * (u * v).sum(1),
        )
        by_row, by_column = ((teacher_own + softplus(q)).to(u.dtype) for q in margins)
    own = (inputs.image * inputs.text).sum(1)
    row_gaps, column_gaps = pairs.reduce(
        Reduction(_expected_gaps, rows=(SUM,), columns=(SUM,)),
        [inputs.image, u],
        [inputs.text, v],
        row_values=[by_row, own],
        column_values=[by_column, own],
        shared=[teacher_scale.detach()],
    )
    row_terms = softplus(rows - positive) - scale * row_gaps
    column_terms = softplus(columns - positive) - scale * column_gaps
    return pairs.mean((row_terms + column_terms) / 2)


def _expected_gaps(tile: Tile) -> tuple[Tensor, ...]:
    """s_ij − s_ii and s_ij − s_jj times the teacher's probability of the row and of the column; 0
    at the pair.
    """
    student, teacher = tile.scores[0], tile.shared[0] * tile.scores[1]
    gaps = []
    for (normaliser, own), axis in ((tile.row_values, 1), (tile.column_values, 0)):
        probability = (teacher - normaliser.unsqueeze(axis)).exp().masked_fill(tile.positive, 0)
        gaps.append(probability * (student - own.unsqueeze(axis)))
    return tuple(gaps)


def ranking(inputs: Inputs, pairs: Pairs) -> Tensor:
    valid = inputs.negatives_valid
    z = torch.as_tensor(inputs.scale) * torch.einsum("bd,bkd->bk", inputs.image, inputs.negatives)
    order = inputs.teacher_scores.masked_fill(~valid, -torch.inf).argsort(
        dim=1, descending=True, stable=True
    )
    z, ranked = z.gather(1, order), valid.gather(1, order)
    below = torch.ones(z.shape[1], z.shape[1], dtype=torch.bool, device=z.device).triu(1)  # q > r
    left = torch.where(below & ranked.unsqueeze(1), z.unsqueeze(1), -torch.inf)
    loss = torch.where(ranked, softplus(logsumexp(left, 2) - z), 0).sum(1)
    return pairs.mean(loss, valid.any(1))


def concepts(inputs: Inputs, pairs: Pairs) -> Tensor:
    target = inputs.concept_targets.detach()
    total = target.sum(1)
    named = total > 0
    logits = torch.where(named.unsqueeze(1), inputs.concept_logits, 0)
    share = target / torch.where(named, total, 1).unsqueeze(1)
    return pairs.mean(cross_entropy(logits, share), named)
