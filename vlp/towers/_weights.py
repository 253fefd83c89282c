"""Where configurations and weights come from: open_clip's tags, files, exported folders, the Hub."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from vlp.schema import did_you_mean

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # the first one found is read
STAGES = "vlp_stages.json"  # of a folder whose members are such folders (vlp.stages)
TEXT_TOWER = "text_tower"  # a folder of our exports: the configuration of a Hugging Face text tower


def folder_of(reference: str | Path) -> Path:
    """The folder behind a path, `local-dir:path` or `hf-hub:user/name` (downloaded into the Hub's cache)."""
    text = str(reference)
    if text.startswith("hf-hub:"):
        return _snapshot(text.removeprefix("hf-hub:"))
    folder = Path(text.removeprefix("local-dir:"))
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; expected one that holds {CONFIG} and {WEIGHTS[0]}, or hf-hub:user/name")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """open_clip_config.json with both sections present, its Hugging Face parts pointing into the folder where they lie."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {CONFIG}; it is not a model exported for open_clip") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / CONFIG} is not JSON ({error}); export or download it again") from None
    if "model_cfg" not in config:
        raise ValueError(f"{folder / CONFIG} has no section 'model_cfg'; found {sorted(config)}")
    text = config["model_cfg"]["text_cfg"]
    if text.get("hf_tokenizer_name") and (folder / "tokenizer_config.json").exists():
        text["hf_tokenizer_name"] = str(folder)
    if text.get("hf_model_name") and (folder / TEXT_TOWER).is_dir():
        text["hf_model_name"] = str(folder / TEXT_TOWER)
    return {"preprocess_cfg": {}} | config


def find(pretrained: str, architecture: str | None) -> tuple[Path, dict[str, Any]]:
    """The file of weights that `pretrained` names, and the preprocess_cfg that comes with them ({} for a bare file).

    `architecture` is the open_clip name whose tags count; None where the towers are written out.
    """
    if Path(pretrained).is_file():
        return Path(pretrained), {}
    if pretrained.startswith(("hf-hub:", "local-dir:")) or Path(pretrained).is_dir():
        folder = folder_of(pretrained)
        return weights_in(folder), read_config(folder)["preprocess_cfg"]
    tags = open_clip.list_pretrained_tags_by_model(architecture) if architecture else []
    if pretrained not in tags:
        known = did_you_mean(pretrained, tags) if tags else ""
        raise ValueError(
            f"pretrained: {pretrained!r} is no file, no folder, no hf-hub:user/name and no open_clip tag of "
            f"{architecture or 'these towers (only an open_clip architecture has tags)'}{known}"
        )
    return _download(architecture, pretrained)


def weights_in(folder: Path) -> Path:
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise ValueError(f"{folder} holds no weights; expected {WEIGHTS[0]}")
    return found


def load_into(clip: nn.Module, path: Path) -> None:
    """Read weights in any layout open_clip knows into a CustomTextCLIP; raises ValueError where they do not fit.

    The scale always comes from the weights. A bias comes from them only where the model has one: a model without drops
    it with a warning, and a model with one keeps its own where the weights have none.
    """
    own = clip.logit_bias
    clip.logit_bias = nn.Parameter(torch.zeros(()))  # open_clip leaves 0 here where the weights hold no bias
    try:
        open_clip.load_checkpoint(clip, str(path))
    except Exception as error:  # torch, safetensors and pickle each have their own kinds for a damaged or foreign file
        raise ValueError(f"the weights in {path} do not fit this model, or are damaged: {_shortened(str(error))}") from error
    found = clip.logit_bias.item()
    if own is None:
        clip.logit_bias = None
        if found:
            message = f"{path} holds a logit bias ({found:.4g}) that this model leaves out; set model.bias to keep it"
            warnings.warn(message, stacklevel=2)
    elif not found:
        clip.logit_bias = own


def _download(architecture: str, tag: str) -> tuple[Path, dict[str, Any]]:
    stated = open_clip.get_pretrained_cfg(architecture, tag)
    wanted = bool(open_clip.get_model_config(architecture).get("quick_gelu", False))
    if wanted != bool(stated.get("quick_gelu", False)):
        other = architecture.removesuffix("-quickgelu") if wanted else f"{architecture}-quickgelu"
        raise ValueError(f"the weights {tag!r} were trained with {'GELU' if wanted else 'quick GELU'}; use architecture {other}")
    try:
        path = open_clip.download_pretrained(stated)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"could not download {tag!r} of {architecture}: {error}") from error
    return Path(path), {key: stated[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in stated}


def _snapshot(repository: str) -> Path:
    import huggingface_hub

    try:
        wanted = [CONFIG, "*.json", "*.txt", "*.model", f"{TEXT_TOWER}/*", WEIGHTS[0], f"*/{WEIGHTS[0]}"]
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=wanted))
        if not (folder / WEIGHTS[0]).exists() and not (folder / STAGES).exists():
            huggingface_hub.hf_hub_download(repository, WEIGHTS[1])
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ValueError(f"could not get {repository} from the Hub: {error}") from error
    return folder


def _shortened(message: str) -> str:
    return message if len(message) <= 1200 else f"{message[:1200]} … ({len(message)} characters)"
