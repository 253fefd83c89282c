"""transformers' CLIPModel and SiglipModel under open_clip's names: the way in of their weights.

`vlp.pretrained.clip_description` reads their configuration. `vlp.export.clip_form` and
`vlp.export.siglip_form` are the way out; both directions share the tables of names below.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# open_clip's name → transformers' name
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# The towers outside their blocks: open_clip's name → transformers' ("layrnorm" is theirs).
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
# timm's vision transformer pooled by attention → SigLIP's
TIMM = {
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


def is_theirs(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a CLIPModel or SiglipModel."""
    return "text_model.embeddings.token_embedding.weight" in weights


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a CLIPModel or SiglipModel under open_clip's names (CustomTextCLIP), as far as
    they are known.
    """
    rest = {key: value for key, value in weights.items() if not key.endswith("position_ids")}
    result: dict[str, Tensor] = {}

    # What lies above the towers: scale, bias and projections, transposed as open_clip keeps them.
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

    # The towers; only SigLIP's pools by attention, with a probe.
    siglip = "vision_model.head.probe" in rest
    result |= _side(rest, "text_model.", "text.", TEXT, "transformer.resblocks.")
    if siglip:
        result |= _timm_trunk(rest)
    else:
        result |= _side(rest, "vision_model.", "visual.", CLIP_VISION, "transformer.resblocks.")

    # What is left keeps its name, and the error about what does not fit says it.
    return result | rest


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
    source, target = f"{theirs}encoder.layers.", f"{ours}{blocks}"
    return result | _layers(rest, source, target, modules, "attn.in_proj_")


def _timm_trunk(rest: dict[str, Tensor]) -> dict[str, Tensor]:
    """SigLIP's image tower under the names of timm's vision transformer; takes what it knows out of
    `rest`.
    """
    theirs, ours = "vision_model.", "visual.trunk."
    result: dict[str, Tensor] = {}

    # The pooling's projection is joint in transformers and comes in two parts in timm.
    for kind in ("weight", "bias"):
        joint = rest.pop(f"{theirs}head.attention.in_proj_{kind}", None)
        if joint is not None:
            width = len(joint) // 3
            query, key_value = joint.split([width, 2 * width])
            result[f"{ours}attn_pool.q.{kind}"] = query
            result[f"{ours}attn_pool.kv.{kind}"] = key_value

    modules = {other: name for name, other in TIMM.items()}
    result |= _layers(rest, f"{theirs}encoder.layers.", f"{ours}blocks.", modules, "attn.qkv.")

    # What lies outside the blocks: positions without the batch axis, the probe, patches, norms.
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

        # The key's and the value's projections wait for the query's, and go with it.
        elif module == "self_attn.q_proj":
            names = [f"{theirs}{number}.self_attn.{letter}_proj.{kind}" for letter in "qkv"]
            if all(name in rest for name in names):
                projections = [rest.pop(name) for name in names]
                result[f"{ours}{number}.{joint}{kind}"] = torch.cat(projections)

    return result
