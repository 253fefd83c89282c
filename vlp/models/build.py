"""A configuration or a description becomes a `DualEncoder`, with random or with given weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from torch import nn

from vlp import config
from vlp.models import (
    assemble,
    decoder,
    freezing,
    int8_aware,
    language,
    lora,
    multimodal,
    text_dropout,
)
from vlp.models.dual_encoder import DualEncoder
from vlp.models.patch_dropout import draw_on_device
from vlp.plugin import Plugin
from vlp.pretrained import fitting, image_size, places, weight_files
from vlp.pretrained.adapter_folder import AdapterFolder
from vlp.pretrained.fitting import UNCHANGED, Fit
from vlp.schema import parse
from vlp.towers.huggingface import language_config


def build(
    model: config.Model,
    start: Callable[[DualEncoder], None] | None = None,
    texts_alone: bool = False,
) -> DualEncoder:
    """The model that a configuration describes, on the CPU in float32. `start` may give it other
    weights before its towers are locked and adapted. `texts_alone`: it will be trained on texts, so
    that what only pictures pass is frozen.

    Random weights depend only on torch's global seed. `pretrained` weights bring their scale and
    their preprocessing, as far as it is stated beside them. Raises ValueError for unknown names and
    for weights that do not fit.
    """
    model_cfg, preprocess_cfg = assemble.assemble(model)
    if any(lora_of(tower) for tower in (model.image_tower, model.text_tower)):
        lora.check_installed()

    # Weights are found before the towers are built: they may say how pixels were normalised.
    weights = None
    if model.pretrained is not None:
        architecture = getattr(model.image_tower.options, "architecture", None)
        quick_gelu = bool(model_cfg.get("quick_gelu", False))
        weights = weight_files.find(model.pretrained, architecture, quick_gelu)
        stated = weights.described.get("preprocess_cfg", {})
        preprocess_cfg = assemble.trained_on(stated, preprocess_cfg, model.pretrained)
        model_cfg = without_downloads(model_cfg)

    if start is not None and getattr(model.image_tower.options, "weights", None) is not None:
        raise ValueError(
            "init_from and image_tower.weights both bring the image tower's weights; leave one of "
            "them out"
        )
    clip = _instantiate(model_cfg)
    if model.text_dropout:
        text_dropout.check(clip.text)  # before weights are read
    if model.int8_aware:
        int8_aware.check(clip.visual)
    _load_trunk(model, clip)
    if weights is not None:
        fitting.load_into(clip, weights.path, fit_of(model), weights.stated, weights.adapters)
    model_cfg = without_downloads(model_cfg)
    encoder = DualEncoder(clip, model_cfg, preprocess_cfg, model.scale, model.heads)
    encoder.cut_captions = model.cut_captions
    if start is not None:
        start(encoder)

    text = model.text_tower
    freezing.lock(
        encoder, image=_locked(model.image_tower), text=None if text is None else _locked(text)
    )
    if texts_alone:
        multimodal.leave_pictures_out(encoder.visual)
    freezing.adapt(encoder, image=lora_of(model.image_tower), text=lora_of(text))
    if model.text_dropout:
        text_dropout.drop(encoder.text, model.text_dropout)
    if model.int8_aware:
        int8_aware.quantise(encoder.visual)
    if model.new_projection:
        freezing.unlock_projections(encoder)
    if texts_alone:
        freezing.freeze_pictures(encoder)
    return encoder


def _load_trunk(model: config.Model, clip: open_clip.CustomTextCLIP) -> None:
    """Weights that the image tower's own options name (`load_weights` of its file)."""
    image = model.image_tower
    if model.pretrained is not None and getattr(image.options, "weights", None) is not None:
        raise ValueError(
            "model.pretrained and image_tower.weights both bring the image tower's weights; leave "
            "one of them out"
        )
    load_weights = getattr(image.module, "load_weights", None)
    if load_weights is not None:
        load_weights(image.options, clip.visual)


def lora_of(tower: Plugin | None) -> Any:
    """How a tower is adapted (vlp.towers.Lora); None: it is not."""
    common = None if tower is None else tower.common
    return getattr(common, "lora", None)


