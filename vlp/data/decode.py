"""Encoded images to uint8 pixels [3, H, W]: a random crop for training, open_clip's transform for evaluation.

JPEGs are decoded by simplejpeg (libjpeg-turbo), whose pixels equal Pillow's bit for bit in three quarters of the time and
which can decode at a half, a quarter or an eighth of the size; everything else (CMYK, palettes, 16 bit, animations: their
first frame, PNG, WebP, GIF, BMP) takes Pillow's way. Cropping comes before resizing, and pixels stay uint8: normalisation
is the model's, on the device. EXIF orientation is ignored and transparency dropped, as open_clip's pipelines do, so that
training sees what evaluation and exported models see.
"""

from __future__ import annotations

import math
import random
import warnings
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from simplejpeg import decode_jpeg, decode_jpeg_header
from torch import Tensor
from torch.nn import functional as F

from vlp.config import Augment
from vlp.types import ImageSpec

MAX_PIXELS = 100_000_000  # a decompression bomb: 300 MB of pixels for one sample
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_JPEG = b"\xff\xd8\xff"
_SHRINKS = (8, 4, 2)  # what libjpeg-turbo scales by in vector code; other eighths are slower than no scaling


class BadImage(ValueError):
    """The bytes are no picture that training can use; the message says why."""


def decode(data: bytes, shrink: int = 1) -> Tensor:
    """The stored pixels as uint8 [3, H, W], RGB; raises BadImage. The format is told by content, not by name.

    shrink = 2, 4 or 8 gives a JPEG that `jpeg_size` knows at 1/shrink of its height and width, rounded up.
    """
    size = jpeg_size(data)
    if size is None:
        return _to_tensor(_rgb(_open(data)))
    height, width = (-(-side // shrink) for side in size)
    try:
        pixels = decode_jpeg(data, min_height=height, min_width=width, min_factor=shrink)
    except ValueError as error:
        raise BadImage(f"cannot decode the JPEG: {str(error)[:100]}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG in gray or colours; None for all that is left to Pillow. Raises BadImage for a giant."""
    if not data.startswith(_JPEG):
        return None
    try:
        height, width, space, _ = decode_jpeg_header(data)
    except ValueError:
        return None  # Pillow reads it, or says what is wrong
    _refuse_giant(height, width)
    return None if space in ("CMYK", "YCCK") else (height, width)


def train(data: bytes, spec: ImageSpec, augment: Augment, rng: random.Random) -> Tensor:
    """`random_crop` of an encoded image; with `augment.scaled_decoding` its crop is of reduced pixels. Raises BadImage."""
    size = jpeg_size(data) if augment.scaled_decoding else None
    if size is None:
        return random_crop(decode(data), spec, augment, rng)
    box = crop_box(*size, augment, rng)
    shrink = next((s for s in _SHRINKS if box[2] >= s * spec.size[0] and box[3] >= s * spec.size[1]), 1)
    top, left, height, width = (side / shrink for side in box)
    top, left = round(top), round(left)
    image = decode(data, shrink)[:, top : top + round(height), left : left + round(width)]
    return _augmented(image, spec, augment, rng)


def random_crop(image: Tensor, spec: ImageSpec, augment: Augment, rng: random.Random) -> Tensor:
    """A crop of pixels uint8 [3, h, w] at the tower's size, flipped, recoloured and blurred by `augment`: uint8 [3, H, W].

    A pure function of its arguments and the state of `rng`.
    """
    top, left, height, width = crop_box(image.shape[1], image.shape[2], augment, rng)
    return _augmented(image[:, top : top + height, left : left + width], spec, augment, rng)


def _augmented(image: Tensor, spec: ImageSpec, augment: Augment, rng: random.Random) -> Tensor:
    if image.shape[1:] != spec.size:
        packed = image[None].contiguous(memory_format=torch.channels_last)  # what the vectorised kernel wants
        image = F.interpolate(packed, spec.size, mode=spec.interpolation, antialias=True)[0]
    if augment.flip and rng.random() < augment.flip:
        image = image.flip(-1)
    if augment.color or augment.grayscale:
        from torchvision.transforms.v2 import functional as color  # here: it costs each server of loaders 90 MB
    if augment.color:
        for adjust in (color.adjust_brightness, color.adjust_contrast, color.adjust_saturation):
            image = adjust(image, rng.uniform(1 - augment.color, 1 + augment.color))
    if augment.grayscale and rng.random() < augment.grayscale:
        image = color.rgb_to_grayscale(image, num_output_channels=3)
    if augment.blur and rng.random() < augment.blur:
        image = blurred(image, rng.uniform(0.1, 2.0) * image.shape[1] / 224)  # SimCLR's range, which is meant for 224 px
    return image


def blurred(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of standard deviation `sigma` pixels, mirrored at the borders: uint8 [3, H, W] like `image`."""
    radius = min(math.ceil(3 * sigma), min(image.shape[1:]) - 1)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    wide = F.pad(image[:, None].float(), (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(wide, kernel), kernel.mT)[:, 0].round().to(torch.uint8)


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
    _refuse_giant(image.height, image.width)
    return image


def _refuse_giant(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImage(f"an image of {width}×{height} pixels, more than {MAX_PIXELS}")


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
