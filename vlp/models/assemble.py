"""Two towers' sections become one open_clip configuration, and what the model tells the data about
itself.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from vlp import log, plugin
from vlp.config import Decoder, Model
from vlp.plugin import Plugin
from vlp.schema import parse, plain
from vlp.types import ImageSpec, TextSpec


def assemble(model: Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `model_cfg` and `preprocess_cfg` of open_clip_config.json that `model` describes.

    Raises ValueError for a tower on the wrong side, towers that contradict each other, and a
    missing embed_dim.
    """
    image = model.image_tower
    text = model.text_tower or image
    _require(image, "vision_cfg", "image tower")
    if model.text_tower is not None:
        _refuse_one_model(image, text)
    if model.text_tower is None and not hasattr(image.module, "text_cfg"):
        raise ValueError(
            f"image_tower {image.name!r} brings no text tower; add text_tower: one of "
            f"{_able('text_cfg')}"
        )
    _require(text, "text_cfg", "text tower")

    shared = _agree(image, text)
    embed_dim = model.embed_dim or shared.pop("embed_dim", None)
    if embed_dim is None:
        raise ValueError(
            f"towers {image.name!r} and {text.name!r} leave the embedding size open; "
            "set model.embed_dim"
        )

    model_cfg = shared | {
        "embed_dim": embed_dim,
        "vision_cfg": _vision_cfg(image, model.new_projection),
        "text_cfg": _text_cfg(text),
        # the text tower stays a module of its own, so that every model has one layout
        "custom_text": True,
        "init_logit_scale": math.log(model.scale.init),
    }
    if model.bias is not None:
        model_cfg["init_logit_bias"] = model.bias
    if model.decoder is not None:
        model_cfg["multimodal_cfg"] = _decoder_cfg(model.decoder, model_cfg)
    if "multimodal_cfg" in model_cfg:
        model_cfg = _with_decoder(model_cfg)

    preprocess_cfg = _section(image, "preprocess_cfg")
    if model.decoding is not None:
        preprocess_cfg["decoding"] = plain(model.decoding)
    return model_cfg, preprocess_cfg


def _vision_cfg(image: Plugin, new_projection: bool) -> dict[str, Any]:
    """The image tower's section; features that were the embedding get a layer where a projection is
    asked for.
    """
    section = image.module.vision_cfg(image.options)
    if new_projection and section.get("timm_proj") == "none":
        section = section | {"timm_proj": "linear"}
    return section


def _text_cfg(text: Plugin) -> dict[str, Any]:
    """The text tower's section; the length of a stretched context takes the place of its own."""
    section = text.module.text_cfg(text.options)
    context = text.common.context if text.common is not None else None
    if context is None:
        return section

    if section.get("hf_model_name"):
        raise ValueError(
            f"context stretches the positions of open_clip's text towers, and {text.name!r} has "
            "positions of its own; leave context out, and set context_length"
        )
    return section | {"context_length": context.length}


def _decoder_cfg(options: Decoder, model_cfg: dict[str, Any]) -> dict[str, Any]:
    """The decoder's section; ValueError where the architecture has one."""
    if "multimodal_cfg" in model_cfg:
        raise ValueError(
            "model.decoder describes a text decoder, and the architecture brings one; leave out "
            "model.decoder"
        )
    text = model_cfg["text_cfg"]

    # Where the tower leaves them out, open_clip's defaults are its sizes.
    sizes = {"width": 512, "heads": 8} | {
        key: text[key] for key in ("width", "heads") if key in text
    }
    return sizes | {"heads": options.heads or sizes["heads"], "layers": options.layers}


