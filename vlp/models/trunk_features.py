"""The pooled features of an image tower before its projection into the shared space."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from vlp.models.tokens import places


class Passed(NamedTuple):
    """What a tower made of its inputs."""

    features: Tensor  # [rows, D], in the shared space
    tokens: Tensor | None = None  # [rows, patches, width], where a head reads them
    trunk: Tensor | None = None  # [rows, width], where a head reads them


def check(visual: nn.Module) -> None:
    """Raise ValueError for a tower whose features before the projection are not known."""
    if isinstance(visual, VisionTransformer):
        return
    kind = type(visual).__name__
    if isinstance(visual, TimmModel):
        if not hasattr(visual.head, "pool"):
            return
        kind = "timm trunk under open_clip's attention pool"
    raise ValueError(
        f"model.heads.concepts_of: trunk needs the features before the projection, found a {kind}; "
        "take a vision transformer or a tower of timm, or concepts_of: embedding"
    )


def width(visual: nn.Module) -> int:
    """The size of those features."""
    check(visual)
    if isinstance(visual, VisionTransformer):
        return visual.proj.shape[0]
    trunk: Any = visual.trunk
    return int(getattr(trunk, "head_hidden_size", None) or trunk.num_features)


def with_trunk(visual: Any, pixels: Tensor, wants_tokens: bool = False) -> Passed:
    """A tower's forward pass, step by step, with what its projection reads."""
    if isinstance(visual, VisionTransformer):
        x = visual.transformer(visual._embeds(pixels))
        trunk, tokens = visual._pool(x)
        has_tokens = visual.output_tokens or wants_tokens
        return Passed(trunk @ visual.proj, tokens if has_tokens else None, trunk)

    # timm's classifier is the projection where open_clip added none, and else the identity.
    x = visual.trunk.forward_features(pixels)
    trunk = visual.trunk.forward_head(x, pre_logits=True)
    features = visual.head(visual.trunk.get_classifier()(trunk))
    return Passed(features, places(visual.trunk, x) if wants_tokens else None, trunk)


@torch.no_grad()
def classifier(visual: Any, layer: nn.Linear, of: str) -> tuple[Tensor, Tensor]:
    """Weight [M, width] and bias [M] of the head for concepts as a layer over the trunk's features:
    the head itself, or, where it reads the embedding, the head after the projection.

    Raises ValueError where the projection is no linear layer.
    """
    weight, bias = layer.weight.detach(), layer.bias.detach()
    if of == "trunk":
        return weight, bias

    for matrix, offset in reversed(_linear_parts(visual)):
        if offset is not None:
            bias = bias + weight @ offset
        weight = weight @ matrix
    return weight, bias


def _linear_parts(visual: Any) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of each linear layer between the trunk's features and the embedding."""
    if isinstance(visual, VisionTransformer):
        return [(visual.proj.T, None)]

    parts: list[tuple[Tensor, Tensor | None]] = []
    for module in (visual.trunk.get_classifier(), *visual.head.modules()):
        if isinstance(module, nn.Linear):
            parts.append((module.weight, module.bias))
        elif not isinstance(module, nn.Sequential | nn.Identity | nn.Dropout):
            raise ValueError(
                f"the projection holds a {type(module).__name__}, and is no linear layer that the "
                "classifier could take in; train with model.heads.concepts_of: trunk"
            )
    return parts
