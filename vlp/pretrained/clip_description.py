"""transformers' CLIPModel and SiglipModel as open_clip describes them: the way in of folders with
config.json.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlp import log
from vlp.pretrained.configurations import reason
from vlp.pretrained.folders import listing, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# transformers' name of an activation → open_clip's arguments of it; None: it has no arguments
_GELU = {
    "gelu": None,
    "quick_gelu": None,
    "gelu_pytorch_tanh": {"approximate": "tanh"},
    "gelu_new": {"approximate": "tanh"},
}
# PIL's numbers of filters
_RESAMPLE = {2: "bilinear", 3: "bicubic"}
_VOCABULARY = 49408  # tokens of CLIP's own tokenizer
# Case, accents, entities and digits: where tokenizers differ, one of these shows it.
_PROBES = ["A photo of 2 red Circles, naïve & café!", "two dogs"]
_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")


def describe(folder: Path) -> dict[str, Any]:
    """model_cfg and preprocess_cfg of the CLIPModel or SiglipModel in `folder`; ValueError for any
    other model.
    """
    kind = read_json(folder / "config.json").get("model_type")
    if kind in ("clip", "siglip"):
        try:
            return _described(kind, folder)
        except ValueError:
            raise
        except Exception as error:  # whatever a key of another type or size leads to
            raise ValueError(
                f"{folder} does not describe a model of the type {kind!r} ({reason(error)}); "
                "download it again"
            ) from None
    raise ValueError(
        f"{folder} holds a transformers model of the type {kind!r}; expected 'clip' (CLIPModel) or "
        "'siglip' (SiglipModel). Only `vlp eval` and the data tools take other dual encoders of "
        "transformers"
    )


def _described(kind: str, folder: Path) -> dict[str, Any]:
    from transformers import CLIPConfig, SiglipConfig

    if kind == "clip":
        return {
            "model_cfg": _clip(CLIPConfig.from_pretrained(folder), folder),
            "preprocess_cfg": _pixels(folder, squash=False),
        }
    return {
        "model_cfg": _siglip(SiglipConfig.from_pretrained(folder), folder),
        "preprocess_cfg": _pixels(folder, squash=True),
    }


def _clip(config: PretrainedConfig, folder: Path) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    clip_tokens = _has_clip_tokens(folder, text.vocab_size)

    # open_clip counts heads by their width in the image tower, and by number in the text tower.
    vision_cfg = _blocks(vision) | {
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }
    text_cfg = _blocks(text) | {
        "heads": text.num_attention_heads,
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
    }
    text_cfg |= _pooled_at(text)
    if not clip_tokens:
        text_cfg |= _own_tokenizer(folder)

    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": _quick(vision, text),
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
        "custom_text": True,
    }


def _siglip(config: PretrainedConfig, folder: Path) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    width = getattr(text, "projection_size", None) or text.hidden_size
    if width != vision.hidden_size:
        raise ValueError(
            f"{folder}: the towers give {vision.hidden_size} and {width} features; one space needs "
            "one number"
        )

    # The image tower is timm's, which open_clip finds by name; the text tower is open_clip's own.
    quick_gelu = _quick(text)
    vision_cfg = {
        "image_size": vision.image_size,
        "timm_model_name": _timm_name(vision),
        "timm_pool": "map",
        "timm_proj": "none",
    } | _activation(vision)
    text_cfg = _blocks(text) | {
        "heads": text.num_attention_heads,
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
    }

    return {
        "embed_dim": vision.hidden_size,
        "quick_gelu": quick_gelu,
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg | _own_tokenizer(folder),
        "custom_text": True,
        "init_logit_bias": 0.0,  # the weights bring theirs
    }


def _blocks(tower: PretrainedConfig) -> dict[str, Any]:
    """What both kinds of transformer share."""
    width, inner = tower.hidden_size, tower.intermediate_size
    section = {"width": width, "layers": tower.num_hidden_layers, "mlp_ratio": inner / width}
    # open_clip multiplies and rounds down, which may lose one unit.
    if int(width * section["mlp_ratio"]) != inner:
        section["mlp_ratio"] = (inner + 0.5) / width

    if tower.layer_norm_eps != 1e-5:
        section["norm_kwargs"] = {"eps": tower.layer_norm_eps}
    return section | _activation(tower)


def _activation(tower: PretrainedConfig) -> dict[str, Any]:
    if tower.hidden_act not in _GELU:
        raise ValueError(f"the activation {tower.hidden_act!r} is none of {', '.join(_GELU)}")
    arguments = _GELU[tower.hidden_act]
    return {} if arguments is None else {"act_kwargs": arguments}


def _quick(*towers: PretrainedConfig) -> bool:
    kinds = {tower.hidden_act == "quick_gelu" for tower in towers}
    if len(kinds) > 1:
        raise ValueError(
            "one tower has quick GELU and the other has not; open_clip's models have one for both"
        )
    return kinds.pop()


def _pooled_at(text: PretrainedConfig) -> dict[str, Any]:
    """Where the text's features are read."""
    # 2 is transformers' old default, which it takes for "at the largest id".
    largest = text.eos_token_id in (2, text.vocab_size - 1)
    return {} if largest else {"pool_type": "eos", "eos_id": text.eos_token_id}


