"""What the towers make of a batch, in one call of the model."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from vlp.types import Batch

IMAGES = (
    "image",
    "negative_image",
)  # Batch fields that the image tower embeds: [b, 3, H, W] -> [b, D]
TEXTS = (
    "text",
    "negatives",
    "counterfactual",
)  # Batch fields that the text tower embeds: [b, …, L] -> [b, …, D]
VALID = {
    "negatives": "negatives_valid",
    "counterfactual": "counterfactual_valid",
}  # masks [b, K] and [b] of texts
VIEWS = (
    "image_views",
    "text_views",
)  # Batch fields of further views: [b, V, …] -> [b, V, D] by the head for views


def embed(model: nn.Module, batch: Batch, wanted: Collection[str]) -> dict[str, Tensor]:
    """What is wanted of a batch, by one call of `model`: a DualEncoder or what an engine wrapped
    around one.

    Returns the wanted fields of IMAGES, TEXTS and views by name, [b, …, D], the wanted outputs of
    heads, [b, …], and "scale", "bias" and "view_scale" as far as the model has them, []. Texts that
    VALID masks do not pass the tower; their embeddings are zeros.
    """
    pixels = {name: getattr(batch, name) for name in IMAGES if name in wanted}
    ids = {name: getattr(batch, name) for name in TEXTS if name in wanted}
    masks = {name: getattr(batch, mask) for name, mask in VALID.items() if name in ids}
    texts = {
        name: (value[masks[name]] if name in masks else value).flatten(0, -2)
        for name, value in ids.items()
    }
    views = {name: getattr(batch, name) for name in VIEWS if name in wanted}
    pairs = {"pairs": len(batch)} if {"concept_logits", "caption_logits"} & set(wanted) else {}
    features = model(
        torch.cat(list(pixels.values())) if pixels else None,
        torch.cat(list(texts.values())) if texts else None,
        **{name: value.flatten(0, 1) for name, value in views.items()},
        **pairs,
    )
    result = {
        name: getattr(features, name).unflatten(0, value.shape[:2]) for name, value in views.items()
    }
    for fields, found in ((pixels, features.image), (texts, features.text)):
        if fields:
            result |= zip(fields, found.split([len(value) for value in fields.values()]))
    for name, mask in masks.items():
        whole = result[name].new_zeros(*ids[name].shape[:-1], result[name].shape[-1])
        whole[mask] = result[name].view_as(whole[mask])
        result[name] = whole
    others = {"concept_logits": features.concept_logits, "caption_nll": features.caption_nll}
    scalars = {name: getattr(features, name) for name in ("scale", "bias", "view_scale")}
    return result | {name: value for name, value in (others | scalars).items() if value is not None}
