"""Weights of a checkpoint into a model that must be of their architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vlp.pretrained.parts import CheckpointError, shape_of


def restore(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Load weights strictly; CheckpointError lists what does not fit."""
    # torch's own message lists every parameter of both, often hundreds.
    current = model.state_dict()
    misfits = [f"{name}: not in the checkpoint" for name in current.keys() - weights.keys()]
    misfits += [f"{name}: not in the model" for name in weights.keys() - current.keys()]
    for name in current.keys() & weights.keys():
        shape, expected = shape_of(weights, name), tuple(current[name].shape)
        if shape != expected:
            misfits.append(f"{name}: {shape}, expected {expected}")

    if misfits:
        shown = "\n  ".join(sorted(misfits)[:5])
        more = f"\n  … and {len(misfits) - 5} more" if len(misfits) > 5 else ""
        raise CheckpointError(
            f"{source} has another architecture than the configuration's model:\n  {shown}{more}"
            "\nUse its own `model` section, or another source of weights."
        )

    # One after another: of a checkpoint in parts no second copy of the model comes into being.
    with torch.no_grad():
        for name, value in weights.items():
            current[name].copy_(value)
