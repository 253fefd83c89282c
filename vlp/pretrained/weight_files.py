"""Weights of dual encoders: from which file, what is said beside them, and how they get into
open_clip's towers.

Whatever wrote them (vlp, open_clip and its trainer, OpenAI, transformers), they are brought under
the names of open_clip's CustomTextCLIP. Files that hold more than tensors are refused: nothing in a
file of weights is run.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import (
    convert_to_custom_text_state_dict,
    resize_pos_embed,
    resize_text_pos_embed,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from vlp.pretrained import clip_layout, references
from vlp.pretrained.references import OPEN_CLIP_WEIGHTS, Reference, listing, read_config, read_json
from vlp.schema import did_you_mean

WEIGHTS = OPEN_CLIP_WEIGHTS[0]  # what exports write
TRANSFORMERS_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")

_WRAPPERS = {
    "module",
    "_orig_mod",
    "model",
    "clip",
}  # of DataParallel, torch.compile, and trainers that hold the model
_NESTED = (
    "state_dict",
    "model_state_dict",
    "model",
)  # where trainers keep the tensors, beside their epoch and optimiser


@dataclass(frozen=True)
class Found:
    """A file of weights and what is said about them, as in open_clip_config.json; {} where nothing
    is.
    """

    path: Path
    described: dict[str, Any] = field(default_factory=dict)


def find(pretrained: str, architecture: str | None, quick_gelu: bool) -> Found:
    """The weights that `model.pretrained` names, for towers with or without `quick_gelu`.

    `architecture` is the open_clip name whose tags count; None where the towers are written out.
    ValueError for a reference that leads nowhere, and for weights trained with the other
    activation.
    """
    tags = open_clip.list_pretrained_tags_by_model(architecture) if architecture else []
    if pretrained in tags:
        return _download(architecture, pretrained, quick_gelu)
    try:
        reference = references.resolve(pretrained)
    except ValueError as error:
        close = did_you_mean(pretrained, tags).partition(";")[0] if tags else ""
        raise ValueError(
            f"pretrained: {error}{f'. It is no tag of {architecture} either{close}' if tags else ''}"
        ) from None
    found = behind(reference)
    if found.described:
        trained_quick = bool(found.described["model_cfg"].get("quick_gelu", False))
        same_activation(trained_quick, quick_gelu, f"the weights of {pretrained}", architecture)
    return found


def behind(reference: Reference) -> Found:
    """The weights that a reference means, with what is said about them; a tag's are downloaded."""
    path = reference.path
    if reference.kind == "tag":
        return _download(reference.architecture, reference.tag)
    if reference.kind == "file":
        return Found(
            path, references.describe(reference.architecture) if reference.architecture else {}
        )
    if reference.kind == "run":
        from vlp import (
            checkpoint,
        )  # above this room, and the only one that knows which checkpoint is whole

        path = checkpoint.resolve(path)
        checkpoint.verify(path)
        return Found(path / "model.safetensors", read_json(path / "model.json"))
    if reference.kind == "stages":
        members = read_json(path / references.STAGES)["members"]
        raise ValueError(
            f"{reference.text} holds several models; name one of them, such as {path / members[0]}"
        )
    described = read_config(path) if reference.kind == "open_clip" else clip_layout.describe(path)
    return Found(weights_in(path, reference.kind), described)


def weights_in(folder: Path, kind: str = "open_clip") -> Path:
    """The file of weights in a folder of open_clip's or transformers' form."""
    expected = OPEN_CLIP_WEIGHTS if kind == "open_clip" else TRANSFORMERS_WEIGHTS
    known = next(
        (folder / name for name in (*expected, *TRANSFORMERS_WEIGHTS) if (folder / name).is_file()),
        None,
    )
    if known is not None:
        return known
    others = [path for path in sorted(folder.iterdir()) if path.suffix in references.FILES]
    if len(others) != 1:
        raise ValueError(
            f"{folder} holds no weights: it holds {listing(folder)}; expected {expected[0]}"
        )
    return others[0]


def load_into(clip: nn.Module, path: Path) -> None:
    """Read weights of any known layout into a CustomTextCLIP; ValueError lists what does not fit.

    Positions are interpolated to the model's sizes, as open_clip does. The scale always comes from
    the weights. A bias comes from them only where the model has one: a model without drops it with
    a warning, and a model with one keeps its own where the weights have none.
    """
    if path.suffix == ".npz":
        _load_big_vision(clip, path)
        return
    weights = read(path)
    if "positional_embedding" in weights:  # OpenAI's layout, whose text tower lies at the top level
        weights = convert_to_custom_text_state_dict(weights)
    try:
        weights = convert_state_dict(clip, weights)
        resize_pos_embed(weights, clip)
        resize_text_pos_embed(weights, clip)
    except (
        RuntimeError,
        KeyError,
        ValueError,
        AssertionError,
    ) as error:  # of weights that are far from fitting
        problem = _misfit(clip.state_dict(), weights) or error
        raise ValueError(f"the weights in {path} do not fit this model: {problem}") from error

    bias = weights.pop("logit_bias", None)
    if clip.logit_bias is not None:
        weights["logit_bias"] = clip.logit_bias.detach() if bias is None else bias
    elif bias is not None and bias.item():
        message = f"{path} holds a logit bias ({bias.item():.4g}) that this model leaves out; set model.bias to keep it"
        warnings.warn(message, stacklevel=2)

    own = clip.state_dict()
    buffers = [
        key for key in weights if key.endswith(".position_ids") and key not in own
    ]  # of older transformers
    for name in buffers:
        del weights[name]
    for name in {"logit_scale", "logit_bias"} & weights.keys():
        weights[name] = weights[name].reshape(own[name].shape)
    if problem := _misfit(own, weights):
        raise ValueError(f"the weights in {path} do not fit this model: {problem}")
    clip.load_state_dict(weights)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file under open_clip's names; ValueError for a damaged one and for one that
    holds other objects.
    """
    weights = _unwrapped(_tensors(path))
    if clip_layout.is_theirs(weights):
        return clip_layout.renamed(weights)
    towers = {key: value for key, value in weights.items() if not key.startswith("heads.")}
    return {key.removeprefix("scaling."): value for key, value in towers.items()}


def _unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the wrappers that all their names begin with, in any order."""
    first_parts = {name.partition(".")[0] for name in weights}
    if len(first_parts) != 1 or not first_parts <= _WRAPPERS:
        return weights
    return _unwrapped({name.partition(".")[2]: value for name, value in weights.items()})


