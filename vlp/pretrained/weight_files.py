"""Weights of dual encoders: from which file, and what is said beside them.

Whatever wrote them (vlp, open_clip and its trainer, OpenAI, transformers), they are brought under
the names of open_clip's CustomTextCLIP. Files that hold more than tensors are refused: nothing in a
file of weights is run.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor

from vlp import log
from vlp.pretrained import clip_description, clip_layout, references, runs
from vlp.pretrained.adapter_folder import AdapterFolder
from vlp.pretrained.folders import listing, read_json
from vlp.pretrained.places import FILES
from vlp.pretrained.references import OPEN_CLIP_WEIGHTS, Reference, read_config
from vlp.schema import did_you_mean

WEIGHTS = OPEN_CLIP_WEIGHTS[0]  # what exports write
TRANSFORMERS_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")

# First parts of names, by DataParallel, torch.compile, and trainers that hold the model.
_WRAPPERS = {"module", "_orig_mod", "model", "clip"}
# Where trainers keep the tensors, beside their epoch and optimiser.
_NESTED = ("state_dict", "model_state_dict", "model")
# What open_clip says of a tag's pixels.
_PIXELS = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True)
class WeightFile:
    """A file of weights and what is said about them, as in open_clip_config.json; {} where nothing
    is.
    """

    path: Path
    described: dict[str, Any] = field(default_factory=dict)
    # what is added to them; then `described` is of the sum, and `of_file` of the weights
    adapters: AdapterFolder | None = None
    of_file: dict[str, Any] = field(default_factory=dict)

    @property
    def stated(self) -> dict[str, Any]:
        """What is said about the weights of the file."""
        return self.described if self.adapters is None else self.of_file


def find(pretrained: str, architecture: str | None, quick_gelu: bool) -> WeightFile:
    """The weights that `model.pretrained` names, for towers with or without `quick_gelu`.

    `architecture` is the open_clip name whose tags count; None where the towers are written out.
    ValueError for a reference that leads nowhere, and for weights trained with the other
    activation.
    """
    # A tag comes first, as in open_clip: a folder that is called openai must be written ./openai.
    tags = open_clip.list_pretrained_tags_by_model(architecture) if architecture else []
    if architecture and pretrained in tags:
        return _download(architecture, pretrained, quick_gelu)

    try:
        reference = references.resolve(pretrained)
    except ValueError as error:
        no_tag = ""
        if tags:
            close = did_you_mean(pretrained, tags).partition(";")[0]
            no_tag = f". It is no tag of {architecture} either{close}"
        raise ValueError(f"pretrained: {error}{no_tag}") from None

    weights = behind(reference)
    if weights.described:
        trained_quick = bool(weights.described["model_cfg"].get("quick_gelu", False))
        same_activation(trained_quick, quick_gelu, f"the weights of {pretrained}", architecture)
    elif weights.path.suffix != ".npz":
        check_activation(weights.path, quick_gelu)
    return weights


def behind(reference: Reference) -> WeightFile:
    """The weights that a reference means, with what is said about them; a tag's are downloaded."""
    path = reference.path
    if reference.kind == "tag":
        return _download(reference.architecture, reference.tag)
    if reference.kind == "file":
        named = bool(reference.architecture)
        return WeightFile(path, references.describe(reference.architecture) if named else {})
    if reference.kind == "run":
        path = runs.resolve(path)
        runs.verify(path)
        # Of a checkpoint in parts it stands for these, which `read` knows.
        file = runs.TEACHER if reference.averaged else runs.MODEL
        return WeightFile(path / file, read_json(path / "model.json"))
    if reference.kind == "concatenated":
        members = references.members_of(path)
        raise ValueError(
            f"{reference.text} holds several models; name one of them, such as {path / members[0]}"
        )

    if reference.kind == "adapters":
        return _beside_adapters(reference)

    open_clip_form = reference.kind == "open_clip"
    described = read_config(path) if open_clip_form else clip_description.describe(path)
    return WeightFile(weights_in(path, reference.kind), described)


def _beside_adapters(reference: Reference) -> WeightFile:
    """The base's weights, with the adapters that are added to them."""
    added = AdapterFolder.read(reference.path)
    try:
        base = behind(references.resolve(added.base))
    except (ValueError, runs.CheckpointError) as error:
        raise ValueError(
            f"{reference.text} holds adapters for {added.base}, which is not found: {error}. Set "
            f"base in {reference.path / references.ADAPTERS} to where it lies"
        ) from None
    if base.adapters is not None or base.path.suffix == ".npz":
        raise ValueError(
            f"{reference.text} names {added.base} as its base, whose weights no adapters can be "
            "added to; export that as a whole model first, and name it"
        )
    return WeightFile(base.path, added.described, added, base.described)


