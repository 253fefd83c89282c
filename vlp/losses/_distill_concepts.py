"""Concepts of an image, learned by a head on its tower: as one distribution, or each alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vlp.losses._inputs import HALF, Inputs
from vlp.losses._softmax import cross_entropy
from vlp.pairwise import Pairs, softplus


def over_concepts(inputs: Inputs, pairs: Pairs, loss: Literal["ce", "bce"]) -> Tensor:
    """The mean over rows that have a concept; the others take no part, be their logits NaN."""
    _check_numbers(inputs.concept_targets)
    inputs = inputs.wide()
    logits = inputs.concept_logits
    targets = dense(inputs.concept_targets.detach(), logits)
    total = targets.sum(1)
    named = (total > 0) | total.isnan()
    logits = torch.where(named.unsqueeze(1), logits, 0)
    # A target that is NaN would pass for the preferred one of the cross-entropy.
    logits = torch.where(total.isnan().unsqueeze(1), torch.nan, logits)

    if loss == "bce":
        return pairs.mean(binary_cross_entropy(logits, targets.clamp(max=1)), named)
    share = targets / torch.where(named, total, 1).unsqueeze(1)
    return pairs.mean(cross_entropy(logits, share), named)


def _check_numbers(targets: Tensor) -> None:
    """Refuse numbers of concepts that half precision has rounded to those of others."""
    if targets.dim() > 2 and targets.dtype in HALF:
        raise ValueError(
            f"concept_targets: found numbers of concepts as {targets.dtype}, which rounds "
            "large ones to others; give them as float32"
        )


def dense(targets: Tensor, logits: Tensor) -> Tensor:
    """Weights of all concepts, [b, M]: as they are, or from [b, N, 2], numbers and weights of
    some. A number that is no concept makes its row NaN, so that a step with one is found.
    """
    if targets.dim() == 2:
        return targets

    numbers, weights = targets.unbind(-1)
    places = numbers.long()
    # Nothing is asked of the device: a place beyond its end would stop it without a word.
    beyond = (places < 0) | (places >= logits.shape[1])
    weights = torch.where(beyond & (weights != 0), torch.nan, weights)
    places = torch.where(beyond, 0, places)
    whole = torch.zeros_like(logits, dtype=targets.dtype)
    return whole.scatter_add(1, places, weights)


def binary_cross_entropy(
    logits: Tensor,  # [b, M]
    targets: Tensor,  # [b, M], 0 <= y <= 1, without gradient
) -> Tensor:
    """Σ_c y softplus(−z) + (1 − y) softplus(z), [b].

    In this form nothing cancels: softplus(z) − y·z rounds to 0 where the logit is right and large.
    """
    losses = targets * softplus(-logits) + (1 - targets) * softplus(logits)
    return losses.sum(1)
