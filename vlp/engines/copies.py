"""Copies of a model that do not copy its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlp.models.dual_encoder import DualEncoder


def sharing(model: DualEncoder) -> DualEncoder:
    """New modules over the same parameters and buffers: a mode of its own, and nothing compiled."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def skeleton(model: DualEncoder) -> DualEncoder:
    """A copy whose parameters have shapes and no values (on torch's meta device)."""
    shapes = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        shapes[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    return copy.deepcopy(model, shapes)


def filled(model: DualEncoder, weights: Mapping[str, Tensor], device: torch.device) -> DualEncoder:
    """A model like the skeleton `model` that takes `weights`, whole tensors on `device`, as its
    own; frozen and in evaluation mode.
    """
    copied = copy.deepcopy(model).requires_grad_(False)
    copied.load_state_dict(dict(weights), assign=True)
    return copied.to(device).eval()
