"""Trained parts beside the two towers that only an objective reads: they take part in training and
leave with export.

views     a two-layer projection of the embeddings of further views for each modality, with a scale of its own
          (multi_view, after CLIP-rocket, arXiv 2305.08675; slip): image_views, text_views, view_scale
concepts  a linear layer from the image tower's output, before it is normalised: concept_logits (distill)
captions  a multimodal decoder over the towers' tokens (captioning, after CoCa, arXiv 2205.01917): caption_nll,
          which stands for caption_logits
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from open_clip.transformer import MultimodalTransformer, TextTransformer, VisionTransformer
from torch import Tensor, nn

from vlp import config
from vlp.models.exact import Scaling


class Views(nn.Module):
    """[rows, D] → [rows, D] for images and, if they have views, texts."""

    def __init__(self, embed_dim: int, options: config.ViewHead) -> None:
        super().__init__()
        for modality in ("image", "text") if options.text else ("image",):
            layers = (
                nn.Linear(embed_dim, options.width),
                nn.GELU(),
                nn.Linear(options.width, embed_dim),
            )
            setattr(self, modality, nn.Sequential(*layers))
        self.scaling = Scaling(math.log(options.scale.init), None, options.scale)


class Captioner(nn.Module):
    """Logits of every next token, from a causal text tower's tokens that look at the image tower's."""

    def __init__(self, visual: nn.Module, text: nn.Module, options: config.Captioner) -> None:
        super().__init__()
        if (
            not isinstance(visual, VisionTransformer)
            or not isinstance(text, TextTransformer)
            or text.attn_mask is None
        ):
            raise ValueError(
                "model.heads.captions reads the towers' tokens: it needs open_clip's vision transformer (vit, open_clip) and "
                f"its causal text transformer, found {type(visual).__name__} and {type(text).__name__}; take those, or drop it"
            )
        visual.output_tokens = text.output_tokens = True
        width = text.width
        self.bridge = nn.Linear(visual.conv1.out_channels, width)
        self.decoder = MultimodalTransformer(
            width,
            options.layers,
            options.heads or text.heads,
            text.context_length,
            output_dim=text.vocab_size,
        )
        nn.init.normal_(
            self.decoder.text_projection, std=width**-0.5
        )  # open_clip leaves it as the memory was

    def forward(self, image_tokens: Tensor, text_tokens: Tensor, ids: Tensor) -> Tensor:
        """−log p of the tokens ids[:, 1:], [b, L − 1], from [b, patches, width of the image tower]
        and [b, L, width of the text tower]. Position l sees the image and the tokens up to l. The
        logits, [b, L − 1, vocabulary], do not leave.
        """
        logits = self.decoder(self.bridge(image_tokens), text_tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
            ids.shape[0], -1
        )


class Heads(nn.Module):
    """The heads of a configuration; those that it does not name are None."""

    def __init__(
        self, options: config.Heads, visual: nn.Module, text: nn.Module, embed_dim: int
    ) -> None:
        super().__init__()
        self.options = options
        self.views = Views(embed_dim, options.views) if options.views else None
        self.concepts = nn.Linear(embed_dim, options.concepts) if options.concepts else None
        self.captions = Captioner(visual, text, options.captions) if options.captions else None

    def supplies(self) -> frozenset[str]:
        """The keywords of `vlp.losses` that these heads give."""
        views = (
            ()
            if self.views is None
            else ("image_views", "text_views")
            if self.options.views.text
            else ("image_views",)
        )
        concepts = () if self.concepts is None else ("concept_logits",)
        captions = () if self.captions is None else ("caption_logits",)
        return frozenset((*views, *concepts, *captions))
