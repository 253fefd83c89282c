"""A hash of a model's weights, by which embeddings say what made them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def fingerprint(weights: Mapping[str, Tensor], preprocessing: str) -> str:
    """Content hash of all weights, by name, and of what happens before them."""
    total = hashlib.sha256(preprocessing.encode())
    for key in sorted(weights):
        value = weights[key].detach().cpu().contiguous()

        # Name, type and shape too: equal bytes may be other weights.
        total.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
