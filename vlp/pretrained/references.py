"""What a model reference means, decided once for all that take one: `init_from`,
`model.pretrained`, `teacher.model`, `vlp eval`, `vlp export`, and `--model` of the data tools.

    runs/demo, runs/demo/checkpoints/step_00000100     a run (its newest checkpoint), or one checkpoint
    exported/demo, local-dir:exported/demo             a folder of vlp export, open_clip or transformers (CLIP, SigLIP)
    hf-hub:USER/NAME, hf:USER/NAME                     such a folder on the Hub; USER/NAME alone asks it for 3 seconds
    ViT-B-32:laion2b_s34b_b79k                         an open_clip architecture with one of its tags
    ViT-B-32:epoch_32.pt, MY.json:epoch_32.pt          an architecture, or one of your own, with a file of weights
    epoch_32.pt                                        a file of weights, where the architecture is known already
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlp.pretrained import hub
from vlp.schema import did_you_mean

CONFIG = "open_clip_config.json"
STAGES = "vlp_stages.json"  # of a folder whose members are exports (vlp.models.stages)
MANIFEST = "vlp_export.json"  # of an export: its name and the files that it wrote
TEXT_TOWER = "text_tower"  # a folder of our exports: the configuration of a Hugging Face text tower
# The names that open_clip gives the weights of a folder, in its order of preference.
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
FILES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".npz",
)  # endings of weights; npz is big_vision's

_HUB = ("hf-hub:", "hf:")
_LOCAL = "local-dir:"
_WORKING = (
    "a run or checkpoint of vlp, a folder with open_clip_config.json or with config.json of a CLIPModel or SiglipModel, "
    "ARCHITECTURE:TAG or ARCHITECTURE:FILE of open_clip, FILE.json:FILE, hf-hub:USER/NAME"
)


@dataclass(frozen=True)
class Reference:
    """A reference that was found to mean something. `text` is what was written."""

    text: str
    kind: Literal["run", "stages", "open_clip", "transformers", "file", "tag"]
    path: Path = Path()  # the folder, or the file of weights
    architecture: str = ""  # of a tag, and of a file where it was named: see `describe`
    tag: str = ""


def resolve(reference: str | Path | Reference) -> Reference:
    """What `reference` means; a ValueError lists what was found at its place and what would work.

    Only `hf-hub:`, `hf:` and a USER/NAME that cannot be a path here ask a Hub.
    """
    if isinstance(reference, Reference):
        return reference
    text = str(reference)
    if text.startswith(_HUB):
        return in_folder(text, hub.snapshot(text.partition(":")[2]))

    place = Path(text.removeprefix(_LOCAL)).expanduser()
    if place.is_dir():
        return in_folder(text, place)
    if text.startswith(_LOCAL):
        raise ValueError(f"no folder {place}{_near(place)}. What works: {_WORKING}")
    if place.is_file():
        return _of_file(text, place)

    architecture, colon, weights = text.partition(":")
    if colon:
        return _with_weights(text, architecture, weights)
    import open_clip

    if text in open_clip.list_models():
        known = ", ".join(open_clip.list_pretrained_tags_by_model(text)) or "none"
        raise ValueError(
            f"{text} is an architecture without weights; write {text}:TAG (known: {known}) or {text}:FILE"
        )
    if (
        re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text)
        and place.suffix not in FILES
        and not place.parent.exists()
    ):
        return in_folder(text, hub.snapshot(text, patient=False))
    raise ValueError(
        f"no model {text!r}: no such file or folder{_near(place)}. What works: {_WORKING}"
    )


def in_folder(text: str, folder: Path) -> Reference:
    """The kind of model that a folder holds, by its files; a ValueError names them where it holds
    none.
    """
    checkpoints = folder / "checkpoints"
    if (folder / "manifest.json").is_file() or any(checkpoints.glob("step_*")):
        return Reference(text, "run", folder)
    for name, kind in ((STAGES, "stages"), (CONFIG, "open_clip"), ("config.json", "transformers")):
        if (folder / name).is_file():
            return Reference(text, kind, folder)

    trained = sorted(checkpoints.glob("*.pt")) + sorted(folder.glob("epoch_*.pt"))
    if trained:
        raise ValueError(
            f"{folder} is a training folder of open_clip; name a file and its architecture: "
            f"{_trained_as(trained[-1]) or 'ARCHITECTURE'}:{trained[-1]}"
        )
    weights = sorted(path for path in folder.iterdir() if path.suffix in FILES)
    if weights:
        raise ValueError(
            f"{folder} holds weights ({weights[0].name}) but neither {CONFIG} nor config.json, which would describe them; "
            f"name the architecture: ARCHITECTURE:{weights[0]}"
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

    named = open_clip.get_model_config(architecture) if ":" not in architecture else None
    if named is not None:
        return {"model_cfg": named, "preprocess_cfg": {}}
    place = Path(architecture)
    if place.suffix == ".json" and place.is_file():
        return _own_architecture(place)
    if not architecture.startswith((*_HUB, _LOCAL)) and not place.is_dir():
        known = open_clip.list_models()
        raise ValueError(
            f"open_clip knows no architecture {architecture!r}{did_you_mean(architecture, known)}"
        )
    found = resolve(architecture)
    if found.kind == "open_clip":
        return read_config(found.path)
    if found.kind == "transformers":
        from vlp.pretrained import clip_layout

        return clip_layout.describe(found.path)
    raise ValueError(
        f"{architecture} is a {found.kind}, whose towers vlp builds from its own `model` section; copy that"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """open_clip_config.json with both sections present, its Hugging Face parts pointing into the
    folder where they lie.
    """
    config = read_json(folder / CONFIG)
    if "model_cfg" not in config:
        raise ValueError(f"{folder / CONFIG} has no section 'model_cfg'; found {sorted(config)}")
    text = config["model_cfg"]["text_cfg"]
    if text.get("hf_tokenizer_name") and (folder / "tokenizer_config.json").exists():
        text["hf_tokenizer_name"] = str(folder)
    if text.get("hf_model_name") and (folder / TEXT_TOWER).is_dir():
        text["hf_model_name"] = str(folder / TEXT_TOWER)
    return {"preprocess_cfg": {}} | config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a ValueError says what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path.parent} holds no {path.name}; it holds {listing(path.parent)}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); export or download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def files_of(folder: Path) -> list[str]:
    """The files below a folder, links among them, by their path in it."""
    return [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    ]


def exported_files(folder: Path) -> list[str]:
    """The files that an export wrote there, by its own list; none where it is no export."""
    return read_json(folder / MANIFEST)["files"] if (folder / MANIFEST).is_file() else []


def listing(folder: Path, most: int = 8) -> str:
    """The names in a folder for a message, folders with a slash."""
    if not folder.is_dir():
        return "nothing: there is no such folder"
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "nothing"


def _of_file(text: str, path: Path) -> Reference:
    """A file of weights; the folder around it where that describes them, or where the file is its
    description.
    """
    if path.name in (CONFIG, "config.json", "manifest.json", STAGES):
        return in_folder(text, path.parent)
    if path.suffix == ".json":
        _own_architecture(path)
        raise ValueError(
            f"{text} is an architecture without weights; write {text}:FILE with a file of weights"
        )
    if path.suffix not in FILES:
        raise ValueError(
            f"{text} is no file of weights; expected one ending in {', '.join(FILES)}, or {_WORKING}"
        )
    described = any(
        (path.parent / name).is_file() for name in (CONFIG, "config.json", "manifest.json")
    )
    if described and path.name in ("model.safetensors", "pytorch_model.bin", *OPEN_CLIP_WEIGHTS):
        return in_folder(text, path.parent)
    return Reference(text, "file", path)


def _with_weights(text: str, architecture: str, weights: str) -> Reference:
    """ARCHITECTURE:TAG or ARCHITECTURE:FILE."""
    import open_clip

    address = re.fullmatch(
        r"(https?:)?//(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+).*", text
    )
    if address:
        raise ValueError(f"{text} is an address; write hf-hub:{address[2]}")
    own = Path(architecture).suffix == ".json"
    if own and not Path(architecture).is_file():
        raise ValueError(f"no file {architecture}{_near(Path(architecture))}")
    if not own and architecture not in open_clip.list_models():
        hint = did_you_mean(architecture, open_clip.list_models()).partition(";")[0]
        raise ValueError(
            f"no model {text!r}: open_clip knows no architecture {architecture!r}{hint}. What works: {_WORKING}"
        )
    place = Path(weights).expanduser()
    if place.is_file():
        return Reference(text, "file", place, architecture)
    tags = [] if own else open_clip.list_pretrained_tags_by_model(architecture)
    if weights in tags:
        return Reference(text, "tag", architecture=architecture, tag=weights)
    if place.is_dir():
        raise ValueError(
            f"{weights} is a folder, which says its architecture itself; write {weights} alone"
        )
    hint = "" if own else f", and no tag{did_you_mean(weights, tags)}"
    raise ValueError(f"{architecture} has no weights {weights!r}: no such file{_near(place)}{hint}")


def _own_architecture(path: Path) -> dict[str, Any]:
    """A model's JSON as open_clip keeps them, alone or inside an open_clip_config.json."""
    config = read_json(path)
    model_cfg = config.get("model_cfg", config)
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - model_cfg.keys()
    if missing:
        raise ValueError(
            f"{path} is no architecture: it lacks {sorted(missing)}; found {sorted(model_cfg)}"
        )
    return {"model_cfg": model_cfg, "preprocess_cfg": config.get("preprocess_cfg", {})}


