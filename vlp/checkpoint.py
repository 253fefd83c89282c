"""Checkpoints: atomic, checksummed, complete, the same for every engine and number of ranks.

A checkpoint is a folder `RUN/checkpoints/step_00000100` with

    model.safetensors       every parameter and buffer, whole, float32 where training holds float32
    optimizer.safetensors   AdamW's moments and step of every trainable parameter: "exp_avg.<name>", …
    objective.safetensors   state of the objective's terms
    teacher.safetensors     moving average of the model and queue, where the run has them
    state.json              step, loader position, library versions
    model.json              DualEncoder.description(): architecture, preprocessing, tokenizer
    config.yaml             the resolved configuration
    manifest.json           size and SHA-256 of each file above, written last

It is written under a temporary name, synced and renamed, so a folder without the `.tmp` ending is
complete unless the disk damaged it; reading verifies the manifest. A run that goes on from an older
checkpoint renames the newer ones to `step_00000200.abandoned`, so that the newest is always of the
branch in use. Weights with NaN or infinity are never written. No random state is stored: all
randomness of a step is derived from (seed, step) by vlp.step and vlp.data. Nothing here needs
pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from vlp import log
from vlp.data.text import same_tokens
from vlp.files import save_tensors, sync
from vlp.models.build import from_description
from vlp.models.dual_encoder import DualEncoder
from vlp.models.load import load as load_export
from vlp.pretrained.references import Reference
from vlp.pretrained.references import resolve as resolve_reference
from vlp.pretrained.weight_files import same_activation

FOLDER = "checkpoints"
ABANDONED = ".abandoned"  # ending of a checkpoint that the run did not go on from
TENSORS = ("model", "optimizer", "objective", "teacher")  # each a .safetensors file


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or does not fit."""


@dataclass
class Contents:
    """Everything a run needs to go on. Tensor maps are flat; `state` is JSON."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    objective: Mapping[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    config: str = ""  # YAML
    description: dict[str, Any] = field(default_factory=dict)  # of the model
    teacher: Mapping[str, Tensor] = field(default_factory=dict)


def save(run: Path, step: int, contents: Contents, keep: int) -> Path:
    """Write a checkpoint of `step` and then remove what is beyond `keep`. Called by one rank only.

    A failure (a full disk, say) leaves all earlier checkpoints as they were and nothing of the new
    one. Raises CheckpointError, having written nothing, for weights or moments with NaN or
    infinity.
    """
    for name in ("model", "optimizer", "teacher"):
        if wrong := not_finite(getattr(contents, name)):
            raise CheckpointError(
                f"step {step} is not saved: NaN or infinity in {wrong[0]} and {len(wrong) - 1} other tensors"
            )
    final = run / FOLDER / f"step_{step:08d}"
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write(temporary, contents)
    except BaseException:
        shutil.rmtree(
            temporary, ignore_errors=True
        )  # half a checkpoint would only fill the disk further
        raise
    shutil.rmtree(
        final, ignore_errors=True
    )  # only there if an earlier save of this very step was found damaged
    os.replace(temporary, final)
    sync(final.parent)
    _prune(run, final, keep)
    return final


def _write(folder: Path, contents: Contents) -> None:
    """All files of a checkpoint, on the disk when this returns."""
    for name in TENSORS:
        tensors = {
            key: value.detach().cpu().contiguous() for key, value in getattr(contents, name).items()
        }
        save_tensors(tensors, folder / f"{name}.safetensors")
    (folder / "state.json").write_text(json.dumps(contents.state, indent=1), encoding="utf-8")
    (folder / "model.json").write_text(json.dumps(contents.description, indent=1), encoding="utf-8")
    (folder / "config.yaml").write_text(contents.config, encoding="utf-8")
    manifest = {
        p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(folder.iterdir())
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in folder.iterdir():
        sync(path)
    sync(folder)


def _prune(run: Path, newest: Path, keep: int) -> None:
    """Remove all but `newest`, which has just been written, and the latest keep − 1 others that
    look complete.

    Damaged ones go first, so that they take no place of a good one; abandoned ones go when the run
    has passed them.
    """
    others = [path for path in all_of(run) if path != newest]
    complete = [path for path in others if _looks_complete(path)]
    kept = complete[len(complete) - (keep - 1) :]
    for path in others:
        if path not in kept:
            shutil.rmtree(path)
    for path in (run / FOLDER).glob(f"step_*{ABANDONED}"):
        if path.name.split(".")[0] <= newest.name:
            shutil.rmtree(path)


def _looks_complete(path: Path) -> bool:
    """Whether all files have their sizes, which is known without reading them."""
    try:
        return all(
            (path / name).stat().st_size == entry["bytes"]
            for name, entry in _manifest(path).items()
        )
    except (OSError, CheckpointError):
        return False


def abandon(run: Path, step: int) -> list[Path]:
    """Set aside the checkpoints after `step`, from which the run goes on; returns their new places.

    They belong to a branch that is no longer the run's: `newest` would otherwise go back to it.
    They are removed when the run has saved a later step.
    """
    moved = []
    for path in all_of(run):
        if path.name > f"step_{step:08d}":
            place = path.with_name(path.name + ABANDONED)
            shutil.rmtree(place, ignore_errors=True)  # of an even earlier branch
            moved.append(path.rename(place))
    return moved


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with NaN or infinity."""
    floating = ((name, value) for name, value in tensors.items() if value.is_floating_point())
    return [name for name, value in floating if not value.isfinite().all()]


