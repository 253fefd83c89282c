"""Encoded pictures to upright RGB: the one way in, for training, evaluation and every tool.

The format is told by content, never by name, and only formats of IMAGE_FORMATS are opened: none of
their readers runs other programs. Of animations and stacks of pages the first picture counts. The
header is checked against `vlp.data.picture_limits` before anything is decoded, and whatever goes
wrong with one picture is a BadImage.

- gray of 16 bits: the upper eight, v >> 8; 32-bit integers where they are 16-bit values; floats
  where they lie in [0, 1]
- transparency (alpha channels, palettes, PNG's transparent colours): composited on
  `Decoding.background`
- Exif orientation: turned upright unless `Decoding.exif` is false. A TIFF's own orientation is part
  of its format and always obeyed. Damaged Exif counts as upright
- CMYK, YCCK, YCbCr, LAB, palettes: Pillow's conversion

JPEGs in gray or colours are decoded by simplejpeg (libjpeg-turbo), whose pixels equal Pillow's bit
for bit in three quarters of the time, and which can decode at a half, a quarter or an eighth of the
size; all else is Pillow's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from simplejpeg import decode_jpeg, decode_jpeg_header

from vlp.data import picture_limits as limits
from vlp.data.members import IMAGE_FORMATS
from vlp.data.picture_limits import BadImage as BadImage  # for those who open pictures
from vlp.data.picture_limits import CountedBytes
from vlp.types import ON_WHITE, Decoding

_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # a tag of TIFF, and its value for negatives
_JPEG = b"\xff\xd8\xff"

# By Exif orientation. Pillow counts its rotations counterclockwise.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height

# How files begin that people take for pictures, for messages only.
_FOREIGN = {
    b"%PDF": "a PDF",
    b"%!PS": "PostScript",
    b"8BPS": "a Photoshop document",
    b"<svg": "SVG",
    b"<?xm": "XML",
    b"<!DO": "HTML",
    b"<!do": "HTML",
    b"<htm": "HTML",
    b"PK\3\4": "a zip archive",
    b"\x1f\x8b\x08": "gzip",
}


class Header(NamedTuple):
    """What a picture's header says. No pixel is decoded for it."""

    width: int  # as shown, after turning
    height: int
    turned: bool  # its Exif orientation is not 1
    transparent: bool  # it has an alpha channel or a transparent colour
    kind: str  # Pillow's name of the format, a key of IMAGE_FORMATS
    lossless: bool  # stored without loss, as far as the header tells


def header(data: bytes, decoding: Decoding = ON_WHITE) -> Header:
    """Size and peculiarities of an encoded picture; raises BadImage for a giant or no picture."""
    image = _open(data)
    with _quietly():
        orientation = _orientation(image)
    width, height = image.size
    # Pillow gives a TIFF's size as it will be after loading, which turns it.
    if orientation in _SIDEWAYS and decoding.exif and image.format != "TIFF":
        width, height = height, width
    kind = "JPEG" if image.format == "MPO" else image.format or ""
    transparent = _has_transparency(image)
    return Header(width, height, orientation != 1, transparent, kind, _is_lossless(image, data))


def rgb(data: bytes, decoding: Decoding = ON_WHITE, side: int = 0) -> Image.Image:
    """The picture in RGB; raises BadImage.

    side: a JPEG may come at a fraction of its size, not below this many pixels; 0 for the whole.
    """
    return _upright(data, side, decoding.exif, partial(to_rgb, decoding=decoding))


def layered(data: bytes, side: int = 0) -> Image.Image:
    """The upright picture with its transparency, in RGBA, RGB or gray (L); raises BadImage.

    For those who store it again: what lies behind transparent pixels is chosen when it is read, as
    `rgb` does. The info holds `icc_profile` where the file has one. side: as in `rgb`.
    """
    return _upright(data, side, True, _with_transparency)


def _with_transparency(image: Image.Image) -> Image.Image:
    """An image of any of Pillow's modes in RGBA, RGB or L."""
    is_wide = image.mode == "F" or image.mode.startswith("I")
    if image.mode in ("1", "L") and not _has_transparency(image):
        return image.convert("L")
    if is_wide or not _has_transparency(image):
        return to_rgb(image)
    return image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")