def _timm_name(vision: PretrainedConfig) -> str:
    """The timm model of these sizes, which open_clip can only have by name."""
    import timm

    wanted = (
        vision.hidden_size,
        vision.num_hidden_layers,
        vision.num_attention_heads,
        vision.intermediate_size,
        vision.patch_size,
        vision.image_size,
    )
    names = timm.list_models(f"*_siglip_{vision.image_size}")
    for name in names:
        # On meta: sizes are known without a byte of weights.
        with torch.device("meta"):
            model: Any = timm.create_model(name, num_classes=0, global_pool="map")

        block = model.blocks[0]
        sizes = (
            model.embed_dim,
            len(model.blocks),
            block.attn.num_heads,
            block.mlp.fc1.out_features,
            model.patch_embed.patch_size[0],
            model.patch_embed.img_size[0],
        )
        if sizes == wanted:
            return name

    tried = ", ".join(names) or f"none: it has none of {vision.image_size} pixels"
    raise ValueError(
        f"timm has no SigLIP tower of width, layers, heads, MLP, patch and pixels {wanted}; tried "
        f"{tried}"
    )


@cache
def _has_clip_tokens(folder: Path, vocab_size: int) -> bool:
    """Whether the folder's tokenizer, if it has one, makes the ids of CLIP's own vocabulary."""
    if not _has_tokenizer(folder):
        if vocab_size != _VOCABULARY:
            raise ValueError(
                f"{folder} has {vocab_size} tokens and no tokenizer; it holds {listing(folder)}: "
                "add tokenizer.json"
            )
        return True

    if vocab_size != _VOCABULARY:
        return False
    import open_clip
    from transformers import AutoTokenizer

    # The files may differ in form and still make the same ids, so both are asked.
    ours = open_clip.SimpleTokenizer()
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    expected = [[ours.sot_token_id, *ours.encode(probe), ours.eot_token_id] for probe in _PROBES]
    return [theirs(probe).input_ids for probe in _PROBES] == expected


def _own_tokenizer(folder: Path) -> dict[str, Any]:
    if not _has_tokenizer(folder):
        raise ValueError(
            f"{folder} has no tokenizer; it holds {listing(folder)}: add tokenizer.json"
        )
    return {"hf_tokenizer_name": str(folder), "tokenizer_kwargs": {"clean": "whitespace"}}


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZERS)


def _pixels(folder: Path, squash: bool) -> dict[str, Any]:
    """preprocess_cfg by the folder's image processor; where it has none, what the model's class has
    by default.
    """
    stated = _image_processor(folder)
    size = stated.get("size", {} if squash else {"shortest_edge": 0})
    shortest = isinstance(size, int) or "shortest_edge" in size

    section = _normalisation(stated, squash)
    section["resize_mode"] = "shortest" if shortest else "squash"
    section["interpolation"] = _interpolation(stated, folder)

    # Other models crop away a margin that vlp keeps: said, because scores may differ by it.
    edge = size["shortest_edge"] if isinstance(size, dict) and shortest else 0
    crop = stated.get("crop_size")
    height = crop.get("height") if isinstance(crop, dict) else crop
    if edge and height and edge != height:
        log.warn(
            f"{folder} resizes to {edge} and crops to {height} pixels; vlp resizes to {height}, "
            "so its pictures show more"
        )
    return section


def _interpolation(stated: dict[str, Any], folder: Path) -> str:
    number = stated.get("resample", 3)
    if number not in _RESAMPLE:
        log.warn(
            f"{folder} resizes pictures by PIL's filter {number}; vlp has bilinear (2) and bicubic "
            "(3), and takes bicubic"
        )
    return _RESAMPLE.get(number, "bicubic")


def _image_processor(folder: Path) -> dict[str, Any]:
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").is_file():
        return read_json(folder / "processor_config.json").get("image_processor", {})
    log.warn(
        f"{folder} does not say how its pixels were normalised; taking the default of its kind"
    )
    return {}


def _normalisation(stated: dict[str, Any], squash: bool) -> dict[str, Any]:
    """Mean and deviation of the channels; {} where CLIP's own hold."""
    if stated.get("do_normalize", True) is False:
        return {"mean": [0.0] * 3, "std": [1.0] * 3}

    section = {"mean": [0.5] * 3, "std": [0.5] * 3} if squash else {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in stated:
            section[ours] = stated[theirs]
    return section
