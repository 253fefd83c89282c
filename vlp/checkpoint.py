"""Checkpoints: atomic, checksummed, complete, the same for every engine and number of ranks.

A checkpoint is a folder `RUN/checkpoints/step_00000100`, of a run of one process with

    model.safetensors       every parameter and buffer, whole, float32 where training holds float32
    optimizer.safetensors   AdamW's moments and step of every trained parameter: "exp_avg.<name>", …
    objective.safetensors   state of the objective's terms
    teacher.safetensors     moving average of the model and queue, where the run has them
    state.json              step, loader position, library versions
    model.json              DualEncoder.description(): architecture, preprocessing, tokenizer
    config.yaml             the resolved configuration
    manifest.json           size and SHA-256 of each file above, written last

and of a run of several processes with parts in the place of the .safetensors files, one of each
rank and kind (vlp.pretrained.parts); any number of ranks and any engine goes on from either
form. `vlp.saving` writes both, beside the steps.

It is written under a temporary name, synced and renamed, so a folder without the `.tmp` ending is
complete unless the disk damaged it; reading verifies the manifest. A run that goes on from an older
checkpoint renames the newer ones to `step_00000200.abandoned`, so that the newest is always of the
branch in use. Weights with NaN or infinity are never written. No random state is stored: all
randomness of a step is derived from (seed, step) by vlp.step and vlp.data. Nothing here needs
pickle.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from vlp import log, retention
from vlp.data.text import same_tokens
from vlp.files import save_tensors, sync
from vlp.models.build import from_description
from vlp.models.concatenated import Concatenated
from vlp.models.dual_encoder import DualEncoder
from vlp.models.load import load as load_export
from vlp.pretrained import adapters
from vlp.pretrained.fitting import UNCHANGED, Fit
from vlp.pretrained.parts import Joined, Layout, Rows
from vlp.pretrained.references import Reference
from vlp.pretrained.references import resolve as resolve_reference
from vlp.pretrained.restoring import restore
from vlp.pretrained.runs import (
    FOLDER,
    KINDS,
    CheckpointError,
    all_of,
    in_parts,
    looks_complete,
    moving_average,
    newest,
    not_finite,
    resolve,
    sha256,
    tensors_of,
    verify,
)
from vlp.pretrained.weight_files import same_activation

__all__ = [
    "FOLDER",
    "CheckpointError",
    "Contents",
    "all_of",
    "check_alike",
    "in_parts",
    "load",
    "load_any",
    "load_model",
    "nested",
    "newest",
    "not_finite",
    "resolve",
    "restore",
    "save",
    "tensors_of",
    "verify",
]

T = TypeVar("T")
Manifest = dict[str, dict[str, Any]]  # {file: {"bytes": …, "sha256": …}}


@dataclass
class Contents:
    """Everything a run needs to go on. Tensor maps are flat; `state` is JSON."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    objective: Mapping[str, Tensor | Rows] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    config: str = ""  # YAML
    description: dict[str, Any] = field(default_factory=dict)  # of the model
    teacher: Mapping[str, Tensor] = field(default_factory=dict)


def save(run: Path, step: int, contents: Contents, keep: int) -> Path:
    """Write a checkpoint of `step` in one piece and then remove what is beyond `keep`. Called by
    one rank only.

    A failure (a full disk, say) leaves all earlier checkpoints as they were and nothing of the new
    one. Raises CheckpointError, having written nothing, for weights or moments with NaN or
    infinity.
    """
    check_finite(step, contents)
    folder = temporary(run, step)
    try:
        make_empty(folder)
        write_whole(folder, contents)
        return finish(folder, keep)
    except BaseException:
        # Half a checkpoint would only fill the disk further.
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_whole(folder: Path, contents: Contents) -> None:
    """Fill a folder with a checkpoint in one piece, complete with its manifest."""
    for kind in KINDS:
        whole = {
            name: value.detach().cpu().contiguous()
            for name, value in getattr(contents, kind).items()
        }
        save_tensors(whole, folder / f"{kind}.safetensors")
    files = described(folder.glob("*.safetensors"))
    write_manifest(folder, files | write_texts(folder, contents))


def check_finite(step: int, contents: Contents) -> None:
    """Refuse what a run could never go on from: CheckpointError."""
    for name in ("model", "optimizer", "teacher"):
        spoilt = not_finite(getattr(contents, name))
        if spoilt:
            raise CheckpointError(
                f"step {step} is not saved: "
                f"NaN or infinity in {spoilt[0]} and {len(spoilt) - 1} other tensors"
            )


def temporary(run: Path, step: int) -> Path:
    """Where a checkpoint is written before it stands under its name."""
    return run / FOLDER / f"step_{step:08d}{retention.UNFINISHED}"


def make_empty(folder: Path) -> None:
    """Make a folder new, whatever a killed run left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def write_texts(folder: Path, contents: Contents) -> Manifest:
    """Write all that a checkpoint holds beside tensors; returns the entries of these files."""
    texts = {
        "state.json": json.dumps(contents.state, indent=1),
        "model.json": json.dumps(contents.description, indent=1),
        "config.yaml": contents.config,
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return described(folder / name for name in texts)


def described(files: Iterable[Path]) -> Manifest:
    """The manifest's entries of files, which are on the disk when this returns."""
    entries = {}
    for path in sorted(files):
        sync(path)
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return entries


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The last file, of what lies there: whatever is cut short later no longer fits it."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(path)