def _upright(
    data: bytes, side: int, turn_it: bool, converted: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """The picture, converted and then turned; raises BadImage."""
    image = _open(data)
    try:
        with _quietly():
            if side:
                image.draft("RGB", (side, side))
            image.load()

            # Turned last: transparency and colours are of the stored pixels.
            turn = _TURNS.get(_orientation(image)) if turn_it else None
            picture = converted(image)
            if "icc_profile" in image.info:
                picture.info["icc_profile"] = image.info["icc_profile"]
            return picture if turn is None else picture.transpose(turn)
    except BadImage:
        raise
    # Pillow's readers raise OSError, SyntaxError, struct.error, EOFError, MemoryError and others.
    except Exception as error:
        raise _undecodable(image.format, error) from None


def to_rgb(image: Image.Image, decoding: Decoding = ON_WHITE) -> Image.Image:
    """An image of any of Pillow's modes in RGB, transparency composited.

    Raises BadImage for values without an agreed white.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_wide_gray(image, decoding)
    if not _has_transparency(image):
        return image if image.mode == "RGB" else image.convert("RGB")

    if image.mode == "La":  # premultiplied gray, from which Pillow knows one way
        image = image.convert("LA")
    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    # A picture without the alpha channel would show what lies hidden behind it.
    whole = Image.new("RGB", image.size, decoding.background)
    whole.paste(layer, mask=layer)
    return whole


def array(data: bytes, decoding: Decoding = ON_WHITE, shrink: int = 1) -> np.ndarray:
    """The pixels of `rgb` as uint8 [H, W, 3]; raises BadImage.

    shrink = 2, 4 or 8 gives a JPEG that `jpeg_size` knows at 1/shrink of its height and width,
    rounded up.
    """
    jpeg = _fast_jpeg(data)
    if jpeg is None:
        picture = rgb(data, decoding)
        try:
            return np.array(picture)  # a copy: tensors of it must be writable
        except MemoryError as error:
            raise _undecodable(None, error) from None

    height, width = (-(-side // shrink) for side in (jpeg.height, jpeg.width))
    try:
        pixels = decode_jpeg(data, min_height=height, min_width=width, min_factor=shrink)
    # simplejpeg raises ValueError for what it does not decode and MemoryError; which else, it does
    # not say, and one picture must not end a run.
    except Exception as error:
        raise _undecodable("JPEG", error) from None
    return _turned(pixels, jpeg.orientation()) if decoding.exif else pixels


def jpeg_size(data: bytes, decoding: Decoding = ON_WHITE) -> tuple[int, int] | None:
    """(height, width), upright, of a JPEG in gray or colours; None for all that is Pillow's.

    Raises BadImage for a giant.
    """
    jpeg = _fast_jpeg(data)
    if jpeg is None:
        return None
    sideways = decoding.exif and jpeg.orientation() in _SIDEWAYS
    return (jpeg.width, jpeg.height) if sideways else (jpeg.height, jpeg.width)


class _Jpeg(NamedTuple):
    """A JPEG that simplejpeg decodes, as its header describes it."""

    data: bytes
    height: int  # as stored
    width: int
    has_metadata: bool

    def orientation(self) -> int:
        """The Exif orientation, read by Pillow: nothing is turned by other rules than its own."""
        if not self.has_metadata:
            return 1
        try:
            with _quietly():
                return _orientation(Image.open(BytesIO(self.data), formats=("JPEG",)))
        # Whatever damaged metadata make Pillow raise: they never cost the picture.
        except Exception:
            return 1


def _fast_jpeg(data: bytes) -> _Jpeg | None:
    """A JPEG that simplejpeg decodes; None for all else. Raises BadImage for a costly one."""
    if not data.startswith(_JPEG):
        return None
    try:
        height, width, space, _ = decode_jpeg_header(data)
    # Pillow reads what simplejpeg refuses, or says what is wrong with it.
    except Exception:
        return None
    if space in ("CMYK", "YCCK"):
        return None

    limits.refuse_giant(height, width, "JPEG")
    markers = limits.read_markers(data)
    limits.refuse_slow_jpeg(height, width, len(data), markers)
    return _Jpeg(data, height, width, markers.has_metadata)


def _open(data: bytes) -> Image.Image:
    limits.refuse_tiles(data)

    try:
        with _quietly():
            image = Image.open(CountedBytes(data), formats=tuple(IMAGE_FORMATS))
    except BadImage:
        raise
    # Pillow's readers raise SyntaxError, struct.error, ValueError, OverflowError and others for
    # bytes that they did not expect.
    except Exception as error:
        raise BadImage(f"no readable image: {_why_unreadable(data, error)}") from None

    _refuse_costly(image, data)
    _scale_transparent_colour(image)
    return image


def _refuse_costly(image: ImageFile.ImageFile, data: bytes) -> None:
    """Raise BadImage for a picture, opened by Pillow, that needs too much time or memory."""
    height, width, n_bytes = image.height, image.width, len(data)
    if not data.startswith(_JPEG):
        assert image.format is not None  # every reader of Pillow's has a name
        limits.refuse_giant(height, width, image.format)
        codec = image.tile[0].codec_name if image.tile else ""
        compression = image.info.get("compression", "")
        limits.refuse_slow(height, width, n_bytes, image.format, codec, compression)
        return

    limits.refuse_giant(height, width, "JPEG")  # MPO, too, is one
    limits.refuse_slow_jpeg(height, width, n_bytes, limits.read_markers(data))
    if image.mode == "CMYK":
        limits.refuse_slow(height, width, n_bytes, "CMYK")


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep Pillow's warnings from the user: what matters of them becomes a BadImage."""
    with warnings.catch_warnings():
        # Only Pillow's: threads that decode side by side may leave this filter behind.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _why_unreadable(data: bytes, error: Exception) -> str:
    """Why bytes are no picture, in words: what they are, where that is known."""
    if not data:
        return "the file is empty"

    beginning = data[:64].lstrip()
    kind = next((name for start, name in _FOREIGN.items() if beginning.startswith(start)), "")
    if data[4:8] == b"ftyp" and data[8:12] not in (b"avif", b"avis"):
        kind = f"the container {data[8:12].decode('latin-1').strip()!r} (HEIC, or a film)"

    if kind:
        return f"found {kind}, expected {', '.join(IMAGE_FORMATS)}; convert it or leave it out"
    return str(error).split("<")[0].strip()[:100]


def _undecodable(kind: str | None, error: Exception) -> BadImage:
    reason = str(error) or type(error).__name__
    return BadImage(f"cannot decode the {kind or 'image'}: {reason[:100]}")


def _orientation(image: Image.Image) -> int:
    """The Exif orientation, 1 to 8; 1 where there is none or it is damaged."""
    try:
        # Not the PNG class's own: it would decode the whole picture to look for Exif behind it.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    # Exif is read by Pillow's TIFF reader, which raises anything for damaged bytes.
    except Exception:
        return 1
    return orientation if orientation in _TURNS else 1


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [H, W, 3] turned as Pillow turns a picture by `_TURNS`."""
    if orientation in _SIDEWAYS:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _has_transparency(image: Image.Image) -> bool:
    has_alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    return has_alpha or image.info.get("transparency") is not None


def _is_lossless(image: Image.Image, data: bytes) -> bool:
    """Whether a picture is stored without loss; what the header leaves open counts as lossy."""
    if image.format == "TIFF":
        return image.info.get("compression") not in ("jpeg", "tiff_jpeg", "webp")
    if image.format == "WEBP":
        # A simple file begins with its picture; an extended one has chunks before it.
        return b"VP8L" in _chunks(data)
    return image.format in ("PNG", "GIF", "BMP", "PPM")


def _chunks(data: bytes) -> list[bytes]:
    """The names of a WebP's chunks."""
    names = []
    position = 12
    while position + 8 <= len(data):
        names.append(data[position : position + 4])
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        position += 8 + size + size % 2
    return names


def _scale_transparent_colour(image: Image.Image) -> None:
    """Bring a PNG's transparent colour, which Pillow gives as stored, to the pixels' eight bits."""
    if not isinstance(image, PngImageFile) or not image.tile:
        return
    stored = image.info.get("transparency")
    if stored is None or isinstance(stored, bytes):  # none, or one value a palette's colour
        return

    raw_mode = image.tile[0].args
    if raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in stored)
    elif raw_mode in ("L;2", "L;4"):
        image.info["transparency"] = stored * {"L;2": 85, "L;4": 17}[raw_mode]


def _from_wide_gray(image: Image.Image, decoding: Decoding) -> Image.Image:
    """RGB of gray in floats or in more than eight bits."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not 0 <= low <= high <= 1:
            raise BadImage(
                f"floats from {low:g} to {high:g}; expected 0 to 1: "
                "save the picture with 8 or 16 bits"
            )
        gray = np.rint(values * 255)
    else:
        # Pillow gives a PNM's values of more than 8 bits as 0 to 65535, in 32 bits. Elsewhere 32
        # bits have no agreed white.
        dark = image.mode == "I" and image.format != "PPM" and high < 256
        if not 0 <= low <= high < 1 << 16 or dark:
            raise BadImage(
                f"integers from {low} to {high} in {values.itemsize * 8} bits; expected 16-bit "
                "values, of which the upper eight bits count: save the picture with 8 or 16 bits"
            )
        gray = values >> 8
        # Pillow inverts a TIFF's white-is-zero gray at 8 bits only; radiographs come so at 16.
        if isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            gray = 255 - gray

    picture = Image.fromarray(gray.astype(np.uint8)).convert("RGB")

    transparent = image.info.get("transparency")
    if transparent is not None:
        picture.paste(decoding.background, mask=Image.fromarray(values == transparent))
    return picture
