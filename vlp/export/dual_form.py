"""A DualEncoder as transformers' VisionTextDualEncoderModel: any two models of theirs that pool by
themselves, each with a linear projection.

It lies in a folder of its own: an open_clip model with a language model of Hugging Face needs the
config.json beside its weights for that, when it is loaded from a Hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlp.data import text as tokenizers
from vlp.export import clip_form
from vlp.export.parts import NoPart, Part
from vlp.models.dual_encoder import DualEncoder
from vlp.pretrained import places

if TYPE_CHECKING:
    from transformers import (
        PreTrainedTokenizerBase,
        VisionTextDualEncoderModel,
        VisionTextDualEncoderProcessor,
    )

FOLDER = "transformers"
# Case, accents, spaces: where a tokenizer cleans otherwise than training did, one shows it. What
# open_clip repairs, curly quotes among it, no other library does, as every card says.
_PROBES = ["A photo of 2 red Circles, naïve & café!", "  two   dogs\n", ""]


def network(
    model: DualEncoder, image: Part, text: Part, weights: Mapping[str, Tensor]
) -> VisionTextDualEncoderModel:
    """The VisionTextDualEncoderModel of both parts; NoPart where it cannot pool or project as they
    do.
    """
    from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    settings = VisionTextDualEncoderConfig.from_vision_text_configs(
        image.network.config, text.network.config, projection_dim=model.embed_dim
    )
    projections = {
        "visual_projection.weight": _matrix(image, "image"),
        "text_projection.weight": _matrix(text, "text"),
        "logit_scale": weights["logit_scale"],
    }
    # Its own constructor takes the two models, and asks both configurations again.
    dual = VisionTextDualEncoderModel(settings, image.network, text.network).eval()
    dual.load_state_dict(projections, strict=False)
    return dual


def _matrix(part: Part, side: str) -> Tensor:
    """The weights of a part's only projection, [D, width]."""
    if part.pooling != "own":
        raise NoPart(f"it pools the {side} tower by itself, and this one by {part.pooling}")
    if not part.projection:
        width = part.network.config.hidden_size
        return torch.eye(width)
    if len(part.projection) > 1 or part.projection[0].bias is not None:
        raise NoPart(f"it projects by one matrix, and the {side} tower by more")
    return part.projection[0].weight


def tokenizer(model: DualEncoder) -> PreTrainedTokenizerBase:
    """The model's tokenizer, as transformers has it; NoPart where it cleans texts otherwise."""
    if model.text_spec.tokenizer == "clip":
        return clip_form.processor(model).tokenizer
    from transformers import AutoTokenizer

    place, length = places.locate(model.text_spec.tokenizer), model.text_spec.context_length
    loaded = AutoTokenizer.from_pretrained(place, trust_remote_code=False, model_max_length=length)
    ids = loaded(_PROBES, padding="max_length", truncation=True, return_tensors="pt").input_ids
    if not torch.equal(ids, tokenizers.build(model.text_spec)(_PROBES)):
        raise NoPart(
            f"captions are cleaned by {model.text_spec.clean!r} {model.text_spec.options}, which "
            "its tokenizer does not"
        )
    return loaded


def processor(model: DualEncoder) -> VisionTextDualEncoderProcessor:
    """The tokenizer and an image processor."""
    from transformers import CLIPImageProcessor, VisionTextDualEncoderProcessor

    pictures = CLIPImageProcessor(**clip_form.image_settings(model))
    return VisionTextDualEncoderProcessor(pictures, tokenizer(model))
