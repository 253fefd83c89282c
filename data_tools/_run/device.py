"""The device that a tool's model computes on."""

from __future__ import annotations

import os


def resolve(name: str) -> str:
    """`auto` is the GPU of this process's rank on its machine, else the CPU; other names stay."""
    import torch

    if name != "auto":
        return name
    if not torch.cuda.is_available():
        return "cpu"

    # One process a GPU, as launchers start them.
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return f"cuda:{rank % torch.cuda.device_count()}"
