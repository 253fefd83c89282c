"""A text decoder that looks at a picture: of each token of a caption, −log p of the next one (CoCa,
Yu et al. 2022, arXiv 2205.01917).

    text tower    tokens of the caption, each of which sees those before it
    decoder       the same tokens, after cross-attention to those of the image tower
    logits [l]    of the token l + 1

A model's own decoder is part of it (`multimodal_cfg` of open_clip's configuration, by whose names
its weights go); the one of model.heads.captions is training's alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.coca_model import MultimodalCfg
from open_clip.transformer import (
    MultimodalTransformer,
    QuickGELU,
    TextTransformer,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS_BYTES = 1 << 28  # of the logits in float32 that are held at once


class Decoder(MultimodalTransformer):
    """open_clip's decoder over text and image tokens, which gives the loss of each token instead of
    its logits: those of 256 captions would be 4 GB.
    """

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__(*sizes, **options)
        # open_clip leaves it as the memory was.
        nn.init.normal_(self.text_projection, std=self.width**-0.5)

    def forward(self, image_tokens: Tensor, text_tokens: Tensor, targets: Tensor) -> Tensor:
        """−log p of `targets` [b, L], each at its position, [b, L]."""
        rows = _hidden(self, image_tokens, text_tokens).flatten(0, 1)

        # A chunk of logits at a time, which the backward pass computes again.
        flat_targets = targets.flatten()
        n_rows = max(1, LOGITS_BYTES // (4 * self.text_projection.shape[1]))
        if len(rows) <= n_rows:
            return _nll(rows, self.text_projection, flat_targets).view(targets.shape)
        chunks = [
            checkpoint(_nll, part, self.text_projection, of_part, use_reentrant=False)
            for part, of_part in zip(rows.split(n_rows), flat_targets.split(n_rows))
        ]
        return torch.cat(chunks).view(targets.shape)


def next_logits(
    decoder: MultimodalTransformer,  # ours, or open_clip's own
    image_tokens: Tensor,  # [b, places, width]
    text_tokens: Tensor,  # [b, l, width]
) -> Tensor:
    """Logits of the token that follows each text, [b, vocabulary]."""
    return _hidden(decoder, image_tokens, text_tokens)[:, -1] @ decoder.text_projection


def _hidden(decoder: MultimodalTransformer, image_tokens: Tensor, text_tokens: Tensor) -> Tensor:
    """What the decoder makes of each text token, [b, L, width], before its vocabulary."""
    length = text_tokens.shape[1]
    mask = decoder.attn_mask[:length, :length]

    x = text_tokens
    for block, cross_block in zip(decoder.resblocks, decoder.cross_attn):
        x = _passed(decoder, block, x, None, None, mask)
        x = _passed(decoder, cross_block, x, image_tokens, image_tokens, None)
    return decoder.ln_final(x)


def _passed(decoder: MultimodalTransformer, block: nn.Module, *inputs: Tensor | None) -> Tensor:
    """Through one block, whose activations are computed again where that was asked for."""
    if decoder.grad_checkpointing:
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def _nll(rows: Tensor, projection: Tensor, targets: Tensor) -> Tensor:
    """−log softmax(rows · projection)[targets], [n], of rows [n, width]."""
    return F.cross_entropy(rows @ projection, targets, reduction="none")


def build(model_cfg: Mapping[str, Any], visual: nn.Module, text: nn.Module) -> Decoder:
    """The decoder that `multimodal_cfg` describes, with random weights; ValueError where the two
    towers have no tokens for it.
    """
    check_towers("a text decoder (multimodal_cfg, model.decoder)", visual, text)
    try:
        described = MultimodalCfg(**model_cfg["multimodal_cfg"])
    except TypeError as error:
        raise ValueError(f"multimodal_cfg describes no decoder of open_clip's: {error}") from error

    widths = {
        "decoder": described.width,
        "image tokens": tokens_width(visual),
        "text tokens": text.width,
    }
    if len(set(widths.values())) > 1:
        shown = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise ValueError(
            f"the text decoder adds up tokens of one width, found {shown}; make them equal (with "
            "an attentional pool the image tower's tokens are as wide as the embedding)"
        )
    if described.width % described.heads:
        raise ValueError(
            f"the text decoder has {described.heads} heads, which do not divide its width "
            f"{described.width}"
        )
    # open_clip passes it over, and other weights would be of another shape there.
    if described.mlp_ratio != MultimodalCfg.mlp_ratio:
        raise ValueError(
            f"multimodal_cfg.mlp_ratio is {described.mlp_ratio}; open_clip's decoder knows only "
            f"{MultimodalCfg.mlp_ratio}"
        )
    return Decoder(
        described.width,
        described.layers,
        described.heads,
        text.context_length,
        ls_init_value=described.ls_init_value,
        act_layer=QuickGELU if model_cfg.get("quick_gelu") else nn.GELU,
        output_dim=text.vocab_size,
    )


def check_towers(reader: str, visual: Any, text: Any) -> None:
    """Raise ValueError where the towers give no tokens that a decoder can read."""
    causal = isinstance(text, TextTransformer) and text.attn_mask is not None
    if isinstance(visual, VisionTransformer) and causal:
        return
    raise ValueError(
        f"{reader} reads the towers' tokens, of the caption those before each one: it needs "
        "open_clip's vision transformer (vit, open_clip) and its causal text transformer, found "
        f"{type(visual).__name__} and {type(text).__name__}; take those, or drop it"
    )


def tokens_width(visual: Any) -> int:
    """Width of a vision transformer's tokens behind its pooling."""
    return visual.conv1.out_channels if visual.attn_pool is None else visual.output_dim
