"""Encoded images to uint8 pixels [3, H, W]: a random crop for training, open_clip's transform for evaluation.

JPEG and PNG of the common kinds are decoded by torchcodec, whose pixels equal Pillow's bit for bit at twice the speed;
everything else (CMYK, palettes, 16 bit, animations: their first frame, WebP, GIF, BMP) takes Pillow's way. Cropping comes
before resizing, and pixels stay uint8: normalisation is the model's, on the device. EXIF orientation is ignored and
transparency dropped, as open_clip's pipelines do, so that training sees what evaluation and exported models see.
"""

from __future__ import annotations

import math
import random
import warnings
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchcodec.decoders import decode_jpeg, decode_png
from torchvision.transforms.v2 import functional as color

from vlp.config import Augment
from vlp.types import ImageSpec

MAX_PIXELS = 100_000_000  # a decompression bomb: 300 MB of pixels for one sample
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_ORIENTATION = 0x0112  # EXIF tag; torchcodec turns by it, Pillow does not
_FAST = {"JPEG": decode_jpeg, "PNG": decode_png}


class BadImage(ValueError):
    """The bytes are no picture that training can use; the message says why."""


def decode(data: bytes) -> Tensor:
    """The stored pixels as uint8 [3, H, W], RGB; raises BadImage. The format is told by content, not by name."""
    header = _open(data)
    if header.format in _FAST and header.mode in ("RGB", "L") and not _oriented(header):
        try:
            return _FAST[header.format](data, mode="RGB")
        except (RuntimeError, ValueError) as error:
            raise BadImage(f"cannot decode the {header.format}: {str(error).rsplit(', ', 1)[-1][:100]}") from None
    return _to_tensor(_rgb(header))


def train(data: bytes, spec: ImageSpec, augment: Augment, rng: random.Random) -> Tensor:
    """A random crop of the image at the tower's size, flipped and recoloured by `augment`: uint8 [3, H, W].

    A pure function of its arguments and the state of `rng`. Raises BadImage.
    """
    image = decode(data)
    top, left, height, width = crop_box(image.shape[1], image.shape[2], augment, rng)
    image = image[:, top : top + height, left : left + width]
    if image.shape[1:] != spec.size:
        packed = image[None].contiguous(memory_format=torch.channels_last)  # what the vectorised kernel wants
        image = F.interpolate(packed, spec.size, mode=spec.interpolation, antialias=True)[0]
    if augment.flip and rng.random() < augment.flip:
        image = image.flip(-1)
    if augment.color:
        for adjust in (color.adjust_brightness, color.adjust_contrast, color.adjust_saturation):
            image = adjust(image, rng.uniform(1 - augment.color, 1 + augment.color))
    return image


def crop_box(height: int, width: int, augment: Augment, rng: random.Random) -> tuple[int, int, int, int]:
    """(top, left, height, width) with the distribution of torchvision's RandomResizedCrop."""
    low, high = math.log(augment.ratio[0]), math.log(augment.ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(*augment.scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    # No crop of these shapes fits: the whole image, cut centrally to the nearest allowed ratio.
    ratio = min(max(width / height, augment.ratio[0]), augment.ratio[1])
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return (height - h) // 2, (width - w) // 2, h, w


def evaluate(image: Image.Image | bytes, spec: ImageSpec) -> Tensor:
    """The evaluation pixels of open_clip's PIL transform for `spec`, before normalisation: uint8 [3, H, W].

    "shortest" resizes the shortest side and cuts the centre; "squash" resizes both sides. Raises BadImage.
    """
    image = _rgb(_open(image) if isinstance(image, bytes) else image)
    height, width = spec.size
    method = Image.Resampling.BICUBIC if spec.interpolation == "bicubic" else Image.Resampling.BILINEAR
    if spec.resize == "squash":
        return _to_tensor(image.resize((width, height), method))
    if height == width:  # torchvision's Resize rounds the long side down
        short, long = min(image.size), max(image.size)
        other = int(height * long / short)
        size = (height, other) if image.width <= image.height else (other, height)
    else:  # open_clip's ResizeKeepRatio, which is bicubic whatever the configuration says
        method = Image.Resampling.BICUBIC
        ratio = min(image.height / height, image.width / width)
        size = (round(image.width / ratio), round(image.height / ratio))
    if size != image.size:
        image = image.resize(size, method)
    top, left = round((image.height - height) / 2.0), round((image.width - width) / 2.0)
    return _to_tensor(image.crop((left, top, left + width, top + height)))


def _open(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            image = Image.open(BytesIO(data), formats=_FORMATS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(f"no readable image: {str(error).split('<')[0].strip()[:100]}") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"an image of {image.width}×{image.height} pixels, more than {MAX_PIXELS}")
    return image


def _oriented(image: Image.Image) -> bool:
    return "exif" in image.info and image.getexif().get(_ORIENTATION, 1) != 1


def _rgb(image: Image.Image) -> Image.Image:
    try:
        if image.mode.startswith("I"):  # 16 bit gray: Pillow's own conversion would cut everything off at 255
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "transparency expressed in bytes": it is dropped on purpose
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds (OSError, SyntaxError, struct.error, EOFError, …)
        raise BadImage(f"cannot decode the {image.format or 'image'}: {str(error)[:100]}") from None


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
