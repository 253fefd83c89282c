"""A CoCa of a dozen words, which writes captions in milliseconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.models import tiny
from vlp.eval import models
from vlp.eval.models import Encoder
from vlp.models.dual_encoder import DualEncoder

BEGIN = "<s>"
TEXTS = (
    "a photo of two red circles",
    "a red square",
    "a photo of a blue dog",
    "two blue cat circles",
)


def section(folder: Path, **text: object) -> dict[str, Any]:
    """The `model` section; the tokenizer and the text tower's description lie in `folder`."""
    tiny.tokenizer(folder, BEGIN)
    text_cfg: dict[str, Any] = {"embed_cls": True, "hf_tokenizer_name": str(folder)} | text
    n_words = text_cfg.pop("vocab_size", len(tiny.WORDS) + 1)
    text_tower = tiny.few_words(folder, n_words, 10, **text_cfg)

    image = {"name": "vit", "width": 32, "layers": 1, "head_width": 16, "patch_size": 8}
    image |= {"image_size": 16, "attentional_pool": "shared", "pool_queries": 4, "pool_heads": 2}
    return {
        "image_tower": image,
        "text_tower": text_tower,
        "embed_dim": 32,
        "decoder": {"layers": 1},
    }


def coca(folder: Path, seed: int = 0, **text: object) -> DualEncoder:
    """With random weights, in evaluation mode."""
    return tiny.tiny(seed, **section(folder, **text))


def writing(encoder: Encoder, model: DualEncoder) -> Encoder:
    """An encoder of numbered pictures (tests.eval.material) that writes what `model`'s text decoder
    makes of noise, the same for the same number.
    """

    def tokens(pixels: Tensor) -> Tensor:
        generators = [torch.Generator().manual_seed(int(number)) for number in pixels[:, 0]]
        return torch.stack([torch.randn(4, 32, generator=generator) for generator in generators])

    describer = models.from_model(model).describer
    assert describer is not None
    return replace(encoder, describer=replace(describer, image_tokens=tokens))
