"""Which parameters of a dual encoder learn: locked towers, adapters, projections that are new."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from vlp.models import lora
from vlp.models.layer_groups import locked_parameters, trunk_of
from vlp.pretrained import projections

if TYPE_CHECKING:
    from vlp.models.dual_encoder import DualEncoder


def lock(encoder: DualEncoder, *, image: int | None = None, text: int | None = None) -> None:
    """Freeze towers but for so many of their last layer groups (vlp.models.layer_groups); None:
    a tower is not frozen.

    LiT (Zhai et al. 2022): no gradients, and evaluation mode even while training, so that batch
    statistics stay. Of a timm or Hugging Face tower the trunk is locked and the projection
    learns; a new projection of any other tower is opened by `unlock_projections`.
    """
    encoder.locked = []
    towers = {"image_tower": (encoder.visual, image), "text_tower": (encoder.text, text)}
    for name, (tower, unlocked_groups) in towers.items():
        if unlocked_groups is None:
            continue
        for parameter in locked_parameters(tower, unlocked_groups, name):
            parameter.requires_grad_(False)

        # A projection inside the trunk learns as any other does.
        learns = _projection_in_trunk(encoder) if tower is encoder.visual else None
        if learns is not None:
            learns.requires_grad_(True)
        encoder.locked += _without_gradient(trunk_of(tower))
    encoder.train(encoder.training)  # what is locked goes into evaluation mode


def unlock_projections(encoder: DualEncoder) -> None:
    """Let the projections learn whatever is locked: new ones are random."""
    fresh = projections.names(encoder)
    for name, parameter in encoder.named_parameters():
        if name in fresh:
            parameter.requires_grad_(True)


def freeze_pictures(encoder: DualEncoder) -> None:
    """Freeze what no text passes: DDP would wait for its gradients."""
    of_texts = {*encoder.text.parameters(), *trunk_of(encoder.text).parameters()}
    for parameter in encoder.visual.parameters():
        if parameter not in of_texts:
            parameter.requires_grad_(False)
    encoder.locked += _without_gradient(encoder.visual)
    encoder.train(encoder.training)


def adapt(encoder: DualEncoder, *, image: Any = None, text: Any = None) -> None:
    """Give towers low-rank adapters (vlp.models.lora, vlp.towers.Lora); None: a tower has
    none.
    """
    pixels, ids = encoder.example(1)
    for side, options, example in (("visual", image, pixels), ("text", text, ids)):
        if options is not None:
            key = {"visual": "image_tower", "text": "text_tower"}[side]
            # A projection always learns, also where a timm trunk's own classifier is it.
            learns = _projection_in_trunk(encoder) if side == "visual" else None
            tower = encoder.get_submodule(side)
            encoder.locked += lora.adapt(tower, options, example, key, learns)
            encoder.lora_scalings[side] = options.alpha / options.r
    encoder.train(encoder.training)


def _projection_in_trunk(encoder: DualEncoder) -> nn.Module | None:
    """The classifier of a timm trunk, where it is the projection (open_clip's empty one)."""
    if encoder.open_clip_config["vision_cfg"].get("timm_proj") != "":
        return None
    return encoder.visual.trunk.get_classifier()


def _without_gradient(module: nn.Module) -> list[nn.Module]:
    """The outermost modules of which no parameter learns."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return [module]
    found: list[nn.Module] = []
    for child in module.children():
        found += _without_gradient(child)
    return found
