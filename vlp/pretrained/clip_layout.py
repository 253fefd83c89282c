"""transformers' CLIPModel and SiglipModel as open_clip describes and names them: the way in of
folders with config.json.

`vlp.export.clip_form` and `vlp.export.siglip_form` are the way out; both directions share the
tables of names below.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlp import log
from vlp.pretrained.references import listing, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# open_clip's name → transformers' name
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
CLIP_VISION = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
TIMM = {  # timm's vision transformer pooled by attention
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "attn_pool.latent": "head.probe",
    "attn_pool.proj": "head.attention.out_proj",
    "attn_pool.norm": "head.layernorm",
    "attn_pool.mlp.fc1": "head.mlp.fc1",
    "attn_pool.mlp.fc2": "head.mlp.fc2",
}

_GELU = {
    "gelu": None,
    "quick_gelu": None,
    "gelu_pytorch_tanh": {"approximate": "tanh"},
    "gelu_new": {"approximate": "tanh"},
}
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_PROBES = ["A photo of 2 red Circles, naïve & café!", "two dogs"]


# ---- the description


def describe(folder: Path) -> dict[str, Any]:
    """model_cfg and preprocess_cfg of the CLIPModel or SiglipModel in `folder`; ValueError for any
    other model.
    """
    from transformers import CLIPConfig, SiglipConfig

    kind = read_json(folder / "config.json").get("model_type")
    if kind == "clip":
        return {
            "model_cfg": _clip(CLIPConfig.from_pretrained(folder), folder),
            "preprocess_cfg": _pixels(folder, squash=False),
        }
    if kind == "siglip":
        return {
            "model_cfg": _siglip(SiglipConfig.from_pretrained(folder), folder),
            "preprocess_cfg": _pixels(folder, squash=True),
        }
    raise ValueError(
        f"{folder} holds a transformers model of the type {kind!r}; expected 'clip' (CLIPModel) or 'siglip' (SiglipModel). "
        f"Only `vlp eval` and the data tools take other dual encoders of transformers"
    )


def _clip(config: PretrainedConfig, folder: Path) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    clip_tokens = _has_clip_tokens(folder, text.vocab_size)
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": _quick(vision, text),
        "vision_cfg": _blocks(vision)
        | {
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        "text_cfg": _blocks(text)
        | {
            "heads": text.num_attention_heads,
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
        }
        | _pooled_at(text)
        | ({} if clip_tokens else _own_tokenizer(folder)),
        "custom_text": True,
    }


def _siglip(config: PretrainedConfig, folder: Path) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    width = getattr(text, "projection_size", None) or text.hidden_size
    if width != vision.hidden_size:
        raise ValueError(
            f"{folder}: the towers give {vision.hidden_size} and {width} features; one space needs one number"
        )
    return {
        "embed_dim": vision.hidden_size,
        "quick_gelu": _quick(text),
        "vision_cfg": {
            "image_size": vision.image_size,
            "timm_model_name": _timm_name(vision),
            "timm_pool": "map",
            "timm_proj": "none",
        }
        | _activation(vision),
        "text_cfg": _blocks(text)
        | {
            "heads": text.num_attention_heads,
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        }
        | _own_tokenizer(folder),
        "custom_text": True,
        "init_logit_bias": 0.0,  # the weights bring theirs
    }


def _blocks(tower: PretrainedConfig) -> dict[str, Any]:
    """What both kinds of transformer share."""
    width, inner = tower.hidden_size, tower.intermediate_size
    section = {"width": width, "layers": tower.num_hidden_layers, "mlp_ratio": inner / width}
    if int(width * section["mlp_ratio"]) != inner:  # open_clip rounds the product down
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
    """Where the text's features are read. transformers takes 2, an old default, for 'at the largest
    id'.
    """
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
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0, global_pool="map")
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
    raise ValueError(
        f"timm has no SigLIP tower of width, layers, heads, MLP, patch and pixels {wanted}; tried "
        f"{', '.join(names) or f'none: it has none of {vision.image_size} pixels'}"
    )


@cache
def _has_clip_tokens(folder: Path, vocab_size: int) -> bool:
    """Whether the folder's tokenizer, if it has one, makes the ids of CLIP's own vocabulary."""
    if not _has_tokenizer(folder):
        if vocab_size != 49408:
            raise ValueError(
                f"{folder} has {vocab_size} tokens and no tokenizer; it holds {listing(folder)}: add tokenizer.json"
            )
        return True
    if vocab_size != 49408:
        return False
    import open_clip
    from transformers import AutoTokenizer

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
    return any(
        (folder / name).is_file()
        for name in ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")
    )


def _pixels(folder: Path, squash: bool) -> dict[str, Any]:
    """preprocess_cfg by the folder's image processor; where it has none, what the model's class has
    by default.
    """
    if (folder / "preprocessor_config.json").is_file():
        stated = read_json(folder / "preprocessor_config.json")
    elif (folder / "processor_config.json").is_file():
        stated = read_json(folder / "processor_config.json").get("image_processor", {})
    else:
        log.warn(
            f"{folder} does not say how its pixels were normalised; taking the default of its kind"
        )
        stated = {}
    usual = {"mean": [0.5] * 3, "std": [0.5] * 3} if squash else {}
    section = usual | {
        ours: stated[theirs]
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))
        if theirs in stated
    }
    if stated.get("do_normalize", True) is False:
        section = {"mean": [0.0] * 3, "std": [1.0] * 3}

    size = stated.get("size", {} if squash else {"shortest_edge": 0})
    shortest = isinstance(size, int) or "shortest_edge" in size
    section["resize_mode"] = "shortest" if shortest else "squash"
    section["interpolation"] = _RESAMPLE.get(stated.get("resample", 3), "bicubic")
    edge, crop = (
        size["shortest_edge"] if isinstance(size, dict) and shortest else 0,
        stated.get("crop_size"),
    )
    height = crop.get("height") if isinstance(crop, dict) else crop
    if edge and height and edge != height:
        log.warn(
            f"{folder} resizes to {edge} and crops to {height} pixels; vlp resizes to {height}, so its pictures show more"
        )
    return section


# ---- the weights


def is_theirs(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a CLIPModel or SiglipModel."""
    return "text_model.embeddings.token_embedding.weight" in weights


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a CLIPModel or SiglipModel under open_clip's names (CustomTextCLIP), as far as
    they are known.
    """
    rest = {key: value for key, value in weights.items() if not key.endswith("position_ids")}
    result = {}
    for name in ("logit_scale", "logit_bias"):
        if name in rest:
            result[name] = rest.pop(name).reshape(())
    if "visual_projection.weight" in rest:
        result["visual.proj"] = rest.pop("visual_projection.weight").T
    if "text_projection.weight" in rest:
        result["text.text_projection"] = rest.pop("text_projection.weight").T
    for kind in ("weight", "bias"):
        if f"text_model.head.{kind}" in rest:
            result[f"text.text_projection.{kind}"] = rest.pop(f"text_model.head.{kind}")

    siglip = "vision_model.head.probe" in rest
    result |= _side(rest, "text_model.", "text.", TEXT, "transformer.resblocks.")
    if siglip:
        result |= _timm_trunk(rest)
    else:
        result |= _side(rest, "vision_model.", "visual.", CLIP_VISION, "transformer.resblocks.")
    return result | rest  # what is left is named in the error about what does not fit


def _side(
    rest: dict[str, Tensor], theirs: str, ours: str, names: Mapping[str, str], blocks: str
) -> dict[str, Tensor]:
    """One tower of CLIP's kind; takes what it knows out of `rest`."""
    result = {
        ours + name: rest.pop(theirs + other)
        for name, other in names.items()
        if theirs + other in rest
    }
    modules = {other: name for name, other in LAYER.items()}
    return result | _layers(
        rest, f"{theirs}encoder.layers.", f"{ours}{blocks}", modules, "attn.in_proj_"
    )


