"""A run's checkpoints as folders: which are there, and which of them are whole.

`vlp.checkpoint` writes and reads them; a model that starts from a run's weights needs only this.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from vlp import log

FOLDER = "checkpoints"
AVERAGED = "ema."  # begins the labels of results that are the moving average's
# of a checkpoint, the file with the moving average, and what begins the names of its weights there
TEACHER, AVERAGE = "teacher.safetensors", "ema_"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or does not fit."""


def resolve(ref: str | Path) -> Path:
    """The checkpoint meant by a run's folder (its newest complete one) or by a checkpoint's own
    folder.
    """
    ref = Path(ref)

    # A checkpoint's own folder is meant even where newer ones exist.
    if (ref / "manifest.json").exists():
        return ref

    complete = newest(ref)
    if complete is not None:
        return complete

    siblings = all_of(ref.parent.parent) if ref.parent.name == FOLDER else []
    if siblings:
        names = ", ".join(path.name for path in siblings)
        raise CheckpointError(f"{ref} is no complete checkpoint; {ref.parent} holds {names}")
    raise CheckpointError(
        f"{ref} holds no complete checkpoint; expected {ref / FOLDER}/step_*/manifest.json"
    )


def newest(run: Path) -> Path | None:
    """The newest checkpoint that verifies and has finite weights; others are named in a warning.
    None if there is none.
    """
    # Whatever the damage is, the one before it still serves.
    for path in reversed(all_of(run)):
        try:
            verify(path)
            spoilt = not_finite(load_file(path / "model.safetensors"))
            if spoilt:
                raise CheckpointError(f"{path} holds NaN or infinity in {spoilt[0]}")
            return path
        except CheckpointError as error:
            log.warn(f"{error}; trying the checkpoint before it")
    return None


def all_of(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, complete or not; temporary and abandoned ones are
    left out.
    """
    return sorted(path for path in (run / FOLDER).glob("step_*") if not path.suffix)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with NaN or infinity."""
    floating = ((name, value) for name, value in tensors.items() if value.is_floating_point())

    return [name for name, value in floating if not value.isfinite().all()]


def verify(path: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its size and hash."""
    for name, expected in _manifest(path).items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{file} is damaged: found {size} bytes, expected {expected['bytes']}"
            )
        if sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{file} is damaged: its SHA-256 differs from the manifest's")


def looks_complete(path: Path) -> bool:
    """Whether all files have their sizes, which is known without reading them."""
    try:
        return all(
            (path / name).stat().st_size == entry["bytes"]
            for name, entry in _manifest(path).items()
        )
    except (OSError, CheckpointError):
        return False


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    """The manifest of a checkpoint, found whole; raises CheckpointError."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no complete checkpoint: its manifest.json cannot be read ({error})"
        ) from None

    entries = manifest if isinstance(manifest, dict) else {}
    missing = {"model.safetensors", "state.json", "model.json", "config.yaml"} - entries.keys()
    if missing:
        raise CheckpointError(
            f"{path} is no complete checkpoint: "
            f"its manifest.json does not name {sorted(missing)[0]}"
        )

    # A checkpoint may come from anybody: a name must not lead out of its folder.
    for name, entry in entries.items():
        is_entry = isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"}
        if not is_entry or Path(name).name != name:
            raise CheckpointError(
                f"{path} is damaged: manifest.json says {str(entry)[:80]} of {name!r}"
            )
    return entries


def moving_average(path: Path) -> dict[str, Tensor]:
    """The moving average of a checkpoint's weights, by the model's names; CheckpointError where the
    run kept none.
    """
    file = path / TEACHER
    # Absent in checkpoints from before there were teachers.
    stored = load_file(file) if file.exists() else {}
    average = {
        name.removeprefix(AVERAGE): value
        for name, value in stored.items()
        if name.startswith(AVERAGE)
    }
    if not average:
        raise CheckpointError(
            f"{path} holds no moving average of the weights; train with teacher.ema=0.9996 "
            "(and teacher.eval_ema=true for its scores), or name the run without @ema or --ema"
        )
    return average


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
