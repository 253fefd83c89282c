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

It is written under a temporary name, synced and renamed, so a folder without the `.tmp` ending is complete unless the
disk damaged it; reading verifies the manifest. No random state is stored: all randomness of a step is derived from
(seed, step) by vlp.step and vlp.data. Nothing here needs pickle.
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

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlp import log
from vlp.data.text import same_tokens
from vlp.files import sync
from vlp.model import DualEncoder, from_description
from vlp.model import load as load_export
from vlp.towers._references import Reference
from vlp.towers._references import resolve as resolve_reference
from vlp.towers._weights import same_activation

FOLDER = "checkpoints"
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
    """Write a checkpoint of `step` and then remove the oldest beyond `keep`. Called by one rank only.

    A failure (a full disk, say) leaves all earlier checkpoints as they were.
    """
    final = run / FOLDER / f"step_{step:08d}"
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in TENSORS:
        save_file({k: v.detach().cpu().contiguous() for k, v in getattr(contents, name).items()}, temporary / f"{name}.safetensors")
    (temporary / "state.json").write_text(json.dumps(contents.state, indent=1), encoding="utf-8")
    (temporary / "model.json").write_text(json.dumps(contents.description, indent=1), encoding="utf-8")
    (temporary / "config.yaml").write_text(contents.config, encoding="utf-8")
    manifest = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(temporary.iterdir())}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in temporary.iterdir():
        sync(path)
    sync(temporary)
    shutil.rmtree(final, ignore_errors=True)  # only there if an earlier save of this very step was found damaged
    os.replace(temporary, final)
    sync(final.parent)
    for old in all_of(run)[:-keep]:
        shutil.rmtree(old)
    return final


def load(path: Path) -> Contents:
    """Read and verify a checkpoint's folder; CheckpointError says which file is damaged and how."""
    verify(path)
    files = {name: path / f"{name}.safetensors" for name in TENSORS}
    tensors = {name: load_file(file) for name, file in files.items() if file.exists()}  # what `verify` has found complete
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    description = json.loads((path / "model.json").read_text(encoding="utf-8"))
    return Contents(**tensors, state=state, config=(path / "config.yaml").read_text(encoding="utf-8"), description=description)


def verify(path: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its size and hash."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no complete checkpoint: its manifest.json cannot be read ({error})") from None
    for name, expected in manifest.items():
        file = path / name
        size = file.stat().st_size if file.exists() else None
        if size != expected["bytes"]:
            raise CheckpointError(f"{file} is damaged: found {size} bytes, expected {expected['bytes']}")
        if _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{file} is damaged: its SHA-256 differs from the manifest's")


def all_of(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, complete or not; temporary ones are left out."""
    return sorted(p for p in (run / FOLDER).glob("step_*") if p.suffix != ".tmp")


def newest(run: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged newer ones are named in a warning. None if there is none."""
    for path in reversed(all_of(run)):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            log.warn(f"{error}; trying the checkpoint before it")
    return None


def resolve(ref: str | Path) -> Path:
    """The checkpoint meant by a run's folder (its newest complete one) or by a checkpoint's own folder."""
    ref = Path(ref)
    if (ref / "manifest.json").exists():
        return ref
    found = newest(ref)
    if found is None:
        raise CheckpointError(f"{ref} holds no complete checkpoint; expected {ref / FOLDER}/step_*/manifest.json")
    return found


def load_model(ref: str | Path) -> DualEncoder:
    """The trained model of a run's or checkpoint's folder, on CPU, in evaluation mode. No optimiser state is read."""
    path = resolve(ref)
    verify(path)
    model = from_description(json.loads((path / "model.json").read_text(encoding="utf-8")))
    restore(model, load_file(path / "model.safetensors"), path)
    return model.eval()


def load_any(ref: str | Path | Reference, like: DualEncoder | None = None) -> DualEncoder:
    """The model behind any reference (vlp.towers._references), on the CPU; ValueError or CheckpointError says what is there.

    `like`: the model whose architecture a file of weights alone has.
    """
    found = resolve_reference(ref)
    return load_model(found.path) if found.kind == "run" else load_export(found, like)


def check_alike(source: nn.Module, model: DualEncoder, name: str) -> None:
    """Refuse weights of `source` for a `model` that computes or sees something else than they were trained for.

    ValueError for another activation or other pixels; other tokens are said, because a text tower may be new. The size of
    pixels is left to the shapes of the weights.
    """
    if not isinstance(source, DualEncoder):
        raise ValueError(f"{name} holds several models; name one of them")
    quick = [bool(m.open_clip_config.get("quick_gelu", False)) for m in (source, model)]
    same_activation(*quick, f"the weights of {name}", None)
    pixels = [replace(m.image_spec, size=model.image_spec.size) for m in (source, model)]
    if pixels[0] != pixels[1]:
        raise ValueError(
            f"{name} was trained on {pixels[0]}, and this model reads {pixels[1]}; set model.pretrained to it instead, which "
            "takes over its preprocessing"
        )
    length = model.text_spec.context_length
    if not same_tokens(replace(source.text_spec, context_length=length), model.text_spec):
        log.warn(f"{name} read its captions as {source.text_spec}, and this model reads {model.text_spec}")


def restore(model: DualEncoder, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Load weights strictly; CheckpointError lists what does not fit."""
    own = model.state_dict()
    wrong = [f"{k}: not in the checkpoint" for k in own.keys() - weights.keys()]
    wrong += [f"{k}: not in the model" for k in weights.keys() - own.keys()]
    shared = sorted(own.keys() & weights.keys())
    wrong += [f"{k}: {tuple(weights[k].shape)}, expected {tuple(own[k].shape)}" for k in shared if own[k].shape != weights[k].shape]
    if wrong:
        more = f"\n  … and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"{source} has another architecture than the configuration's model:\n  "
            + "\n  ".join(sorted(wrong)[:5]) + more + "\nUse its own `model` section, or another source of weights."
        )
    model.load_state_dict(dict(weights))


def flat(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """{term: {name: tensor}} as {"term/name": tensor}."""
    return {f"{term}/{name}": tensor for term, tensors in state.items() for name, tensor in tensors.items()}


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