def _with_decoder(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """The configuration as open_clip's CoCa reads it: towers that hand over their tokens, and a
    decoder of the text tower's context and vocabulary. ValueError for a text tower that cannot have
    one.
    """
    text = model_cfg["text_cfg"]
    if text.get("hf_model_name"):
        raise ValueError(
            "a text decoder (the architecture's, or model.decoder) needs open_clip's causal text "
            "transformer, whose tokens see those before them alone; the text tower is a Hugging "
            "Face model: take the tower transformer, or an architecture without a decoder"
        )
    of_text = {key: text[key] for key in ("context_length", "vocab_size") if key in text}
    return model_cfg | {
        "vision_cfg": model_cfg["vision_cfg"] | {"output_tokens": True},
        "text_cfg": text | {"output_tokens": True},
        "multimodal_cfg": model_cfg["multimodal_cfg"] | of_text,
    }


def image_spec(preprocess_cfg: dict[str, Any], size: int | tuple[int, int]) -> ImageSpec:
    """What pixels the image tower expects. `size` is the built tower's: one number or (height,
    width).
    """
    stated = {
        ours: preprocess_cfg[theirs]
        for ours, theirs in _PIXELS.items()
        if preprocess_cfg.get(theirs) is not None
    }
    if stated.get("resize", "shortest") not in ("shortest", "squash"):
        raise ValueError(
            f"resize_mode {stated['resize']!r} is not supported; expected shortest or squash"
        )

    # Whoever wrote the section, its values are of these types, or every score would be wrong.
    height, width = (size, size) if isinstance(size, int) else size
    spec: ImageSpec = parse(ImageSpec, {"size": [height, width]} | stated, ("preprocess_cfg",))
    if min(spec.std) <= 0:
        raise ValueError(f"preprocess_cfg.std is {spec.std}; expected three positive numbers")
    return spec


# Fields of ImageSpec by open_clip's names; it passes over `decoding`, which is ours.
_PIXELS = {
    "mean": "mean",
    "std": "std",
    "interpolation": "interpolation",
    "resize": "resize_mode",
    "decoding": "decoding",
}


def preprocess_cfg(spec: ImageSpec) -> dict[str, Any]:
    """The inverse of `image_spec`: the section of open_clip_config.json."""
    return {theirs: plain(getattr(spec, ours)) for ours, theirs in _PIXELS.items()}


def trained_on(
    stated: dict[str, Any], configured: dict[str, Any], reference: str
) -> dict[str, Any]:
    """The preprocess_cfg of a tower with weights from `reference`: as those were trained, said
    where the tower differs.
    """
    differing = {
        key: value
        for key, value in stated.items()
        if key in _OF_THE_WEIGHTS and key in configured and configured[key] != value
    }
    if differing:
        alone = {key: configured[key] for key in differing}
        log.warn(
            f"pretrained {reference} was trained on pixels with {differing}, which is taken; the "
            f"image tower alone would have {alone}"
        )

    # How pictures are decoded is a choice, no fact of the weights.
    chosen = {key: value for key, value in configured.items() if key == "decoding"}
    return configured | stated | chosen


_OF_THE_WEIGHTS = ("mean", "std", "interpolation", "resize_mode")


def text_spec(text_cfg: dict[str, Any], context_length: int) -> TextSpec:
    """How captions become ids for this text section; open_clip's defaults are written out here,
    once.
    """
    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    # Anything else would reach transformers, where trust_remote_code runs what a folder brings.
    foreign = sorted(options.keys() - _TOKENIZER_OPTIONS)
    if foreign:
        raise ValueError(
            f"tokenizer_kwargs holds {', '.join(foreign)}; expected only "
            f"{', '.join(sorted(_TOKENIZER_OPTIONS))}"
        )

    name = text_cfg.get("hf_tokenizer_name")
    # open_clip cleans texts for its own tokenizer otherwise than for others.
    clean = options.pop("clean", "whitespace" if name else "lower")
    if text_cfg.get("tokenizer_mode"):
        options["tokenizer_mode"] = text_cfg["tokenizer_mode"]

    return TextSpec(
        tokenizer=name or "clip", context_length=context_length, clean=clean, options=options
    )


_TOKENIZER_OPTIONS = {"clean", "strip_sep_token", "language", "reduction_mask"}
_TOKENIZER_OPTIONS |= {"prompt", "end", "mark"}  # vlp.data.prompted


def _agree(image: Plugin, text: Plugin) -> dict[str, Any]:
    """Both towers' top-level keys. What only the text tower's architecture says about the pair does
    not count.
    """
    ours, theirs = _section(image, "shared_cfg"), _section(text, "shared_cfg")

    for key in ours.keys() & theirs.keys():
        # Of an embedding size, the image tower's counts, unless the model sets its own.
        if ours[key] != theirs[key] and key != "embed_dim":
            raise ValueError(
                f"{key} is {ours[key]!r} for image_tower {image.name!r} and {theirs[key]!r} for "
                f"text_tower {text.name!r}; one model has one {key}: make them equal"
            )

    return theirs | ours


def _section(tower: Plugin, name: str) -> dict[str, Any]:
    function = getattr(tower.module, name, None)  # a tower may leave it out
    return dict(function(tower.options)) if function else {}


def _require(tower: Plugin, function: str, role: str) -> None:
    if not hasattr(tower.module, function):
        raise ValueError(f"{tower.name!r} cannot be the {role}; expected one of {_able(function)}")


def _refuse_one_model(image: Plugin, text: Plugin) -> None:
    """Refuse one model as both towers beside another tower, on either side: its weights would be in
    the model twice, or would be another model's.
    """
    for tower, side in ((image, "image_tower"), (text, "text_tower")):
        if getattr(tower.module, "BOTH_TOWERS", False):
            raise ValueError(
                f"{side} {tower.name!r} is one model for pictures and texts; set image_tower to it "
                "and leave text_tower out (text_tower: null)"
            )


def _able(function: str) -> list[str]:
    modules: list[ModuleType] = [
        plugin.load("vlp.towers", name) for name in plugin.names("vlp.towers")
    ]
    return [module.__name__.rpartition(".")[2] for module in modules if hasattr(module, function)]