def finish(folder: Path, keep: int) -> Path:
    """Let a temporary folder, complete with its manifest, stand under its name, and remove what is
    beyond `keep`; returns its place.

    A kill at any moment leaves either no folder of this name, or a whole one.
    """
    sync(folder)

    # Only there if an earlier save of this very step was found damaged.
    final = folder.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(folder, final)
    sync(final.parent)

    # Old ones go when the new one stands, not before.
    retention.prune(final.parent.parent, keep, final)
    return final


def load(path: Path, verified: bool = False, layout: Layout | None = None) -> Contents:
    """Read and verify a checkpoint's folder; CheckpointError says which file is damaged and how.

    Tensors are mapped from their files, so that ranks of a machine share them and hold only what
    they copy; of a checkpoint in parts each is put together when it is asked for. verified: another
    rank has compared the hashes; sizes are compared in any case. `layout`: of the parts, where
    their headers have been read.
    """
    if not verified:
        verify(path)
    elif not looks_complete(path):
        raise CheckpointError(
            f"{path} is not what the first rank saw: a file is missing or has another size here; "
            "is it on a disk that all machines share?"
        )

    # Checkpoints of older versions lack some; `verify` has found complete what they name.
    of_kinds = {kind: tensors_of(path, kind, layout) for kind in KINDS}
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    of_kinds["objective"] = with_tables(of_kinds["objective"], state.get("tables", {}))
    description = json.loads((path / "model.json").read_text(encoding="utf-8"))
    return Contents(
        **of_kinds,
        state=state,
        config=(path / "config.yaml").read_text(encoding="utf-8"),
        description=description,
    )


def with_tables(objective: Mapping[str, Tensor], samples: Mapping[str, int]) -> dict[str, Any]:
    """The objective's state with the tables [samples, c] in the place of their dealt form, of which
    nothing is read yet.
    """
    if not samples:
        return dict(objective)
    assert isinstance(objective, Joined), "tables are dealt in parts only"
    state = {name: objective[name] for name in objective if name not in samples}
    return state | {name: objective.rows(name, n) for name, n in samples.items()}


def load_model(ref: str | Path, averaged: bool = False) -> DualEncoder:
    """The trained model of a run's or checkpoint's folder, on CPU, in evaluation mode; `averaged`:
    with the moving average of its weights. No optimiser state is read.
    """
    path = resolve(ref)
    verify(path)
    description = json.loads((path / "model.json").read_text(encoding="utf-8"))
    model = from_description(description)
    weights = moving_average(path) if averaged else tensors_of(path, "model")
    # Adapters are of training alone.
    restore(model, adapters.merged(weights, description["vlp"].get("lora", {})), path)
    return model.eval()


def load_any(
    ref: str | Path | Reference, like: DualEncoder | None = None, fit: Fit = UNCHANGED
) -> DualEncoder | Concatenated:
    """The model behind any reference (vlp.pretrained.references), on the CPU; ValueError or
    CheckpointError says what is there.

    `like`: the model whose architecture a file of weights alone has; `fit`: how these enter it.
    """
    reference = resolve_reference(ref)
    if reference.kind == "run":
        return load_model(reference.path, reference.averaged)
    return load_export(reference, like, fit)


def check_alike(source: nn.Module, model: DualEncoder, name: str) -> None:
    """Refuse weights of `source` for a `model` that computes or sees something else than they were
    trained for.

    ValueError for another activation or other pixels; other tokens are said, because a text tower
    may be new. The size of pixels is left to the shapes of the weights.
    """
    if not isinstance(source, DualEncoder):
        raise ValueError(f"{name} holds several models; name one of them")

    # QuickGELU has no weights, so that no shape would tell.
    quick = [bool(m.open_clip_config.get("quick_gelu", False)) for m in (source, model)]
    same_activation(quick[0], quick[1], f"the weights of {name}", None)

    theirs, ours = vars(source.image_spec), vars(model.image_spec)
    different = [
        f"{key} {theirs[key]}, not {ours[key]}"
        for key in ours
        if key != "size" and theirs[key] != ours[key]
    ]
    if different:
        raise ValueError(
            f"{name} was trained on other pixels than this model reads: {'; '.join(different)}. "
            "Set model.pretrained to it instead, which takes over its preprocessing"
        )

    # Another length is no other meaning: the shapes of the weights speak of it.
    length = model.text_spec.context_length
    if not same_tokens(replace(source.text_spec, context_length=length), model.text_spec):
        log.warn(
            f"{name} read its captions as {source.text_spec}, "
            f"and this model reads {model.text_spec}"
        )


def nested(tensors: Mapping[str, T], terms: Iterable[str]) -> dict[str, dict[str, T]]:
    """{"term/name": tensor} as {term: {name: tensor}}; `terms` names those that may have none."""
    state: dict[str, dict[str, T]] = {term: {} for term in terms}
    for key, tensor in tensors.items():
        term, _, name = key.rpartition("/")
        state.setdefault(term, {})[name] = tensor
    return state