def _timm_trunk(rest: dict[str, Tensor]) -> dict[str, Tensor]:
    """SigLIP's image tower under the names of timm's vision transformer; takes what it knows out of
    `rest`.
    """
    theirs, ours, result = "vision_model.", "visual.trunk.", {}
    for kind in ("weight", "bias"):  # one joint projection in transformers, two in timm
        joint = rest.pop(f"{theirs}head.attention.in_proj_{kind}", None)
        if joint is not None:
            width = len(joint) // 3
            result[f"{ours}attn_pool.q.{kind}"], result[f"{ours}attn_pool.kv.{kind}"] = joint.split(
                [width, 2 * width]
            )
    modules = {other: name for name, other in TIMM.items()}
    result |= _layers(rest, f"{theirs}encoder.layers.", f"{ours}blocks.", modules, "attn.qkv.")
    for key in [key for key in rest if key.startswith(theirs)]:
        whole = key.removeprefix(theirs)
        module, _, kind = whole.rpartition(".")
        if whole == TIMM["pos_embed"]:
            result[f"{ours}pos_embed"] = rest.pop(key).unsqueeze(0)
        elif whole == TIMM["attn_pool.latent"]:
            result[f"{ours}attn_pool.latent"] = rest.pop(key)
        elif module in modules:
            result[f"{ours}{modules[module]}.{kind}"] = rest.pop(key)
    return result


def _layers(
    rest: dict[str, Tensor], theirs: str, ours: str, modules: Mapping[str, str], joint: str
) -> dict[str, Tensor]:
    """Residual attention blocks; three projections become the joint one called `joint`."""
    result: dict[str, Tensor] = {}
    for key in [key for key in rest if key.startswith(theirs)]:
        number, part = key.removeprefix(theirs).split(".", 1)
        module, _, kind = part.rpartition(".")
        if module in modules:
            result[f"{ours}{number}.{modules[module]}.{kind}"] = rest.pop(key)
        elif module == "self_attn.q_proj":
            parts = [f"{theirs}{number}.self_attn.{letter}_proj.{kind}" for letter in "qkv"]
            if all(part in rest for part in parts):
                result[f"{ours}{number}.{joint}{kind}"] = torch.cat(
                    [rest.pop(part) for part in parts]
                )
    return result
