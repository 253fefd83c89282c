"""A DualEncoder as transformers' SiglipModel and SiglipProcessor (Zhai et al. 2023): whether it can
be said so, and how.

That is a timm vision transformer pooled by attention, without class token and projection, beside
open_clip's text transformer without causal mask, pooled at the last token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlp.export.clip_form import image_settings, sections, text_trunk, tower_config
from vlp.models.dual_encoder import DualEncoder
from vlp.pretrained import places
from vlp.pretrained.clip_layout import TIMM

if TYPE_CHECKING:
    from transformers import SiglipModel, SiglipProcessor

# What SiglipModel cannot vary in its text tower.
_TEXT = {
    "hf_model_name": None,
    "embed_cls": False,
    "no_causal_mask": True,
    "pool_type": "last",
    "proj_type": "linear",
    "ls_init_value": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}


def obstacles(model: DualEncoder) -> list[str]:
    """Why `model` is no SiglipModel, one reason a line; empty where it is one."""
    from timm.models.vision_transformer import VisionTransformer

    _, text = sections(model)
    unlike = {key: value for key, value in _TEXT.items() if getattr(text, key) != value}
    reasons = [
        f"text_cfg.{key} is set" if value is None else f"text_cfg.{key} is not {value!r}"
        for key, value in unlike.items()
    ]
    if not text.hf_tokenizer_name:
        reasons.append(
            "it reads CLIP's tokens, which have no padding id of their own for SiglipModel to pool "
            "at"
        )

    # Of another image tower nothing more can be said.
    trunk = getattr(model.visual, "trunk", None)
    if not isinstance(trunk, VisionTransformer) or trunk.attn_pool is None or model.visual.head:
        reasons.append(
            "its image tower is no timm vision transformer pooled by attention, without projection"
        )
        return reasons

    parts = {key.partition(".")[0] for key in trunk.state_dict()}
    if parts != {"pos_embed", "patch_embed", "blocks", "norm", "attn_pool"}:
        reasons.append(f"its vision transformer is made of {sorted(parts)}")
    if model.image_spec.size[0] != model.image_spec.size[1]:
        reasons.append(f"the image size {model.image_spec.size} is not square")
    return reasons


def network(model: DualEncoder, weights: Mapping[str, Tensor]) -> SiglipModel:
    """The SiglipModel with `weights`, which bear open_clip's names."""
    from transformers import SiglipConfig, SiglipModel

    _, text = sections(model)
    # Sizes come from the built tower: timm's name alone does not say them.
    trunk = model.visual.trunk
    block = trunk.blocks[0]

    # The towers may differ in their GELU: timm has no quick one.
    image_tanh = getattr(block.mlp.act, "approximate", "none") == "tanh"
    text_activation = "gelu_pytorch_tanh" if text.act_kwargs else "gelu"
    if model.open_clip_config.get("quick_gelu", False):
        text_activation = "quick_gelu"

    vision_config = {
        "hidden_size": trunk.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "layer_norm_eps": trunk.norm.eps,
        "image_size": model.image_spec.size[0],
        "patch_size": trunk.patch_embed.patch_size[0],
        "hidden_act": "gelu_pytorch_tanh" if image_tanh else "gelu",
    }
    text_config = tower_config(text, text.heads) | {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "projection_size": model.embed_dim,
        "hidden_act": text_activation,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }

    settings = SiglipConfig(vision_config=vision_config, text_config=text_config)
    siglip = SiglipModel(settings).eval()
    renamed = {**dict(_vision(weights)), **dict(_text(weights)), **dict(_logits(weights))}
    siglip.load_state_dict(renamed)
    return siglip


def processor(model: DualEncoder) -> SiglipProcessor:
    """The model's own tokenizer and an image processor."""
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        SiglipImageProcessor,
        SiglipProcessor,
    )

    # Padding was attended to in training, so the tokenizer gives no attention mask.
    tokenizer = AutoTokenizer.from_pretrained(
        places.locate(model.text_spec.tokenizer),
        trust_remote_code=False,
        model_max_length=model.text_spec.context_length,
        model_input_names=["input_ids"],
    )

    # SigLIP's own image processor cannot crop.
    settings = image_settings(model)
    if settings["do_center_crop"]:
        return SiglipProcessor(CLIPImageProcessor(**settings), tokenizer)
    del settings["do_center_crop"], settings["crop_size"]
    return SiglipProcessor(SiglipImageProcessor(**settings), tokenizer)


def _logits(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Scale and bias in SiglipModel's shape [1]; it always has a bias, which may be zero."""
    yield "logit_scale", weights["logit_scale"].reshape(1)
    bias = weights["logit_bias"] if "logit_bias" in weights else torch.zeros(1)
    yield "logit_bias", bias.reshape(1)


def _text(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    # open_clip keeps a bare matrix, transposed, where the projection has no bias.
    if "text.text_projection" in weights:
        projection = weights["text.text_projection"].T
        yield "text_model.head.weight", projection
        yield "text_model.head.bias", torch.zeros(len(projection))
    else:
        yield "text_model.head.weight", weights["text.text_projection.weight"]
        yield "text_model.head.bias", weights["text.text_projection.bias"]
    yield from text_trunk(weights)


def _vision(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    prefix = "visual.trunk."
    trunk = {
        key.removeprefix(prefix): tensor
        for key, tensor in weights.items()
        if key.startswith(prefix)
    }

    # The pooling's projection comes in two parts in timm and is joint in transformers.
    for kind in ("weight", "bias"):
        joint = torch.cat([trunk.pop(f"attn_pool.{part}.{kind}") for part in ("q", "kv")])
        yield f"vision_model.head.attention.in_proj_{kind}", joint

    for key, tensor in trunk.items():
        layer, part = "", key
        if key.startswith("blocks."):
            _, number, part = key.split(".", 2)
            layer = f"encoder.layers.{number}."
        module, _, kind = part.rpartition(".")

        if module == "attn.qkv":
            for letter, projection in zip("qkv", tensor.chunk(3)):
                yield f"vision_model.{layer}self_attn.{letter}_proj.{kind}", projection
        elif part == "pos_embed":
            yield f"vision_model.{TIMM[part]}", tensor.squeeze(0)
        elif part == "attn_pool.latent":
            yield f"vision_model.{TIMM[part]}", tensor
        else:
            yield f"vision_model.{layer}{TIMM[module]}.{kind}", tensor
