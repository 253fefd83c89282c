"""One tower's pass: inputs of a form that it reads, cast for it; features and tokens of them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from vlp.models import lengths, tokens, trunk_features
from vlp.models.batch_norm import moved_once
from vlp.models.language import LanguageTower
from vlp.models.lengths import Cut
from vlp.models.multimodal import Prompts
from vlp.models.trunk_features import Passed

if TYPE_CHECKING:
    from vlp.models.dual_encoder import DualEncoder

# Text towers whose `transformer` is a model of that library.
OF_TRANSFORMERS = (HFTextEncoder, LanguageTower)


def pass_images(
    encoder: DualEncoder, image: Tensor, wants_tokens: bool = False, prompts: Prompts | None = None
) -> Passed:
    """The tower's features [rows, D]; its tokens where they are wanted or a head reads them,
    and what its projection reads where a head does.
    """
    if image.ndim != 4 or tuple(image.shape[1:]) != (3, *encoder.image_spec.size):
        height, width = encoder.image_spec.size
        raise ValueError(
            f"image has shape {tuple(image.shape)}; expected [b, 3, {height}, {width}]"
        )

    # Normalised in float32, then cast to what the tower computes in, unless they are already in
    # the dtype to which autocast would cast them.
    pixels = image if image.is_floating_point() else encoder.pixels(image)
    if pixels is image or pixels.dtype == torch.float32:
        pixels = pixels.to(_dtype(encoder.visual))
    if prompts is not None:
        return Passed(encoder.visual(pixels, prompts))
    with moved_once(encoder.batch_norms):
        if encoder.heads.reads_trunk:
            return trunk_features.with_trunk(encoder.visual, pixels, wants_tokens)
        if wants_tokens:
            return Passed(*tokens.with_tokens(encoder.visual, pixels))
        return Passed(*_with_tokens(encoder.visual(pixels)))


def pass_texts(
    encoder: DualEncoder, text: Tensor, cut: Cut | None = None, wants_tokens: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The tower's features [rows, D], and its tokens where they are wanted or a head reads
    them.
    """
    if text.is_floating_point():
        return _stored_text(encoder, text), None
    length = encoder.text_spec.context_length
    may_be_shorter = encoder.padding is not None or isinstance(encoder.text, OF_TRANSFORMERS)
    lengths_allowed = range(1 if may_be_shorter else length, length + 1)
    if text.ndim != 2 or text.shape[1] not in lengths_allowed:
        raise ValueError(f"text has shape {tuple(text.shape)}; expected [rows, {length}]")

    tower = partial(tokens.with_tokens, encoder.text) if wants_tokens else encoder.text
    if cut is not None:
        return lengths.pass_in_parts(tower, text, cut)
    return _with_tokens(tower(text))


def _stored_text(encoder: DualEncoder, rows: Tensor) -> Tensor:
    """The features of what a language model gave the texts, [rows, width] (vlp.text_store)."""
    tower = encoder.text
    if not isinstance(tower, LanguageTower) or rows.shape[1:] != (tower.width,):
        raise ValueError(
            f"stored text embeddings of shape {tuple(rows.shape)} came to a text tower that "
            "does not read them; expected token ids, or the tower `stored` of their width"
        )
    return tower(rows)


def _with_tokens(output: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    return output if isinstance(output, tuple) else (output, None)


def _dtype(module: nn.Module) -> torch.dtype:
    # Asked at every call: engines swap parameters for cast ones.
    return next(module.parameters()).dtype
