"""A configuration or a description becomes a `DualEncoder`, with random or with given weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
from open_clip.timm_model import TimmModel
from torch import nn

from vlp import config
from vlp.models import assemble
from vlp.models.dual_encoder import DualEncoder
from vlp.pretrained import weight_files
from vlp.schema import parse
from vlp.towers.huggingface import language_config


def build(model: config.Model) -> DualEncoder:
    """The model that a configuration describes, on the CPU in float32.

    Random weights depend only on torch's global seed. `pretrained` weights bring their scale and
    their preprocessing, as far as it is stated beside them. Raises ValueError for unknown names and
    for weights that do not fit.
    """
    model_cfg, preprocess_cfg = assemble.assemble(model)
    weights = None
    if model.pretrained is not None:
        architecture = getattr(model.image_tower.options, "architecture", None)
        weights = weight_files.find(
            model.pretrained, architecture, bool(model_cfg.get("quick_gelu", False))
        )
        preprocess_cfg = assemble.trained_on(
            weights.described.get("preprocess_cfg", {}), preprocess_cfg, model.pretrained
        )
        model_cfg = without_downloads(model_cfg)
    clip = _instantiate(model_cfg)
    if weights is not None:
        weight_files.load_into(clip, weights.path)
    encoder = DualEncoder(
        clip, without_downloads(model_cfg), preprocess_cfg, model.scale, model.heads
    )
    text = model.text_tower
    encoder.lock(image=_locked(model.image_tower), text=text is not None and _locked(text))
    return encoder


def from_description(described: dict[str, Any], weights: Path | None = None) -> DualEncoder:
    """The model that `DualEncoder.description` or an open_clip_config.json describes.

    `weights`: a file in any layout open_clip reads; None leaves the weights random. Nothing is
    downloaded, except the configuration of a Hugging Face text tower. A description without `vlp`
    gets the usual bound on the scale, 100.
    """
    model_cfg = without_downloads(described["model_cfg"]) | {"custom_text": True}
    if "multimodal_cfg" in model_cfg:
        raise ValueError(
            "this model has a captioning decoder beside its two towers; expected a dual encoder"
        )
    clip = _instantiate(model_cfg)
    if weights is not None:
        weight_files.load_into(clip, weights)
    ours = described.get("vlp", {})
    scale, heads = (
        parse(config.Scale, ours.get("scale", {})),
        parse(config.Heads, ours.get("heads", {})),
    )
    return DualEncoder(clip, model_cfg, described["preprocess_cfg"], scale, heads)


def without_downloads(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """The configuration with towers that do not fetch weights of their own: all weights are in the
    model's file.
    """
    flags = {
        "vision_cfg": ("timm_model_name", "timm_model_pretrained"),
        "text_cfg": ("hf_model_name", "hf_model_pretrained"),
    }
    changed = {
        name: model_cfg[name] | {flag: False}
        for name, (tower, flag) in flags.items()
        if tower in model_cfg[name]
    }
    return model_cfg | changed


def _instantiate(model_cfg: dict[str, Any]) -> open_clip.CustomTextCLIP:
    text = model_cfg["text_cfg"]
    if text.get("hf_model_name"):
        language_config(
            text["hf_model_name"]
        )  # refuses code of its own, which open_clip would ask the terminal about
    try:
        clip = open_clip.CustomTextCLIP(
            **{k: v for k, v in model_cfg.items() if k != "custom_text"}
        )
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"open_clip cannot build these towers: {error or type(error).__name__}; found {model_cfg}"
        ) from error
    if (
        isinstance(clip.visual, TimmModel)
        and open_clip.CLIPVisionCfg(**model_cfg["vision_cfg"]).timm_proj == "none"
    ):
        found, wanted = clip.visual.trunk.num_features, model_cfg["embed_dim"]
        if found != wanted:
            raise ValueError(
                f"the image tower gives {found} features, unprojected, and embed_dim is {wanted}; make them equal"
            )
    if isinstance(clip.visual, TimmModel):
        _approximate(clip.visual, model_cfg["vision_cfg"].get("act_kwargs"))
    return clip


def _approximate(tower: TimmModel, act_kwargs: dict[str, Any] | None) -> None:
    """Give a timm tower the GELU of its weights (SigLIP's is the tanh form); open_clip cannot tell
    timm which.
    """
    for module in tower.trunk.modules():
        if act_kwargs and isinstance(module, nn.GELU):
            module.approximate = act_kwargs["approximate"]


def _locked(tower: Any) -> bool:
    return tower.common is not None and tower.common.locked
