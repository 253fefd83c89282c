"""A run's adapters alone: the small file beside a base that others have."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import load_file

from vlp import checkpoint
from vlp.files import save_tensors
from vlp.pretrained import adapters
from vlp.pretrained.folders import read_json


def write_adapters(run: Path | str, to: Path) -> int:
    """Write the matrices A and B of a run's newest checkpoint, or of one checkpoint, to a
    .safetensors file; returns how many tensors it holds.

    Names are those of the checkpoint; the metadata `lora` gives alpha/r of each tower as JSON.
    ValueError where the run has none, CheckpointError where it is damaged.
    """
    path = checkpoint.resolve(run)
    checkpoint.verify(path)
    scalings = read_json(path / "model.json").get("vlp", {}).get("lora", {})
    if not scalings:
        raise ValueError(f"{run} trained no adapters; export the model with vlp export")

    if to.exists():
        raise ValueError(f"{to} exists; name another file")
    tensors = adapters.adapters(load_file(path / "model.safetensors"))

    # Whole or not at all.
    temporary = to.with_name(f".{to.name}.tmp")
    try:
        save_tensors(tensors, temporary, {"lora": json.dumps(scalings)})
        os.replace(temporary, to)
    finally:
        temporary.unlink(missing_ok=True)
    return len(tensors)
