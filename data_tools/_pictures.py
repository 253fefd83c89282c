"""Pictures of samples for tools that look at them without training's decoder: sizes from headers, thumbnails."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from vlp.data.members import IMAGE_TYPES

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMATS = sorted({"JPEG" if kind in ("jpg", "jpeg") else kind.upper() for kind in IMAGE_TYPES})


def size(data: bytes) -> tuple[int, int]:
    """(width, height) from the header alone; raises ValueError."""
    return _open(data).size


def rgb(data: bytes, side: int = 0) -> Image:
    """The picture in RGB; with `side`, a JPEG may come at a fraction of its size, not below `side`. Raises ValueError."""
    image = _open(data)
    try:
        if side:
            image.draft("RGB", (side, side))
        return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds (OSError, SyntaxError, struct.error, EOFError, …)
        raise ValueError(f"cannot decode the {image.format or 'image'}: {str(error)[:100]}") from None


def thumbnail(data: bytes, side: int) -> Image:
    """The picture in RGB, its longer side at most `side`; raises ValueError."""
    image = rgb(data, 2 * side)
    image.thumbnail((side, side))
    return image


def _open(data: bytes) -> Image:
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"no readable image: {str(error).split('<')[0].strip()[:100]}") from None
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"an image of {image.width}×{image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}")
    return image
