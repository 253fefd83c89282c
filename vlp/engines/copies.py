"""Copies of a model that do not copy its weights."""

from __future__ import annotations

import copy

from vlp.models.dual_encoder import DualEncoder


def sharing(model: DualEncoder) -> DualEncoder:
    """New modules over the same parameters and buffers: a mode of its own, and nothing compiled."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