def load(path: Path) -> Contents:
    """Read and verify a checkpoint's folder; CheckpointError says which file is damaged and how."""
    verify(path)
    files = {name: path / f"{name}.safetensors" for name in TENSORS}
    tensors = {
        name: load_file(file) for name, file in files.items() if file.exists()
    }  # what `verify` has found complete
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    description = json.loads((path / "model.json").read_text(encoding="utf-8"))
    return Contents(
        **tensors,
        state=state,
        config=(path / "config.yaml").read_text(encoding="utf-8"),
        description=description,
    )


def verify(path: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its size and hash."""
    for name, expected in _manifest(path).items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{file} is damaged: found {size} bytes, expected {expected['bytes']}"
            )
        if _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{file} is damaged: its SHA-256 differs from the manifest's")


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
            f"{path} is no complete checkpoint: its manifest.json does not name {sorted(missing)[0]}"
        )
    for name, entry in entries.items():
        if (
            not isinstance(entry, dict)
            or entry.keys() != {"bytes", "sha256"}
            or Path(name).name != name
        ):
            raise CheckpointError(
                f"{path} is damaged: manifest.json says {str(entry)[:80]} of {name!r}"
            )
    return entries


def all_of(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, complete or not; temporary and abandoned ones are
    left out.
    """
    return sorted(path for path in (run / FOLDER).glob("step_*") if not path.suffix)


def newest(run: Path) -> Path | None:
    """The newest checkpoint that verifies and has finite weights; others are named in a warning.
    None if there is none.
    """
    for path in reversed(all_of(run)):
        try:
            verify(path)
            if wrong := not_finite(load_file(path / "model.safetensors")):
                raise CheckpointError(f"{path} holds NaN or infinity in {wrong[0]}")
            return path
        except CheckpointError as error:
            log.warn(f"{error}; trying the checkpoint before it")
    return None


def resolve(ref: str | Path) -> Path:
    """The checkpoint meant by a run's folder (its newest complete one) or by a checkpoint's own
    folder.
    """
    ref = Path(ref)
    if (ref / "manifest.json").exists():
        return ref
    found = newest(ref)
    if found is None:
        siblings = all_of(ref.parent.parent) if ref.parent.name == FOLDER else []
        if siblings:
            raise CheckpointError(
                f"{ref} is no complete checkpoint; {ref.parent} holds {', '.join(p.name for p in siblings)}"
            )
        raise CheckpointError(
            f"{ref} holds no complete checkpoint; expected {ref / FOLDER}/step_*/manifest.json"
        )
    return found


def load_model(ref: str | Path) -> DualEncoder:
    """The trained model of a run's or checkpoint's folder, on CPU, in evaluation mode. No optimiser
    state is read.
    """
    path = resolve(ref)
    verify(path)
    model = from_description(json.loads((path / "model.json").read_text(encoding="utf-8")))
    restore(model, load_file(path / "model.safetensors"), path)
    return model.eval()


def load_any(ref: str | Path | Reference, like: DualEncoder | None = None) -> DualEncoder:
    """The model behind any reference (vlp.pretrained.references), on the CPU; ValueError or
    CheckpointError says what is there.

    `like`: the model whose architecture a file of weights alone has.
    """
    found = resolve_reference(ref)
    return load_model(found.path) if found.kind == "run" else load_export(found, like)


def check_alike(source: nn.Module, model: DualEncoder, name: str) -> None:
    """Refuse weights of `source` for a `model` that computes or sees something else than they were
    trained for.

    ValueError for another activation or other pixels; other tokens are said, because a text tower
    may be new. The size of pixels is left to the shapes of the weights.
    """
    if not isinstance(source, DualEncoder):
        raise ValueError(f"{name} holds several models; name one of them")
    quick = [bool(m.open_clip_config.get("quick_gelu", False)) for m in (source, model)]
    same_activation(*quick, f"the weights of {name}", None)
    theirs, ours = vars(source.image_spec), vars(model.image_spec)
    different = [
        f"{key} {theirs[key]}, not {ours[key]}"
        for key in ours
        if key != "size" and theirs[key] != ours[key]
    ]
    if different:
        raise ValueError(
            f"{name} was trained on other pixels than this model reads: {'; '.join(different)}. Set model.pretrained to it "
            "instead, which takes over its preprocessing"
        )
    length = model.text_spec.context_length
    if not same_tokens(replace(source.text_spec, context_length=length), model.text_spec):
        log.warn(
            f"{name} read its captions as {source.text_spec}, and this model reads {model.text_spec}"
        )


def restore(model: DualEncoder, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Load weights strictly; CheckpointError lists what does not fit."""
    own = model.state_dict()
    wrong = [f"{k}: not in the checkpoint" for k in own.keys() - weights.keys()]
    wrong += [f"{k}: not in the model" for k in weights.keys() - own.keys()]
    shared = sorted(own.keys() & weights.keys())
    wrong += [
        f"{k}: {tuple(weights[k].shape)}, expected {tuple(own[k].shape)}"
        for k in shared
        if own[k].shape != weights[k].shape
    ]
    if wrong:
        more = f"\n  … and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"{source} has another architecture than the configuration's model:\n  "
            + "\n  ".join(sorted(wrong)[:5])
            + more
            + "\nUse its own `model` section, or another source of weights."
        )
    model.load_state_dict(dict(weights))


def flat(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """{term: {name: tensor}} as {"term/name": tensor}."""
    return {
        f"{term}/{name}": tensor
        for term, tensors in state.items()
        for name, tensor in tensors.items()
    }


def nested(tensors: Mapping[str, Tensor], terms: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """The inverse of `flat`; `terms` names those that may be without a tensor."""
    state: dict[str, dict[str, Tensor]] = {term: {} for term in terms}
    for key, tensor in tensors.items():
        term, _, name = key.rpartition("/")
        state.setdefault(term, {})[name] = tensor
    return state


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
