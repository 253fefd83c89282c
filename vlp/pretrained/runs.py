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
from vlp.pretrained.parts import CheckpointError as CheckpointError  # its readers catch it here
from vlp.pretrained.parts import Joined, Layout

FOLDER = "checkpoints"
BEST = "best.json"  # in FOLDER: which checkpoint is the best one
AT_BEST = "@best"  # RUN@best means that one
# What a checkpoint holds: each kind in a file of its name, or in the parts of several ranks, whose
# files have the kind's place here as their number.
KINDS = ("model", "optimizer", "objective", "teacher")
PARTS = "shard-*.safetensors"
AVERAGED = "ema."  # begins the labels of results that are the moving average's
# of a checkpoint in one piece, the files with the weights and with their moving average, and what
# begins the names of its weights there
MODEL, TEACHER, AVERAGE = "model.safetensors", "teacher.safetensors", "ema_"


def resolve(ref: str | Path) -> Path:
    """The checkpoint meant by a run's folder (its newest complete one) or by a checkpoint's own
    folder.
    """
    if str(ref).endswith(AT_BEST) and not Path(ref).is_dir():
        return best(Path(str(ref).removesuffix(AT_BEST)))
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


def best(run: Path) -> Path:
    """The best checkpoint of a run by its `checkpoint.best`; CheckpointError where none is named or
    it is gone.
    """
    path = named_best(run)
    if path is None:
        raise CheckpointError(
            f"{run} names no best checkpoint in {run / FOLDER / BEST}; train with checkpoint.best, "
            f"or write {run} for the newest one"
        )
    if not looks_complete(path):
        raise CheckpointError(f"{path}, the best checkpoint of {run}, is gone or damaged")
    return path


def named_best(run: Path) -> Path | None:
    """The checkpoint that a run's best.json names; None without one."""
    try:
        content = json.loads((run / FOLDER / BEST).read_text(encoding="utf-8"))
        name = content["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    # A file that comes from anybody must not lead elsewhere.
    is_name = isinstance(name, str) and Path(name).name == name
    return run / FOLDER / name if is_name else None


def newest(run: Path) -> Path | None:
    """The newest checkpoint that verifies and has finite weights; others are named in a warning.
    None if there is none.
    """
    # Whatever the damage is, the one before it still serves.
    for path in reversed(all_of(run)):
        try:
            verify(path)
            spoilt = not_finite(tensors_of(path, "model"))
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


def tensors_of(path: Path, kind: str, layout: Layout | None = None) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint of one kind ("model", "optimizer", "objective", "teacher"), whole
    ones by name; empty where it holds none of that kind.

    From one file they are mapped; of parts each is put together when it is asked for. `layout`: of
    the parts, where their headers have been read.
    """
    file = path / f"{kind}.safetensors"
    if file.exists():
        return load_file(file)
    layout = layout or layout_of(path)
    return {} if layout is None else Joined(path, layout, kind)


def layout_of(path: Path) -> Layout | None:
    """Where the tensors of a checkpoint lie in its parts; None for one in one piece."""
    if not in_parts(path):
        return None
    # Not every file that lies there: a part of another checkpoint may have been copied along.
    return Layout.of(path, sorted(filter(is_part, _manifest(path))))


def in_parts(path: Path) -> bool:
    """Whether several ranks wrote a checkpoint, each its part."""
    return any(path.glob(PARTS))


def is_part(name: str) -> bool:
    """Whether a file of a checkpoint holds parts."""
    return Path(name).match(PARTS)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with NaN or infinity."""
    floating = ((name, value) for name, value in tensors.items() if value.is_floating_point())

    return [name for name, value in floating if not value.isfinite().all()]


def verify(path: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its size and hash.

    share: (r, W) for the files r, r + W, … alone, of which W processes then look at all.
    """
    first, step = share
    for name, expected in sorted(_manifest(path).items())[first::step]:
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
    weights = next(filter(is_part, entries), MODEL)
    missing = {weights, "state.json", "model.json", "config.yaml"} - entries.keys()
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
    stored = tensors_of(path, "teacher")
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