def weights_in(folder: Path, kind: str = "open_clip") -> Path:
    """The file of weights in a folder of open_clip's or transformers' form."""
    expected = OPEN_CLIP_WEIGHTS if kind == "open_clip" else TRANSFORMERS_WEIGHTS
    for name in (*expected, *TRANSFORMERS_WEIGHTS):
        if (folder / name).is_file():
            return folder / name

    # A single file of weights under another name is taken; of several, none is.
    others = [path for path in sorted(folder.iterdir()) if path.suffix in FILES]
    if len(others) != 1:
        raise ValueError(
            f"{folder} holds no weights: it holds {listing(folder)}; expected {expected[0]}"
        )
    return others[0]


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file under open_clip's names; ValueError for a damaged one and for one that
    holds other objects.
    """
    if path.name == runs.TEACHER:  # beside the average it holds a queue
        weights: dict[str, Tensor] = runs.moving_average(path.parent)
    elif path.name == runs.MODEL and not path.exists():  # a checkpoint in parts
        weights = dict(runs.tensors_of(path.parent, "model"))
    else:
        weights = _unwrapped(_tensors(path))
    if clip_layout.is_theirs(weights):
        return clip_layout.renamed(weights)

    # vlp's own checkpoints also hold heads, which only training has, and the scale in a module.
    towers = {key: value for key, value in weights.items() if not key.startswith("heads.")}
    return {key.removeprefix("scaling."): value for key, value in towers.items()}


def _unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the wrappers that all their names begin with, in any order."""
    # All names, not the first: a model may have a tower that is called model.
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

    # open_clip has no switch: the activation belongs to the architecture's name.
    remedy = f"set quick_gelu: {str(trained_quick).lower()} for both towers"
    if architecture is not None and architecture in open_clip.list_models():
        other = architecture.removesuffix("-quickgelu")
        if trained_quick:
            other = f"{architecture}-quickgelu"
        remedy = f"use architecture {other}"
        if other not in open_clip.list_models():
            remedy = f"use an architecture with {names[trained_quick]}"

    raise ValueError(
        f"{what} were trained with {names[trained_quick]}, and this model has {names[quick_gelu]}; "
        f"{remedy}"
    )


def check_activation(path: Path, quick_gelu: bool) -> None:
    """What is known of the activation of a file of weights that nothing describes.

    open_clip's trainer notes its model beside the file, which is compared. Weights alone say
    nothing: they are taken for weights of this model's activation, and that is said.
    """
    notes = references.noted(path)
    if "model" in notes:
        quick_by_name = notes["model"].endswith("-quickgelu")
        trained_quick = quick_by_name or notes.get("force_quick_gelu") == "True"
        same_activation(trained_quick, quick_gelu, f"the weights in {path}", None)
        return

    present, other = ("quick GELU", "GELU") if quick_gelu else ("GELU", "quick GELU")
    log.say(
        f"{path} does not say its activation; it is taken to be {present}, as the model has it. "
        f"Weights trained with {other} would fit as well and be wrong: name ARCHITECTURE:{path}, "
        "or a folder that describes them"
    )


def check_tag(architecture: str, tag: str, quick_gelu: bool | None = None) -> dict[str, Any]:
    """What open_clip says of a tag, once its activation is known to be the architecture's, or
    `quick_gelu`.
    """
    stated = open_clip.get_pretrained_cfg(architecture, tag)
    if quick_gelu is None:
        quick_gelu = bool(open_clip.get_model_config(architecture).get("quick_gelu", False))
    trained_quick = bool(stated.get("quick_gelu", False))
    same_activation(trained_quick, quick_gelu, f"the weights {tag!r}", architecture)
    return stated


def _download(architecture: str, tag: str, quick_gelu: bool | None = None) -> WeightFile:
    stated = check_tag(architecture, tag, quick_gelu)
    try:
        path = open_clip.download_pretrained(stated)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"could not download {tag!r} of {architecture}: {shortened(str(error))}"
        ) from error

    pixels = {key: stated[key] for key in _PIXELS if key in stated}
    return WeightFile(Path(path), references.describe(architecture) | {"preprocess_cfg": pixels})


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of the files that an index names."""
    if path.suffix == ".json":
        return _indexed_tensors(path)
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{path} is empty, expected a file of weights; copy or download it again")

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds other Python objects than tensors, or a TorchScript archive, and vlp "
            "runs no code of a file of weights; where you trust it, save its state_dict alone: "
            "torch.save(model.state_dict(), FILE)"
        ) from None
    # torch, safetensors and zipfile each have kinds of their own for a damaged file.
    except Exception as error:
        raise ValueError(
            f"{path} is damaged, or no file of weights: {shortened(str(error))}"
        ) from error

    return _unpacked(stored, path)


def _indexed_tensors(index: Path) -> dict[str, Tensor]:
    """The tensors of every file that an index in the same folder names."""
    # An index is a stranger's file: a name with a path in it would read elsewhere.
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{index} names no files of weights; export or download it again")

    files = sorted(set(names))
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise ValueError(f"{index} names the file {outside[0]!r} outside its folder")

    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _tensors(index.parent / file)
    return tensors


def _unpacked(stored: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of what a trainer saved."""
    # Trainers nest: {"epoch": …, "state_dict": {…}}, sometimes twice.
    for name in _NESTED:
        if isinstance(stored, Mapping) and isinstance(stored.get(name), Mapping):
            stored = stored[name]

    # A mapping with anything but tensors is an optimiser's state, or something else.
    names = list(stored) if isinstance(stored, Mapping) else []
    foreign = [name for name in names if not isinstance(stored[name], Tensor)]
    if not names or foreign:
        held = f"{', '.join(map(str, names[:5]))}, …" if names else f"a {type(stored).__name__}"
        raise ValueError(
            f"{path} holds {held}; expected tensors by name, or a mapping with them under "
            f"{' or '.join(_NESTED)}"
        )
    return dict(stored)


def shortened(message: str) -> str:
    return message if len(message) <= 600 else f"{message[:600]} … ({len(message)} characters)"
