"""A DualEncoder as transformers' CLIPModel and CLIPProcessor: whether it is one, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import open_clip
from torch import Tensor

from vlp.models.dual_encoder import DualEncoder
from vlp.pretrained.clip_layout import CLIP_VISION, LAYER, TEXT

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPVisionConfig

# Ids of CLIP's special tokens; transformers pools at END, the largest id, as open_clip does.
BEGIN, END = 49406, 49407

# What CLIPModel cannot vary, per section of open_clip's configuration. Everything else maps onto a
# field of CLIPConfig.
_BLOCKS = {
    "ls_init_value": None,
    "act_kwargs": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
# A value that differs means a computation that CLIPModel does not have.
_VISION = _BLOCKS | {
    "timm_model_name": None,
    "attentional_pool": False,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "pool_type": "tok",
}
_TEXT = _BLOCKS | {
    "hf_model_name": None,
    "hf_tokenizer_name": None,
    "embed_cls": False,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "proj_bias": False,
    "proj_type": "linear",
    "vocab_size": END + 1,
}


def obstacles(model: DualEncoder) -> list[str]:
    """Why `model` is no CLIPModel, one reason a line; empty where it is one."""
    return [*image_obstacles(model), *text_obstacles(model)]


def image_obstacles(model: DualEncoder) -> list[str]:
    """Why the image tower is not CLIPModel's."""
    vision, _ = sections(model)
    reasons = list(_unlike("vision_cfg", vision, _VISION))
    if isinstance(vision.layers, (list, tuple)):
        reasons.append("the image tower is a ResNet")
    if model.image_spec.size[0] != model.image_spec.size[1]:
        reasons.append(f"the image size {model.image_spec.size} is not square")
    return reasons


def text_obstacles(model: DualEncoder) -> list[str]:
    """Why the text tower is not CLIPModel's."""
    _, text = sections(model)
    reasons = list(_unlike("text_cfg", text, _TEXT))

    # open_clip's tokenizer can clean in other ways than CLIP's own.
    clean, options = model.text_spec.clean, model.text_spec.options
    other_cleaning = clean != "lower" or set(options) - {"reduction_mask"}
    if not text.hf_tokenizer_name and other_cleaning:
        reasons.append(
            f"captions are cleaned by {clean!r} {options}, CLIPTokenizer only lower-cases"
        )
    return reasons


def network(model: DualEncoder, weights: Mapping[str, Tensor]) -> CLIPModel:
    """The CLIPModel with `weights`, which bear open_clip's names."""
    from transformers import CLIPConfig, CLIPModel

    settings = CLIPConfig(
        projection_dim=model.embed_dim,
        vision_config=image_config(model).to_dict(),
        text_config=text_config(model).to_dict(),
    )
    clip = CLIPModel(settings).eval()
    renamed = {
        "visual_projection.weight": weights["visual.proj"].T,
        "text_projection.weight": weights["text.text_projection"].T,
        "logit_scale": weights["logit_scale"],
    }
    clip.load_state_dict(renamed | dict(image_trunk(weights)) | dict(text_trunk(weights)))
    return clip


def image_config(model: DualEncoder) -> CLIPVisionConfig:
    """The image tower in transformers' terms; sizes come from open_clip's sections, so that its
    defaults are filled in.
    """
    from transformers import CLIPVisionConfig

    vision, _ = sections(model)
    return CLIPVisionConfig(
        **tower_config(vision, vision.width // vision.head_width),
        **_both(model),
        image_size=model.image_spec.size[0],
        patch_size=vision.patch_size,
    )


def text_config(model: DualEncoder) -> CLIPTextConfig:
    """The text tower in transformers' terms."""
    from transformers import CLIPTextConfig

    _, text = sections(model)
    return CLIPTextConfig(
        **tower_config(text, text.heads),
        **_both(model),
        vocab_size=text.vocab_size,
        max_position_embeddings=text.context_length,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=END,
    )


def _both(model: DualEncoder) -> dict[str, Any]:
    quick = model.open_clip_config.get("quick_gelu", False)
    return {"projection_dim": model.embed_dim, "hidden_act": "quick_gelu" if quick else "gelu"}


def processor(model: DualEncoder) -> CLIPProcessor:
    """Tokenizer and image processor; the vocabulary is the one that open_clip carries, so nothing
    is downloaded.
    """
    from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

    # The two special tokens have other spellings there.
    ours = open_clip.SimpleTokenizer()
    vocabulary = {ours.decoder[i]: i for i in range(BEGIN)}
    vocabulary |= {"<|startoftext|>": BEGIN, "<|endoftext|>": END}
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=list(ours.bpe_ranks),
        model_max_length=model.text_spec.context_length,
    )
    return CLIPProcessor(CLIPImageProcessor(**image_settings(model)), tokenizer)


