"""The forms of `distill` that learn a teacher's scores of candidates, each sample for itself.

`inputs` are wide; captions that are not valid have no influence, be they NaN. Nor have those that a
judge did not score, whose score is NaN, and all of a sample whose own text it did not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs, logsumexp, softplus


def ranking(inputs: Inputs, pairs: Pairs, delta: float | None) -> Tensor:
    """ListMLE of each sample's valid captions, up to the first that scores below its text − δ."""
    valid = _scored(inputs, with_text=delta is not None)
    z = torch.as_tensor(inputs.scale) * torch.einsum("bd,bkd->bk", inputs.image, inputs.negatives)
    if delta is not None:
        valid = valid & (inputs.teacher_scores >= inputs.score.unsqueeze(1) - delta)
    return pairs.mean(list_mle(z, inputs.teacher_scores, valid), valid.any(1))


def _scored(inputs: Inputs, with_text: bool) -> Tensor:
    """The valid captions with a score, [b, K]; `with_text`: of samples whose text has one too."""
    valid = inputs.negatives_valid & ~inputs.teacher_scores.isnan()
    return valid & ~inputs.score.isnan().unsqueeze(1) if with_text else valid


def list_mle(z: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """−Σ_r log [ e^{z_(r)} / Σ_{q≥r} e^{z_(q)} ] of each row over its valid entries, [b].

    z: [b, K] of the student; (1), (2), … its entries by falling `scores` [b, K]. A row of fewer
    than two valid entries is 0.
    """
    # By the teacher's order; entries that are not valid come last.
    ranks_first = scores.detach().masked_fill(~valid, -torch.inf)
    order = ranks_first.argsort(dim=1, descending=True, stable=True)
    z, ranked = z.gather(1, order), valid.gather(1, order)

    # −log of a softmax over what is left: its margin is over the entries below, q > r.
    n_entries = z.shape[1]
    below = torch.ones(n_entries, n_entries, dtype=torch.bool, device=z.device).triu(1)
    left = torch.where(below & ranked.unsqueeze(1), z.unsqueeze(1), -torch.inf)  # [b, r, q]
    return torch.where(ranked, softplus(logsumexp(left, 2) - z), 0).sum(1)


def margin(inputs: Inputs, pairs: Pairs, gamma: float) -> Tensor:
    """Squared error of the student's margins to γ times the teacher's, over valid (i, k)."""
    valid = _scored(inputs, with_text=True)
    own = (inputs.image * inputs.text).sum(1, keepdim=True)
    margins = own - torch.einsum("bd,bkd->bk", inputs.image, inputs.negatives)

    # Selected before the square: what does not take part may be NaN.
    wanted = gamma * (inputs.score.unsqueeze(1) - inputs.teacher_scores).detach()
    wanted = torch.where(valid, wanted, 0)
    return pairs.mean((margins - wanted).square(), valid)


def divergence(inputs: Inputs, pairs: Pairs, kind: str, temperature: float | None) -> Tensor:
    """Divergence of the student's distribution from the teacher's, over a text and its captions."""
    valid = _scored(inputs, with_text=True)
    first = torch.ones_like(valid[:, :1])
    taking_part = torch.cat([first, valid], 1)  # [b, 1 + K]

    captions = torch.cat([inputs.text.unsqueeze(1), inputs.negatives], 1)
    cosines = torch.einsum("bd,bkd->bk", inputs.image, captions)
    scores = torch.cat([inputs.score.unsqueeze(1), inputs.teacher_scores], 1).detach()
    # Of a row that takes no part as a whole: a gradient of 0 times NaN would be NaN.
    scores = torch.where(scores.isnan(), 0, scores)

    # Where both learn one temperature, the teacher's share of it has no gradient.
    scale = torch.as_tensor(inputs.scale, device=cosines.device)
    if temperature is not None:
        scale = torch.full_like(cosines[0, 0], 1 / temperature)
    student = _log_distribution(scale * cosines, taking_part)
    teacher = _log_distribution(scale.detach() * scores, taking_part)

    losses = _divergence(teacher, student)
    if kind == "symmetric":
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
