"""A hash of a model's weights, by which embeddings say what made them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_PROBES = 64  # values of each weight that a glance looks at


def fingerprint(weights: Mapping[str, Tensor], preprocessing: str) -> str:
    """Content hash of all weights, by name, and of what happens before them."""
    total = hashlib.sha256(preprocessing.encode())
    for key in sorted(weights):
        value = weights[key].detach().cpu().contiguous()

        # Name, type and shape too: equal bytes may be other weights.
        total.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def glance(model: nn.Module) -> str:
    """A hash of the weights' names and shapes and of some values of each: a whole read of a large
    model would take minutes.
    """
    total = hashlib.sha256()
    for name, weight in model.state_dict().items():
        flat = weight.detach().flatten()
        places = torch.linspace(0, max(len(flat) - 1, 0), min(_PROBES, len(flat)))
        values = flat[places.long().to(flat.device)].float().cpu()
        total.update(f"{name} {tuple(weight.shape)}".encode() + values.numpy().tobytes())
    return total.hexdigest()
