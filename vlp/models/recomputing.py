"""Which activations of a dual encoder are recomputed in backward, whatever its towers are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel

from vlp.models import language
from vlp.models.passing import OF_TRANSFORMERS

if TYPE_CHECKING:
    from vlp.models.dual_encoder import DualEncoder


def recompute_activations(encoder: DualEncoder, enable: bool = True) -> None:
    """Keep only the blocks' inputs in the forward pass and recompute the rest in backward."""
    if enable and isinstance(encoder.visual, ModifiedResNet):
        raise ValueError(
            "open_clip's ResNets cannot recompute activations; set "
            "train.activation_checkpointing: false"
        )

    # timm's trunk itself: open_clip's adapter would swallow a refusal.
    image = encoder.visual.trunk if isinstance(encoder.visual, TimmModel) else encoder.visual
    image.set_grad_checkpointing(enable)

    if isinstance(encoder.text, OF_TRANSFORMERS):
        language.recompute_activations(encoder.text.transformer, enable)
    else:
        encoder.text.set_grad_checkpointing(enable)
    if encoder.text_decoder is not None:
        encoder.text_decoder.set_grad_checkpointing(enable)
    if encoder.heads.captions is not None:
        encoder.heads.captions.decoder.set_grad_checkpointing(enable)