def _trained_as(weights: Path) -> str:
    """The architecture that open_clip's trainer noted beside its checkpoints, or nothing."""
    for folder in (weights.parent, weights.parent.parent):
        notes = folder / "params.txt"
        if notes.is_file():
            line = re.search(
                r"^model: (\S+)$", notes.read_text(encoding="utf-8", errors="replace"), re.MULTILINE
            )
            return line[1] if line else ""
    return ""


def architecture_hint(weights: Path) -> str:
    """How to name a bare file of weights so that its architecture is known."""
    return f"{_trained_as(weights) or 'ARCHITECTURE'}:{weights}"


def _near(place: Path) -> str:
    """The closest existing names, for a path that leads nowhere."""
    folder = place.parent
    while not folder.is_dir() and folder != folder.parent:
        place, folder = folder, folder.parent
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(place.name, names, n=3, cutoff=0.6)
    return f" (near it: {', '.join(str(folder / name) for name in close)})" if close else ""


def _inside(folder: Path) -> str:
    """Subfolders that are models, for a folder that is none."""
    names = ("manifest.json", STAGES, CONFIG, "config.json")
    models = [
        path for path in sorted(folder.iterdir()) if any((path / name).is_file() for name in names)
    ]
    return f"; models inside it: {', '.join(map(str, models[:3]))}" if models else ""