def same_activation(
    trained_quick: bool, quick_gelu: bool, what: str, architecture: str | None
) -> None:
    """Refuse weights trained with the other activation than the towers have: every number would be
    wrong, none absurd.
    """
    if trained_quick == quick_gelu:
        return
    names = {True: "quick GELU", False: "GELU"}
    remedy = f"set quick_gelu: {str(trained_quick).lower()} for both towers"
    if architecture in open_clip.list_models():
        other = (
            f"{architecture}-quickgelu"
            if trained_quick
            else architecture.removesuffix("-quickgelu")
        )
        known = other in open_clip.list_models()
        remedy = (
            f"use architecture {other}"
            if known
            else f"use an architecture with {names[trained_quick]}"
        )
    raise ValueError(
        f"{what} were trained with {names[trained_quick]}, and this model has {names[quick_gelu]}; {remedy}"
    )


def check_tag(architecture: str, tag: str, quick_gelu: bool | None = None) -> dict[str, Any]:
    """What open_clip says of a tag, once its activation is known to be the architecture's, or
    `quick_gelu`.
    """
    stated = open_clip.get_pretrained_cfg(architecture, tag)
    if quick_gelu is None:
        quick_gelu = bool(open_clip.get_model_config(architecture).get("quick_gelu", False))
    same_activation(
        bool(stated.get("quick_gelu", False)), quick_gelu, f"the weights {tag!r}", architecture
    )
    return stated


def _download(architecture: str, tag: str, quick_gelu: bool | None = None) -> Found:
    stated = check_tag(architecture, tag, quick_gelu)
    try:
        path = open_clip.download_pretrained(stated)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"could not download {tag!r} of {architecture}: {_shortened(str(error))}"
        ) from error
    pixels = {
        key: stated[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in stated
    }
    return Found(Path(path), references.describe(architecture) | {"preprocess_cfg": pixels})


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of the files that an index names."""
    if path.suffix == ".json":
        parts = sorted(set(read_json(path)["weight_map"].values()))
        outside = [part for part in parts if Path(part).name != part]
        if outside:
            raise ValueError(f"{path} names the file {outside[0]!r} outside its folder")
        return {key: value for part in parts for key, value in _tensors(path.parent / part).items()}
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds other Python objects than tensors, or a TorchScript archive, and vlp runs no code of a file of "
            "weights; where you trust it, save its state_dict alone: torch.save(model.state_dict(), FILE)"
        ) from None
    except (
        Exception
    ) as error:  # torch, safetensors and zipfile each have their own kinds for a damaged file
        raise ValueError(
            f"{path} is damaged, or no file of weights: {_shortened(str(error))}"
        ) from error
    return _unpacked(stored, path)


def _unpacked(stored: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of what a trainer saved."""
    for name in _NESTED:
        if isinstance(stored, Mapping) and isinstance(stored.get(name), Mapping):
            stored = stored[name]
    names = list(stored) if isinstance(stored, Mapping) else []
    foreign = [name for name in names if not isinstance(stored[name], Tensor)]
    if not names or foreign:
        held = f"{', '.join(map(str, names[:5]))}, …" if names else f"a {type(stored).__name__}"
        raise ValueError(
            f"{path} holds {held}; expected tensors by name, or a mapping with them under {' or '.join(_NESTED)}"
        )
    return dict(stored)


def _misfit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """What two sets of tensors do not share, in a few lines; "" where they agree in names and
    shapes.
    """
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shared = sorted(own.keys() & weights.keys())
    shapes = [
        f"{k} {tuple(weights[k].shape)} for {tuple(own[k].shape)}"
        for k in shared
        if own[k].shape != weights[k].shape
    ]
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in (
            ("missing", missing),
            ("not known here", unknown),
            ("of another shape", shapes),
        )
        if names
    ]
    return (
        f"{len(shared) - len(shapes)} of {len(own)} tensors fit; " + "; ".join(parts)
        if parts
        else ""
    )


def _load_big_vision(clip: nn.Module, path: Path) -> None:
    try:
        open_clip.load_checkpoint(clip, str(path))
    except Exception as error:  # numpy's, zipfile's and open_clip's own kinds
        raise ValueError(
            f"the weights in {path} do not fit this model, or are damaged: {_shortened(str(error))}"
        ) from error


def _shortened(message: str) -> str:
    return message if len(message) <= 600 else f"{message[:600]} … ({len(message)} characters)"
