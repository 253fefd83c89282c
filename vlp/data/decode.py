"""Encoded images to uint8 pixels [3, H, W]: training's crops, open_clip's transform for evaluation.

What a picture's bytes become is decided in `vlp.data.picture`, for training and evaluation alike.
Cropping comes before resizing, and pixels stay uint8: normalisation is the model's, on the device.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vlp.config import Augment
from vlp.data import picture
from vlp.types import ON_WHITE, Decoding, ImageSpec

# What libjpeg-turbo scales by in vector code; other eighths are slower than no scaling.
_SHRINKS = (8, 4, 2)
_REACH = 3  # pixels around a part that count when it is enlarged: 2 for bicubic, 1 for rounding
_THIN = 16  # what is enlarged to this many times its part that counts is cut before


def decode(data: bytes, decoding: Decoding = ON_WHITE, shrink: int = 1) -> Tensor:
    """The picture as uint8 [3, H, W], RGB; raises BadImage. `shrink` as in `picture.array`."""
    return _to_tensor(picture.array(data, decoding, shrink))


def train_transform(data: bytes, spec: ImageSpec, augment: Augment, rng: random.Random) -> Tensor:
    """The training transform: `random_crop` of an encoded image; raises BadImage.

    With `augment.scaled_decoding` the crop is of reduced pixels.
    """
    size = picture.jpeg_size(data, spec.decoding) if augment.scaled_decoding else None
    if size is None:
        return random_crop(decode(data, spec.decoding), spec, augment, rng)

    # The crop is drawn in whole pixels, so that it shows the same part at any scale.
    box = crop_box(*size, augment, rng)
    shrink = _shrink_for(box[2:], spec.size)
    top, left, height, width = (round(side / shrink) for side in box)
    image = decode(data, spec.decoding, shrink)
    crop = image[:, top : top + height, left : left + width]
    return _augmented(crop, spec, augment, rng)


def _shrink_for(crop: tuple[int, int], size: tuple[int, int]) -> int:
    """The most by which a crop (height, width) can shrink and still be as large as `size`."""
    for shrink in _SHRINKS:
        if crop[0] >= shrink * size[0] and crop[1] >= shrink * size[1]:
            return shrink
    return 1


def random_crop(image: Tensor, spec: ImageSpec, augment: Augment, rng: random.Random) -> Tensor:
    """A crop at the tower's size, flipped, recoloured and blurred: uint8 [3, h, w] → [3, H, W].

    A pure function of its arguments and the state of `rng`.
    """
    _, full_height, full_width = image.shape
    top, left, height, width = crop_box(full_height, full_width, augment, rng)
    crop = image[:, top : top + height, left : left + width]
    return _augmented(crop, spec, augment, rng)


def _augmented(image: Tensor, spec: ImageSpec, augment: Augment, rng: random.Random) -> Tensor:
    """Pixels at the tower's size, changed by `augment`; each change draws from `rng` only if it is
    on.
    """
    if image.shape[1:] != spec.size:
        # What the vectorised kernel wants.
        packed = image[None].contiguous(memory_format=torch.channels_last)
        image = F.interpolate(packed, spec.size, mode=spec.interpolation, antialias=True)[0]
    if augment.flip and rng.random() < augment.flip:
        image = image.flip(-1)

    if augment.color or augment.grayscale:
        # Here, because it costs each server of loaders 90 MB.
        from torchvision.transforms.v2 import functional as color
    if augment.color:
        for adjust in (color.adjust_brightness, color.adjust_contrast, color.adjust_saturation):
            image = adjust(image, rng.uniform(1 - augment.color, 1 + augment.color))
    if augment.grayscale and rng.random() < augment.grayscale:
        image = color.rgb_to_grayscale(image, num_output_channels=3)

    if augment.blur and rng.random() < augment.blur:
        sigma = rng.uniform(0.1, 2.0)  # SimCLR's range, which is meant for 224 px
        image = blurred(image, sigma * image.shape[1] / 224)
    return image


def blurred(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of standard deviation `sigma` pixels, mirrored at the borders: uint8 [3, H, W]
    like `image`.
    """
    # Mirroring needs more pixels than it adds.
    radius = min(math.ceil(3 * sigma), min(image.shape[1:]) - 1)
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)

    # A Gaussian is separable: rows first, then columns.
    wide = F.pad(image[:, None].float(), (radius,) * 4, mode="reflect")
    blurred_rows = F.conv2d(wide, kernel)
    return F.conv2d(blurred_rows, kernel.mT)[:, 0].round().to(torch.uint8)


