"""Whether another library prepares the pixels that a model was trained on, tried on one picture."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vlp.data import decode
from vlp.types import ImageSpec

_ORIENTATION = 0x0112  # Exif's number for it


def sample_picture(spec: ImageSpec) -> bytes:
    """A PNG for this spec: smooth colours, partly transparent, lying down with an Exif orientation.

    Once turned it is a half taller than wide, and resizing leaves an even margin to cut: libraries
    round odd ones apart.
    """
    short = 2 * max(spec.size)
    long = short + 4 * (max(spec.size) // 4)

    # Smooth, so that rounding is all in which two libraries may differ.
    y, x = np.mgrid[:short, :long]
    alpha = 255 * (x + y) / (long + short)
    channels = [255 * x / long, 255 * y / short, 128 + 60 * np.sin(x / 9), alpha]
    image = Image.fromarray(np.stack(channels, -1).astype(np.uint8))

    exif = Image.Exif()
    exif[_ORIENTATION] = 6  # a quarter turn clockwise makes it upright
    file = BytesIO()
    image.save(file, "PNG", exif=exif)
    return file.getvalue()


def levels_apart(spec: ImageSpec, prepare: Callable[[Image.Image], Tensor]) -> float:
    """The largest difference, in levels of 255, between a library's pixels of `sample_picture` and
    training's.

    prepare: the library's way from a Pillow image, turned or not as training saw it and with its
    alpha channel, to normalised pixels [3, H, W].
    """
    picture = sample_picture(spec)
    image: Image.Image = Image.open(BytesIO(picture))
    if spec.decoding.exif:
        image = ImageOps.exif_transpose(image)
    normalised = prepare(image)

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    levels = (normalised.cpu() * std + mean) * 255
    return (levels - decode.eval_transform(picture, spec)).abs().max().item()