def from_description(
    described: dict[str, Any],
    weights: Path | None = None,
    fit: Fit = UNCHANGED,
    stated: Mapping[str, Any] | None = None,
    added: AdapterFolder | None = None,
) -> DualEncoder:
    """The model that `DualEncoder.description` or an open_clip_config.json describes.

    `weights`: a file in any layout open_clip reads; None leaves the weights random. `fit`: how they
    enter (vlp.pretrained.fitting). `stated`: the description that the weights were made with, where
    it is another one. `added`: adapters of the model, for which `weights` are the base. Nothing is
    downloaded, except the configuration of a Hugging Face text tower.
    A description without `vlp` gets the usual bound on the scale, 100.
    """
    model_cfg = without_downloads(described["model_cfg"]) | {"custom_text": True}
    clip = _instantiate(model_cfg)
    if weights is not None:
        fitting.load_into(clip, weights, fit, stated, added)

    ours = described.get("vlp", {})
    scale = parse(config.Scale, ours.get("scale", {}))
    heads = parse(config.Heads, ours.get("heads", {}))
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
    """The towers of an open_clip configuration, with what open_clip leaves to be checked or set;
    `text_decoder` beside them where one is described.
    """
    is_ours = language.is_described(model_cfg)
    # A model with code of its own is refused here: open_clip would ask the terminal about it.
    language_model = model_cfg["text_cfg"].get("hf_model_name")
    if language_model and not is_ours:
        language_config(language_model)

    vision = model_cfg["vision_cfg"]
    is_one_model = multimodal.is_described(model_cfg)
    image_size.check_square(vision)

    not_of_towers = ("custom_text", "multimodal_cfg")
    keywords = {key: value for key, value in model_cfg.items() if key not in not_of_towers}
    if is_one_model:
        keywords["vision_cfg"] = multimodal.STAND_IN
    if is_ours:
        keywords["text_cfg"] = language.STAND_IN
    elif language_model:
        # open_clip knows paths and repositories, and a package lies elsewhere on each machine.
        place = places.locate(language_model)
        keywords["text_cfg"] = model_cfg["text_cfg"] | {"hf_model_name": place}
    try:
        clip = open_clip.CustomTextCLIP(**keywords)
    except Exception as error:  # open_clip's, timm's and torch's own kinds
        raise ValueError(
            f"open_clip cannot build these towers: {error or type(error).__name__}; found "
            f"{model_cfg}"
        ) from error

    # open_clip leaves out the projection without a word, and fails at the first text.
    if isinstance(clip.text, HFTextEncoder) and not hasattr(clip.text, "proj"):
        width = getattr(clip.text.config, "hidden_size", "others")
        raise ValueError(
            f"the text tower gives {width} features, unprojected, and embed_dim is "
            f"{model_cfg['embed_dim']}; make them equal"
        )
    if is_one_model or is_ours:
        _put_ours(clip, model_cfg)

    _set_up_two_pools(clip.visual)
    if "multimodal_cfg" in model_cfg:
        clip.text_decoder = decoder.build(model_cfg, clip.visual, clip.text)

    image_size.set_up(clip.visual, vision.get("timm_model_name") or "the image tower")
    draw_on_device(clip.visual)
    if isinstance(clip.visual, TimmModel):
        _check_unprojected(clip.visual, model_cfg)
        _approximate(clip.visual, model_cfg["vision_cfg"].get("act_kwargs"))
    return clip


def _put_ours(clip: open_clip.CustomTextCLIP, model_cfg: dict[str, Any]) -> None:
    """Give the model the towers of ours that a configuration describes; ValueError where it does
    not.
    """
    try:
        if multimodal.is_described(model_cfg):
            clip.visual = multimodal.ImageTower(model_cfg)
            clip.text = multimodal.TextTower(model_cfg, clip.visual)
        else:
            clip.text = language.LanguageTower(model_cfg["text_cfg"], model_cfg["embed_dim"])
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            "the configuration does not describe a language model's tower "
            f"({type(error).__name__}: {error}); found {model_cfg}"
        ) from None


def _set_up_two_pools(tower: Any) -> None:
    """Let an attentional pool of two kinds of queries give features [rows, D]; ValueError for one
    that would fail at the first picture: open_clip's layers take patches and what the queries give
    to be of one width.
    """
    pool = getattr(tower, "attn_pool_contrastive", None)
    if pool is None:
        return
    width = tower.conv1.out_channels
    if width != tower.output_dim:
        raise ValueError(
            f"attentional_pool {tower.attn_pool_type!r} needs an image tower as wide as the "
            f"embedding, found {width} and {tower.output_dim}; make them equal, or take shared"
        )

    # The embedding's one query would keep a dimension of its own.
    pool.register_forward_hook(lambda _, __, pooled: pooled.squeeze(1))


def _check_unprojected(tower: TimmModel, model_cfg: dict[str, Any]) -> None:
    """Refuse a trunk whose features are the embeddings and are not as many."""
    if open_clip.CLIPVisionCfg(**model_cfg["vision_cfg"]).timm_proj != "none":
        return
    # Behind the layers that some models have between pool and classifier.
    n_features = getattr(tower.trunk, "head_hidden_size", tower.trunk.num_features)
    embed_dim = model_cfg["embed_dim"]
    if n_features != embed_dim:
        raise ValueError(
            f"the image tower gives {n_features} features, unprojected, and embed_dim is "
            f"{embed_dim}; make them equal"
        )


def _approximate(tower: TimmModel, act_kwargs: dict[str, Any] | None) -> None:
    """Give a timm tower the GELU of its weights (SigLIP's is the tanh form); open_clip cannot tell
    timm which.
    """
    for module in tower.trunk.modules():
        if act_kwargs and isinstance(module, nn.GELU):
            module.approximate = act_kwargs["approximate"]


def fit_of(model: config.Model) -> Fit:
    """How weights enter the model that a configuration describes."""
    keep = None if model.context is None else model.context.keep
    return Fit(keep, model.new_projection, new_decoder=model.decoder is not None)


def _locked(tower: Plugin) -> int | None:
    """How many groups a locked tower leaves open; None: it is not locked."""
    # A plug-in of a caller's own may come without the keys of all towers.
    locked = False if tower.common is None else tower.common.locked
    if isinstance(locked, bool):
        return 0 if locked else None
    return locked.unlocked_groups
