"""What a model reference means, decided once for all that take one: `init_from`,
`model.pretrained`, `teacher.model`, `vlp eval`, `vlp export`, and `--model` of the data tools.

    runs/demo                                a run: its newest checkpoint
    runs/demo@best                           its best checkpoint, by its checkpoint.best
    runs/demo/checkpoints/step_00000100      one checkpoint
    runs/demo@ema                            the moving average of a run's or checkpoint's weights
    exported/demo, local-dir:exported/demo   a folder of vlp export, open_clip or transformers
                                             (CLIP, SigLIP)
    hf-hub:USER/NAME, hf:USER/NAME           such a folder on the Hub; USER/NAME alone asks it for
                                             3 seconds
    ViT-B-32:laion2b_s34b_b79k               an open_clip architecture with one of its tags
    ViT-B-32:epoch_32.pt                     an architecture with a file of weights
    MY.json:epoch_32.pt                      the same for an architecture of your own
    exported/adapters                        a folder of adapters, which names its base
    epoch_32.pt                              a file of weights, where the architecture is known
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vlp.pretrained import clip_description, hub
from vlp.pretrained.folders import listing, read_json
from vlp.pretrained.places import (
    FILES,
    HUB,
    bare,
    is_path,
    may_be_repository,
    near,
    of_page,
    on_hub,
)
from vlp.pretrained.runs import AT_BEST, CheckpointError, best
from vlp.privacy import scrubbed
from vlp.schema import did_you_mean

CONFIG = "open_clip_config.json"
# of a folder whose members are exports (vlp.models.concatenated)
CONCATENATED = "vlp_stages.json"
# of a folder of adapters, which names their base (vlp.pretrained.adapter_folder)
ADAPTERS = "vlp_adapters.json"
# a folder of our exports: the configuration of a Hugging Face text tower
TEXT_TOWER = "text_tower"
# The names that open_clip gives the weights of a folder, in its order of preference.
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
Kind = Literal["run", "concatenated", "adapters", "open_clip", "transformers", "file", "tag"]

# the prefix that says to look here
_LOCAL = "local-dir:"
AVERAGE = "@ema"  # behind a run or checkpoint: its moving average
_WORKING = (
    "a run or checkpoint of vlp, a folder with open_clip_config.json or with config.json of a "
    "CLIPModel or SiglipModel, ARCHITECTURE:TAG or ARCHITECTURE:FILE of open_clip, FILE.json:FILE, "
    "hf-hub:USER/NAME"
)
# A folder with one of these says its own architecture; the first that it holds tells its kind.
_MARKS: dict[str, Kind] = {
    "manifest.json": "run",
    CONCATENATED: "concatenated",
    ADAPTERS: "adapters",
    CONFIG: "open_clip",
    "config.json": "transformers",
}


@dataclass(frozen=True)
class Reference:
    """A reference that was found to mean something. `text` is what was written."""

    text: str
    kind: Kind
    path: Path = Path()  # the folder, or the file of weights
    architecture: str = ""  # of a tag, and of a file where it was named: see `describe`
    tag: str = ""
    averaged: bool = False  # the moving average of a run's weights in the place of these


def resolve(reference: str | Path | Reference) -> Reference:
    """What `reference` means; a ValueError lists what was found at its place and what would work.

    Only `hf-hub:`, `hf:` and a USER/NAME that cannot be a path here ask a Hub.
    """
    if isinstance(reference, Reference):
        return reference
    text = str(reference)
    if not text:
        raise ValueError(f"no model is named; expected {_WORKING}")
    if on_hub(text):
        if not may_be_repository(bare(text)):
            raise ValueError(
                f"{bare(text)!r} is no name of a repository; expected hf-hub:USER/NAME"
            )
        return in_folder(text, hub.snapshot(bare(text)))

    # A folder may be called so; then it is meant.
    base = text.removesuffix(AVERAGE)
    if base != text and not Path(text).expanduser().exists():
        return averaged(resolve(base))

    # What exists here comes first: a name may look like a repository's and be a folder.
    place = Path(text.removeprefix(_LOCAL)).expanduser()
    if place.is_dir():
        return in_folder(text, place)
    if text.endswith(AT_BEST) and Path(text.removesuffix(AT_BEST)).expanduser().is_dir():
        run = Path(text.removesuffix(AT_BEST)).expanduser()
        try:
            return Reference(text, "run", best(run))
        except CheckpointError as error:
            raise ValueError(str(error)) from None
    if text.startswith(_LOCAL):
        raise ValueError(f"no folder {place}{near(place)}. What works: {_WORKING}")
    if place.is_file():
        return _of_file(text, place)

    architecture, colon, weights = text.partition(":")
    if colon:
        return _with_weights(text, architecture, weights)

    import open_clip

    if text in open_clip.list_models():
        known = ", ".join(open_clip.list_pretrained_tags_by_model(text)) or "none"
        raise ValueError(
            f"{text} is an architecture without weights; write {text}:TAG (known: {known}) or "
            f"{text}:FILE"
        )

    if "/" in text and not is_path(text):
        return in_folder(text, hub.snapshot(text, patient=False))
    raise ValueError(
        f"no model {text!r}: no such file or folder{near(place)}. What works: {_WORKING}"
    )


def check(reference: str) -> None:
    """Raise ValueError where a reference leads nowhere, as far as that is known without a Hub."""
    may_be_on_hub = on_hub(reference) or ("/" in reference and not is_path(reference))
    if not may_be_on_hub:
        resolve(reference)


def averaged(reference: Reference) -> Reference:
    """The moving average of the run that `reference` names; ValueError for other models."""
    if reference.kind != "run":
        raise ValueError(
            f"{reference.text} is no run of vlp, and only runs and their checkpoints keep a moving "
            f"average (teacher.ema); name one, or leave out {AVERAGE} or --ema"
        )
    text = reference.text.removesuffix(AVERAGE) + AVERAGE
    return replace(reference, text=text, averaged=True)


def of_average(reference: str) -> str:
    """The reference to the moving average of the run that `reference` names."""
    return averaged(resolve(reference)).text


def in_folder(text: str, folder: Path) -> Reference:
    """The kind of model that a folder holds, by its files; a ValueError names them where it holds
    none.
    """
    checkpoints = folder / "checkpoints"
    if any(checkpoints.glob("step_*")):
        return Reference(text, "run", folder)
    for name, kind in _MARKS.items():
        if (folder / name).is_file():
            return Reference(text, kind, folder)

    # It is none. What it holds instead decides what the user should write.
    trained = sorted(checkpoints.glob("*.pt")) + sorted(folder.glob("epoch_*.pt"))
    if trained:
        raise ValueError(
            f"{folder} is a training folder of open_clip; name a file and its architecture: "
            f"{_trained_as(trained[-1]) or 'ARCHITECTURE'}:{trained[-1]}"
        )
    weights = sorted(path for path in folder.iterdir() if path.suffix in FILES)
    if weights:
        raise ValueError(
            f"{folder} holds weights ({weights[0].name}) but neither {CONFIG} nor config.json, "
            f"which would describe them; name the architecture: ARCHITECTURE:{weights[0]}"
        )
    if checkpoints.is_dir():
        raise ValueError(
            f"{folder} holds no complete checkpoint; expected {checkpoints}/step_*/manifest.json"
        )
    raise ValueError(
        f"{folder} is no model: it holds {listing(folder)}. What works: {_WORKING}{_inside(folder)}"
    )


def describe(architecture: str) -> dict[str, Any]:
    """model_cfg and preprocess_cfg ({} where nothing is said) of a name, a JSON file, a folder, or
    hf-hub:; a new copy at every call.
    """
    import open_clip

    # open_clip's own names come first; a colon would make it ask a Hub.
    named = open_clip.get_model_config(architecture) if ":" not in architecture else None
    if named is not None:
        return {"model_cfg": named, "preprocess_cfg": {}}

    place = Path(architecture)
    if place.suffix == ".json" and place.is_file():
        return _own_architecture(place)
    if not architecture.startswith((*HUB, _LOCAL)) and not place.is_dir():
        known = open_clip.list_models()
        raise ValueError(
            f"open_clip knows no architecture {architecture!r}{did_you_mean(architecture, known)}"
        )

    reference = resolve(architecture)
    if reference.kind == "open_clip":
        return read_config(reference.path)
    if reference.kind == "transformers":
        return clip_description.describe(reference.path)
    raise ValueError(
        f"{architecture} is a {reference.kind}, whose towers vlp builds from its own `model` "
        "section; copy that"
    )


def stated_config(folder: Path) -> dict[str, Any]:
    """open_clip_config.json as it is written, with both sections; ValueError where one is
    something else.
    """
    config = read_json(folder / CONFIG)
    if "model_cfg" not in config:
        raise ValueError(f"{folder / CONFIG} has no section 'model_cfg'; found {sorted(config)}")
    config.setdefault("preprocess_cfg", {})
    check_sections(config, folder / CONFIG)
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """`stated_config` whose Hugging Face parts point into the folder where they lie."""
    config = stated_config(folder)

    # An export moves: its files say ".", or the place they were first written to.
    text = config["model_cfg"]["text_cfg"]
    if text.get("hf_tokenizer_name") and (folder / "tokenizer_config.json").exists():
        text["hf_tokenizer_name"] = str(folder)
    if text.get("hf_model_name") and (folder / TEXT_TOWER).is_dir():
        text["hf_model_name"] = str(folder / TEXT_TOWER)
    return config


def check_sections(config: dict[str, Any], path: Path) -> None:
    """Raise ValueError unless the sections of an architecture that `path` holds are mappings."""
    model_cfg = config["model_cfg"]
    sections = {"preprocess_cfg": config["preprocess_cfg"], "model_cfg": model_cfg}
    # What vlp adds; of others it is absent.
    if "vlp" in config:
        sections["vlp"] = config["vlp"]
    if isinstance(model_cfg, dict):
        sections |= {name: model_cfg.get(name) for name in ("vision_cfg", "text_cfg")}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ValueError(
                f"{path} is no architecture: its {name} is {str(section)[:60]!r}, expected an "
                "object; export or download it again"
            )


def members_of(folder: Path) -> list[str]:
    """The members of a folder of several models: folders in it, each an export; ValueError for
    others.
    """
    members = read_json(folder / CONCATENATED).get("members")
    if not isinstance(members, list) or not members:
        raise ValueError(f"{folder / CONCATENATED} names no members; export them again")

    # A list is a stranger's: a path would lead out of the folder, and back into it for ever.
    for name in members:
        is_inside = isinstance(name, str) and name != ".." and Path(name).name == name
        if not is_inside or not (folder / name / CONFIG).is_file():
            raise ValueError(
                f"{folder / CONCATENATED} names {str(name)[:60]!r}, which is no folder beside it "
                f"with {CONFIG}; export them again"
            )
    return members


def _of_file(text: str, path: Path) -> Reference:
    """A file of weights; the folder around it where that describes them, or where the file is its
    description.
    """
    if path.name in _MARKS:
        return in_folder(text, path.parent)
    if path.suffix == ".json":
        _own_architecture(path)
        raise ValueError(
            f"{text} is an architecture without weights; write {text}:FILE with a file of weights"
        )
    # Better refused here than by an unpickler that finds something else.
    if path.suffix not in FILES:
        endings = ", ".join(FILES)
        raise ValueError(
            f"{text} is no file of weights; expected one ending in {endings}, or {_WORKING}"
        )

    # A file of the usual name is the folder's model, which the folder describes.
    describing = (CONFIG, "config.json", "manifest.json")
    described = any((path.parent / name).is_file() for name in describing)
    if described and path.name in ("model.safetensors", "pytorch_model.bin", *OPEN_CLIP_WEIGHTS):
        return in_folder(text, path.parent)
    return Reference(text, "file", path)


def _with_weights(text: str, architecture: str, weights: str) -> Reference:
    """ARCHITECTURE:TAG or ARCHITECTURE:FILE."""
    import open_clip

    # "https://…" has a colon as well. Whoever sees the message need not see a password in it.
    page = of_page(text)
    if page:
        raise ValueError(f"{scrubbed(text)} is an address; write {page}")
    if "://" in text:
        raise ValueError(
            f"{scrubbed(text)} is an address; download the model, and name its folder or file"
        )
    if not weights:
        raise ValueError(
            f"{text} names no weights; write {text}TAG, {text}FILE, or the name of a folder alone"
        )

    is_file = Path(architecture).suffix == ".json"
    if is_file and not Path(architecture).is_file():
        raise ValueError(f"no file {architecture}{near(Path(architecture))}")
    if not is_file and architecture not in open_clip.list_models():
        hint = did_you_mean(architecture, open_clip.list_models()).partition(";")[0]
        raise ValueError(
            f"no model {text!r}: open_clip knows no architecture {architecture!r}{hint}. "
            f"What works: {_WORKING}"
        )

    if on_hub(weights):
        raise ValueError(
            f"{text} names a repository, which says its architecture itself; write {weights} alone"
        )

    # A file comes before a tag of the same name: it is what the user has.
    place = Path(weights).expanduser()
    if place.is_file():
        return Reference(text, "file", place, architecture)
    tags = [] if is_file else open_clip.list_pretrained_tags_by_model(architecture)
    if weights in tags:
        return Reference(text, "tag", architecture=architecture, tag=weights)

    if place.is_dir():
        raise ValueError(
            f"{weights} is a folder, which says its architecture itself; write {weights} alone"
        )
    hint = "" if is_file else f", and no tag{did_you_mean(weights, tags)}"
    raise ValueError(f"{architecture} has no weights {weights!r}: no such file{near(place)}{hint}")


def _own_architecture(path: Path) -> dict[str, Any]:
    """A model's JSON as open_clip keeps them, alone or inside an open_clip_config.json."""
    config = read_json(path)
    model_cfg = config.get("model_cfg", config)
    if not isinstance(model_cfg, dict):
        model_cfg = {}
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - model_cfg.keys()
    if missing:
        raise ValueError(
            f"{path} is no architecture: it lacks {sorted(missing)}; found {sorted(model_cfg)}"
        )
    described = {"model_cfg": model_cfg, "preprocess_cfg": config.get("preprocess_cfg", {})}
    check_sections(described, path)
    return described