def crop_box(
    height: int, width: int, augment: Augment, rng: random.Random
) -> tuple[int, int, int, int]:
    """(top, left, height, width) with the distribution of torchvision's RandomResizedCrop."""
    low, high = map(math.log, augment.ratio)
    for _ in range(10):
        area = height * width * rng.uniform(*augment.scale)
        ratio = math.exp(rng.uniform(low, high))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = rng.randint(0, height - h)
            left = rng.randint(0, width - w)
            return top, left, h, w

    # No crop of these shapes fits: the whole image, cut centrally to the nearest allowed ratio.
    ratio = min(max(width / height, augment.ratio[0]), augment.ratio[1])
    w = min(width, max(1, round(height * ratio)))
    h = min(height, max(1, round(width / ratio)))
    return (height - h) // 2, (width - w) // 2, h, w


def eval_transform(image: Image.Image | bytes, spec: ImageSpec) -> Tensor:
    """The evaluation pixels of open_clip's PIL transform for `spec`, before normalisation: uint8
    [3, H, W].

    "shortest" resizes the shortest side and cuts the centre; "squash" resizes both sides. Raises
    BadImage.
    """
    if isinstance(image, bytes):
        image = picture.rgb(image, spec.decoding)
    image = picture.to_rgb(image, spec.decoding)

    height, width = spec.size
    is_bicubic = spec.interpolation == "bicubic"
    method = Image.Resampling.BICUBIC if is_bicubic else Image.Resampling.BILINEAR
    if spec.resize == "squash":
        return _to_tensor(np.array(image.resize((width, height), method)))

    if height == width:
        # torchvision's Resize rounds the long side down.
        short, long = min(image.size), max(image.size)
        other = int(height * long / short)
        size = (height, other) if image.width <= image.height else (other, height)
    else:
        # open_clip's ResizeKeepRatio, which is bicubic whatever the configuration says.
        method = Image.Resampling.BICUBIC
        ratio = min(image.height / height, image.width / width)
        size = (round(image.width / ratio), round(image.height / ratio))

    left = round((size[0] - width) / 2.0)
    top = round((size[1] - height) / 2.0)
    box = (left, top, left + width, top + height)
    # A strip of a pixel would become gigabytes before it is cut.
    if size[0] > image.width and max(size) > _THIN * max(spec.size):
        return _to_tensor(np.array(_resized_part(image, size, box, method)))
    if size != image.size:
        image = image.resize(size, method)
    return _to_tensor(np.array(image.crop(box)))


def _resized_part(
    image: Image.Image,
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    method: Image.Resampling,
) -> Image.Image:
    """`image.resize(size, method).crop(box)` without ever holding the resized picture.

    Equal to it but for rounding, by a level at most: first the rows, then the columns, as Pillow
    does when it enlarges.
    """
    across, down = image.width / size[0], image.height / size[1]
    left, right = box[0] * across, box[2] * across
    top, bottom = box[1] * down, box[3] * down
    width = box[2] - box[0]
    height = box[3] - box[1]

    # Cut to what the filter can reach: Pillow's 32-bit coordinates within so small a part are
    # exact.
    x = max(0, math.floor(left) - _REACH)
    y = max(0, math.floor(top) - _REACH)
    end_x = min(image.width, math.ceil(right) + _REACH)
    end_y = min(image.height, math.ceil(bottom) + _REACH)
    part = image.crop((x, y, end_x, end_y))

    rows = part.resize((width, part.height), method, (left - x, 0, right - x, part.height))
    return rows.resize((width, height), method, (0, top - y, width, bottom - y))


def middle(image: Image.Image) -> Image.Image:
    """The centre of a very long picture, for transforms that resize its shorter side and cut.

    Any other picture comes back as it is. What such a transform gives moves by less than two
    pixels.
    """
    short, long = min(image.size), max(image.size)
    if long <= _THIN * short:
        return image

    # An even number of pixels goes, so that the middle stays where it was.
    kept = _THIN * short + (long - _THIN * short) % 2
    start = (long - kept) // 2
    if image.width == long:
        return image.crop((start, 0, start + kept, short))
    return image.crop((0, start, short, start + kept))


def _to_tensor(pixels: np.ndarray) -> Tensor:
    """Pixels [H, W, 3] as [3, H, W]."""
    return torch.from_numpy(pixels).permute(2, 0, 1)
