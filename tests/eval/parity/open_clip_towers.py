"""Embeddings, scale and bias of open_clip's architectures, with weights that its folders hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from tests.eval.parity import inputs
from tests.eval.parity.compare import Figures
from tests.models.tiny import language_model, register_small_siglip, tokenizer
from vlp.eval import models
from vlp.models.load import load

PEER = "open_clip_torch"
CAPTIONS = [
    "a dog",
    "",
    "Two red Circles & a café, naïvely drawn!",
    "a photo of two dogs " * 12,
    "🙂 三只猫 в траве",
    "a cat of two squares",
]
VIT, TEXT = inputs.VIT, inputs.TEXT


def _timm(model: str, pool: str, proj: str, size: int) -> dict[str, Any]:
    return {
        "timm_model_name": model,
        "timm_pool": pool,
        "timm_proj": proj,
        "image_size": size,
    }


def _custom(vision: dict[str, Any], text: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """A model whose text tower is a module of its own."""
    sections = {"vision_cfg": vision, "text_cfg": text}
    return {"embed_dim": 16, "custom_text": True} | sections | keys


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ViT": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT},
    "ViT, quick GELU": {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": VIT,
        "text_cfg": TEXT,
    },
    "ResNet": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": TEXT,
    },
    "ConvNeXt of timm, linear": _custom(_timm("test_convnext", "", "linear", 64), TEXT),
    "EfficientNet of timm, MLP": _custom(_timm("test_efficientnet", "avg", "mlp", 64), TEXT),
    "SigLIP": _custom(
        _timm("vit_small_for_tests", "map", "none", 32),
        TEXT
        | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
        | {"norm_kwargs": {"eps": 1e-6}},
        embed_dim=32,
        init_logit_bias=-10.0,
    ),
    "mean of patches, class token of texts": _custom(
        VIT | {"pool_type": "avg", "ls_init_value": 0.1},
        TEXT | {"embed_cls": True, "pad_id": 0, "ls_init_value": 0.1},
    ),
    "no first norm, first token of texts": _custom(
        VIT | {"no_ln_pre": True, "final_ln_after_pool": True, "pool_type": "avg"},
        TEXT | {"pool_type": "first", "no_causal_mask": True},
    ),
    "attention pool": _custom(
        VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4}, TEXT
    ),
    "wide pictures": _custom(VIT | {"image_size": [24, 40]}, TEXT),
}
BERT = "BERT of transformers, mean"
SCALED = ("ViT", "SigLIP")


def _folders(root: Path) -> Iterator[tuple[str, Path]]:
    """Each architecture with the folder of its weights, written where it is absent."""
    register_small_siglip()
    described = ARCHITECTURES | {BERT: _bert(root / "bert")}
    for number, (name, model_cfg) in enumerate(described.items()):
        folder = root / "towers" / str(number)
        if not folder.exists():
            inputs.write_model(folder, model_cfg, {})
            if name == BERT:
                tokenizer(folder)  # where open_clip looks for it
        yield name, folder


def _bert(folder: Path) -> dict[str, Any]:
    """A model beside a language model that transformers builds."""
    if not folder.exists():
        language_model(folder)
    section = {
        "hf_model_name": str(folder),
        "hf_tokenizer_name": str(folder),
        "hf_model_pretrained": False,
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": "mlp",
        "context_length": 12,
    }
    return _custom(VIT, section)


def _pixels(size: tuple[int, int]) -> Tensor:
    """[3, 3, H, W] uint8."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 3, *size), generator=generator, dtype=torch.uint8)


def _normalised(pixels: Tensor) -> Tensor:
    """What open_clip's transform makes of such pixels."""
    mean = torch.tensor(inputs.PREPROCESS["mean"]).view(3, 1, 1)
    std = torch.tensor(inputs.PREPROCESS["std"]).view(3, 1, 1)
    return (pixels / 255 - mean) / std


def theirs(root: Path) -> Figures:
    """By open_clip's model and tokenizer of the folder."""
    figures: Figures = {}
    for name, folder in _folders(root):
        reference = f"local-dir:{folder}"
        model, _, _ = open_clip.create_model_and_transforms(reference)
        model.eval()
        ids = open_clip.get_tokenizer(reference)(CAPTIONS)
        size = model.visual.image_size
        pixels = _normalised(_pixels((size, size) if isinstance(size, int) else tuple(size)))
        with torch.no_grad():
            figures[f"{name}: images"] = model.encode_image(pixels, normalize=True)
            figures[f"{name}: texts"] = model.encode_text(ids, normalize=True)
            # One number of each model, which all of them are given alike.
            if name in SCALED:
                figures[f"{name}: scale"] = model.logit_scale.exp()
            if model.logit_bias is not None:
                figures[f"{name}: bias"] = model.logit_bias
    return figures


def ours(root: Path) -> Figures:
    """By our model, which reads the same folder."""
    figures: Figures = {}
    for name, folder in _folders(root):
        model = load(folder).eval()
        encoder = models.from_model(model)
        figures[f"{name}: images"] = encoder.encode_images(_pixels(model.image_spec.size))
        figures[f"{name}: texts"] = encoder.encode_texts(CAPTIONS)
        with torch.no_grad():
            features = model()
        if name in SCALED:
            figures[f"{name}: scale"] = features.scale
        if features.bias is not None:
            figures[f"{name}: bias"] = features.bias
    return figures