def _trained_as(weights: Path) -> str:
    """The architecture that open_clip's trainer noted beside its checkpoints, or nothing."""
    name = noted(weights).get("model", "")
    # The trainer's switch has no other name in a reference than the architecture's.
    if noted(weights).get("force_quick_gelu") == "True" and not name.endswith("-quickgelu"):
        return f"{name}-quickgelu"
    return name


def noted(weights: Path) -> dict[str, str]:
    """What open_clip's trainer noted beside its checkpoints, as text; {} where it did not."""
    # Its trainer writes RUN/params.txt and RUN/checkpoints/epoch_N.pt.
    for folder in (weights.parent, weights.parent.parent):
        notes = folder / "params.txt"
        if notes.is_file():
            parameters = notes.read_text(encoding="utf-8", errors="replace")
            return dict(re.findall(r"^(\w+): (\S+)$", parameters, re.MULTILINE))
    return {}


def architecture_hint(weights: Path) -> str:
    """How to name a bare file of weights so that its architecture is known."""
    return f"{_trained_as(weights) or 'ARCHITECTURE'}:{weights}"


def _inside(folder: Path) -> str:
    """Subfolders that are models, for a folder that is none."""
    models = [
        path for path in sorted(folder.iterdir()) if any((path / name).is_file() for name in _MARKS)
    ]
    if not models:
        return ""
    return f"; models inside it: {', '.join(map(str, models[:3]))}"
