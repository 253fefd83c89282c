"""What terms over more than two modalities read: a sample's rows, and which samples have them all.

A sample that lacks a modality has no volume and no product with the others: it is neither a row
nor a candidate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs

OPTIONAL = frozenset({"others", "others_valid"})


def further(inputs: Inputs) -> list[Tensor]:
    """The rows of the modalities beside image and text, [b, D] each."""
    return [] if inputs.others is None else list(inputs.others)


def complete(inputs: Inputs) -> Tensor:
    """Which samples have all modalities, [b] bool."""
    if inputs.others is None or inputs.others_valid is None:
        return torch.ones(len(inputs.image), dtype=torch.bool, device=inputs.image.device)
    return inputs.others_valid.all(0)


def mean_of_complete(losses: Tensor, valid: Tensor, pairs: Pairs) -> Tensor:
    """This rank's share of the mean over the samples that have all modalities, 0 where none has;
    their share of the samples is logged.
    """
    pairs.note("complete", pairs.mean(valid.float()))
    return pairs.mean(losses, valid)