def image_settings(model: DualEncoder) -> dict[str, Any]:
    """Arguments of a transformers image processor for the model's pixels."""
    spec = model.image_spec
    size = {"height": spec.size[0], "width": spec.size[1]}
    cropped = spec.resize == "shortest"
    return {
        "size": {"shortest_edge": min(spec.size)} if cropped else size,
        "do_center_crop": cropped,
        "crop_size": size,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "resample": {"bilinear": 2, "bicubic": 3}[spec.interpolation],  # PIL's numbers
    }


def sections(model: DualEncoder) -> tuple[open_clip.CLIPVisionCfg, open_clip.CLIPTextCfg]:
    """Both tower sections with open_clip's defaults filled in."""
    config = model.open_clip_config
    vision = open_clip.CLIPVisionCfg(**config["vision_cfg"])
    return vision, open_clip.CLIPTextCfg(**config["text_cfg"])


def tower_config(
    section: open_clip.CLIPVisionCfg | open_clip.CLIPTextCfg, heads: int
) -> dict[str, Any]:
    """The fields that transformers' towers share."""
    norm = section.norm_kwargs or {}
    return {
        "hidden_size": section.width,
        "intermediate_size": int(section.width * section.mlp_ratio),
        "num_hidden_layers": section.layers,
        "num_attention_heads": heads,
        "layer_norm_eps": norm.get("eps", 1e-5),  # torch's own where open_clip says nothing
    }


def _unlike(name: str, section: Any, required: Mapping[str, Any]) -> Iterator[str]:
    for key, required_value in required.items():
        value = getattr(section, key)
        if value == required_value:
            continue

        # What is None by rights is a name or a folder when it is not: naming it would put paths
        # into public notes.
        if required_value is None:
            yield f"{name}.{key} is set"
        else:
            yield f"{name}.{key} is {value!r}, and CLIPModel knows only {required_value!r}"

    if section.block_type not in (None, "default"):
        yield f"{name}.block_type is {section.block_type!r}"
    if set(section.norm_kwargs or {}) - {"eps"}:
        yield f"{name}.norm_kwargs is {section.norm_kwargs!r}, and CLIPModel knows only eps"


def image_trunk(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """open_clip's VisionTransformer without its projection, under CLIPVisionModel's names."""
    for ours, theirs in CLIP_VISION.items():
        yield f"vision_model.{theirs}", weights[f"visual.{ours}"]
    yield from layers(weights, "visual.transformer.resblocks.", "vision_model.encoder.layers.")


def text_trunk(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """open_clip's TextTransformer without its projection, under the names of CLIPTextModel and
    SiglipTextModel.
    """
    for ours, theirs in TEXT.items():
        yield f"text_model.{theirs}", weights[f"text.{ours}"]
    yield from layers(weights, "text.transformer.resblocks.", "text_model.encoder.layers.")


def layers(weights: Mapping[str, Tensor], source: str, target: str) -> Iterator[tuple[str, Tensor]]:
    """Residual attention blocks under transformers' names; the joint q, k, v projection becomes
    three.
    """
    for key, tensor in weights.items():
        if not key.startswith(source):
            continue

        number, part = key.removeprefix(source).split(".", 1)
        if part.startswith("attn.in_proj_"):
            kind = part.removeprefix("attn.in_proj_")
            for letter, projection in zip("qkv", tensor.chunk(3)):
                yield f"{target}{number}.self_attn.{letter}_proj.{kind}", projection
        else:
            module, _, kind = part.rpartition(".")
            yield f"{target}{number}.{LAYER[module]}.{kind}", tensor
