"""One way from bytes to RGB: every format and mode, against arithmetic written out here."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.data.material import encoded, picture
from vlp.config import Augment
from vlp.data import decode
from vlp.data.members import IMAGE_FORMATS, IMAGE_TYPES
from vlp.data.picture import BadImage, array, header, rgb, to_rgb
from vlp.types import ON_WHITE, Decoding, ImageSpec

BLUE = Decoding(background=(10, 60, 200))
PHOTO = picture(1, (50, 40))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def on(background: tuple[int, int, int], colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """`colours` [H, W, 3] over a background by `alpha` [H, W] of 0 to 255, rounded."""
    share = alpha[..., None] / 255
    return np.rint(share * colours + (1 - share) * np.asarray(background)).astype(np.uint8)


def every_reader(data: bytes, decoding: Decoding = ON_WHITE) -> list[np.ndarray]:
    """What training, evaluation and the tools see of a picture, each [H, W, 3]."""
    height, width = array(data, decoding).shape[:2]
    spec = ImageSpec((height, width), resize="squash", decoding=decoding)
    whole = Augment(scale=(1.0, 1.0), ratio=(width / height,) * 2)
    trained = decode.train_transform(data, spec, whole, random.Random(0))
    shown = [trained, decode.decode(data, decoding), decode.eval_transform(data, spec)]
    return [
        *(tensor.permute(1, 2, 0).numpy() for tensor in shown),
        np.asarray(rgb(data, decoding)),
        array(data, decoding),
    ]


def assert_all_see(
    data: bytes, expected: np.ndarray, decoding: Decoding = ON_WHITE, atol: int = 0
) -> None:
    seen = every_reader(data, decoding)
    assert len(seen) == 5
    for found in seen:
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= atol
        assert np.array_equal(found, seen[0])


# ---- formats

SAVED = {  # format -> how it is written without loss
    "PNG": {},
    "BMP": {},
    "GIF": {},
    "TIFF": {},
    "PPM": {},
    "WEBP": {"lossless": True},
    "JPEG2000": {"irreversible": False},
    "JPEG": {"quality": 95},
    "AVIF": {"quality": 95},
}


def turned(orientation: int, name: str = "JPEG", image: Image.Image = PHOTO) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, name, exif=exif, **SAVED.get(name, {}))


@pytest.mark.parametrize("name", IMAGE_FORMATS)
def test_every_format_is_told_by_its_content(name):
    image = PHOTO.convert("P") if name == "GIF" else PHOTO
    data = encoded(image, name, **SAVED[name])
    expected = pixels(Image.open(io.BytesIO(data)))
    assert_all_see(data, expected)
    assert np.abs(expected.astype(int) - pixels(image)).mean() < (
        3 if name in ("JPEG", "AVIF") else 0.01
    )
    # Whether a JPEG 2000 has lost something is not in what Pillow tells of its header.
    is_lossless = name not in ("JPEG", "AVIF", "JPEG2000")
    assert header(data) == (50, 40, False, False, name, is_lossless)


def test_every_format_is_listed_once_and_with_its_extensions():
    assert set(SAVED) == set(IMAGE_FORMATS)
    extensions = [extension for names in IMAGE_FORMATS.values() for extension in names]
    assert len(extensions) == len(set(extensions)) == len(IMAGE_TYPES)
    assert {"jpg", "jpeg", "jfif", "tif", "tiff", "avif", "ppm", "pgm", "pbm", "pnm"} <= IMAGE_TYPES


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("kind", "mode"), [("pbm", "1"), ("pgm", "L"), ("ppm", "RGB")])
def test_portable_pixmaps_in_both_forms(kind, mode, plain):
    image = PHOTO.convert(mode)
    data = encoded(image, "PPM")
    if plain:
        values = np.asarray(image).astype(int)
        values = 1 - values if mode == "1" else values
        magic = {"pbm": "P1", "pgm": "P2", "ppm": "P3"}[kind]
        largest = "" if mode == "1" else "255"
        data = f"{magic}\n50 40\n{largest}\n{' '.join(map(str, values.ravel()))}\n".encode()
    assert_all_see(data, pixels(image))


@pytest.mark.parametrize(
    "compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"]
)
def test_compressed_tiffs(compression):
    data = encoded(PHOTO, "TIFF", compression=compression)
    assert_all_see(data, pixels(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("name", ["WEBP", "GIF", "TIFF", "PNG", "AVIF", "MPO"])
def test_the_first_of_several_pictures_counts(name):
    options = (
        {"lossless": True} if name == "WEBP" else {"quality": 95} if name in ("AVIF", "MPO") else {}
    )
    first = PHOTO.convert("P") if name == "GIF" else PHOTO
    data = encoded(
        first,
        name,
        save_all=True,
        append_images=[ImageOps.invert(PHOTO).convert(first.mode)],
        **options,
    )
    assert Image.open(io.BytesIO(data)).n_frames == 2
    found = every_reader(data)[0].astype(int)
    assert np.abs(found - pixels(first)).mean() < 3


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"%PDF-1.7\n", "a PDF"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"  <!DOCTYPE html><html></html>", "HTML"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "'heic'"),
        (
            b"\xd7\xcd\xc6\x9a" + bytes(40),
            "no readable image",
        ),  # WMF, which Pillow hands to Windows
        (b"8BPS\0\1" + bytes(40), "a Photoshop document"),
        (b"\x1f\x8b\x08" + bytes(40), "gzip"),
        (encoded(PHOTO, "ICO"), "no readable image"),
    ],
)
def test_what_is_no_picture_or_runs_programs_is_never_opened_and_named(data, said):
    with pytest.raises(BadImage, match=said):
        array(data)
    with pytest.raises(BadImage, match=said):
        header(data)


# ---- modes

GRAY = np.asarray(PHOTO.convert("L"))
ALPHA = np.linspace(0, 255, 50).round().astype(np.uint8)[None].repeat(40, 0)
COLOURS = np.asarray(PHOTO)


@pytest.mark.parametrize(
    "name", ["1", "L", "P", "CMYK jpeg", "CMYK tiff", "YCbCr tiff", "gray jpeg", "RGB"]
)
def test_opaque_modes_are_as_pillow_converts_them(name):
    mode, _, form = name.partition(" ")
    mode = "L" if mode == "gray" else mode
    data = encoded(PHOTO.convert(mode), form.upper() or "PNG")
    assert_all_see(data, pixels(Image.open(io.BytesIO(data))))
    assert not header(data).transparent


@pytest.mark.parametrize("decoding", [Decoding(), BLUE], ids=["white", "blue"])
@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_alpha_is_composited_on_the_background(form, decoding):
    image = PHOTO.copy()
    image.putalpha(Image.fromarray(ALPHA))
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    data = encoded(image, form, **options)
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    assert_all_see(data, on(decoding.background, stored[..., :3], stored[..., 3]), decoding, atol=1)
    assert header(data).transparent
    if form == "AVIF":  # its alpha is lossy
        return
    invisible = every_reader(data, decoding)[0][:, 0]
    assert np.array_equal(invisible, np.broadcast_to(decoding.background, invisible.shape))


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "RGBa", "La"])
def test_every_mode_with_alpha_is_composited(mode):
    image = PHOTO.convert("L")
    if mode == "PA":
        image = image.convert("P")
    image.putalpha(Image.fromarray(ALPHA))
    if mode.startswith("RGB"):
        image = image.convert("RGBA")
    image = image.convert(mode)
    assert image.mode == mode
    colours = GRAY[..., None].repeat(3, -1)
    for decoding in (Decoding(), BLUE):
        found = np.asarray(to_rgb(image, decoding)).astype(int)
        # Premultiplied colours are stored rounded, so the darkest alphas come back a few levels
        # off.
        assert np.abs(found - on(decoding.background, colours, ALPHA)).max() <= (
            2 if mode.endswith("a") else 1
        )


def test_composition_is_that_of_transformers():
    from transformers import image_transforms as transforms

    values, alpha = np.mgrid[:256, :256].astype(np.uint8)
    image = Image.fromarray(np.stack([values, values, values, alpha], -1))
    assert np.array_equal(
        np.asarray(to_rgb(image)), transforms.convert_to_rgb(image, return_numpy=True)
    )


PNG = b"\x89PNG\r\n\x1a\n"


def chunk(name: bytes, content: bytes) -> bytes:
    """A part of a PNG file."""
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


def transparent_png(image: Image.Image, transparency: bytes) -> bytes:
    """The picture as PNG with a tRNS chunk before its data."""
    data = encoded(image)
    at = data.index(b"IDAT") - 4
    return data[:at] + chunk(b"tRNS", transparency) + data[at:]


def raw_png(rows: np.ndarray, depth: int, colour_type: int, transparency: bytes) -> bytes:
    """A PNG of rows of packed bytes [H, bytes]; width in pixels is told by `depth`."""
    bits = 8 * rows.shape[1] // (3 if colour_type == 2 else 1)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", bits // depth, len(rows), depth, colour_type, 0, 0, 0),
        b"tRNS": transparency,
        b"IDAT": zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)),
        b"IEND": b"",
    }
    return PNG + b"".join(chunk(name, content) for name, content in chunks.items())


def test_transparent_colours_of_pngs_are_background():
    gray = np.full((4, 6), 9, np.uint8)
    gray[1, 2] = 200
    colour = np.stack([gray, gray, gray + 1], -1)
    cases = {
        "L": (transparent_png(Image.fromarray(gray), struct.pack(">H", 200)), [9, 9, 9]),
        "RGB": (
            transparent_png(Image.fromarray(colour), struct.pack(">3H", 200, 200, 201)),
            [9, 9, 10],
        ),
        "I;16": (
            transparent_png(
                Image.fromarray(gray.astype(np.uint16) * 257), struct.pack(">H", 200 * 257)
            ),
            [9, 9, 9],
        ),
    }
    palette = Image.fromarray(colour).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    alphas = bytes(0 if i == palette.getpixel((2, 1)) else 255 for i in range(2))
    cases["P"] = (transparent_png(palette, alphas), [9, 9, 10])
    assert len(cases) == 4
    for mode, (data, opaque) in cases.items():
        expected = np.broadcast_to(np.array(opaque, np.uint8), (4, 6, 3)).copy()
        expected[1, 2] = BLUE.background
        assert Image.open(io.BytesIO(data)).mode == mode
        assert header(data).transparent
        assert_all_see(data, expected, BLUE)


def test_transparent_colours_count_at_the_depth_they_are_stored_in():
    shown = {}
    # 4 bits: the second pixel of each row is 5, shown as 85.
    shown["L;4"] = (
        raw_png(np.array([[0x25, 0x2F]] * 2, np.uint8), 4, 0, struct.pack(">H", 5)),
        [34, None, 34, 255],
    )
    # 2 bits: 0 1 2 3.
    shown["L;2"] = (
        raw_png(np.array([[0b00011011]] * 2, np.uint8), 2, 0, struct.pack(">H", 1)),
        [0, None, 170, 255],
    )
    wide = np.array([[10 * 257] * 3, [200 * 257] * 3], ">u2").reshape(1, -1)
    row = np.frombuffer(wide.tobytes(), np.uint8).reshape(1, -1)
    shown["RGB;16"] = (raw_png(row, 16, 2, struct.pack(">3H", *[200 * 257] * 3)), [10, None])
    assert len(shown) == 3
    for name, (data, expected) in shown.items():
        for found in every_reader(data, BLUE):
            for value, seen in zip(expected, found[0].tolist(), strict=True):
                assert seen == (list(BLUE.background) if value is None else [value] * 3), name


@pytest.mark.parametrize(
    "name",
    ["PNG", "TIFF", "TIFF big-endian", "PGM", "PGM of 12 bits", "TIFF of 32 bits", "negative TIFF"],
)
def test_sixteen_bit_gray_is_its_upper_eight_bits(name):
    values = GRAY.astype(np.uint16) * 256 + 77
    expected = GRAY
    if name == "TIFF big-endian":
        data = encoded(Image.frombytes("I;16B", (50, 40), values.astype(">u2").tobytes()), "TIFF")
    elif name == "PGM":
        data = b"P5\n50 40\n65535\n" + values.astype(">u2").tobytes()
    elif name == "PGM of 12 bits":
        data = b"P5\n50 40\n4095\n" + (values >> 4).astype(">u2").tobytes()
        expected = ((values >> 4) / 4095 * 65535).round().astype(int) >> 8
    elif name == "TIFF of 32 bits":
        data = encoded(Image.fromarray(values.astype(np.int32)), "TIFF")
    elif name == "negative TIFF":
        data = encoded(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
        expected = 255 - GRAY
    else:
        data = encoded(Image.fromarray(values), name)
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    assert_all_see(data, np.asarray(expected)[..., None].repeat(3, -1).astype(np.uint8))


def test_floats_are_read_between_0_and_1():
    data = encoded(Image.fromarray((GRAY / 255).astype(np.float32)), "TIFF")
    assert Image.open(io.BytesIO(data)).mode == "F"
    assert_all_see(data, GRAY[..., None].repeat(3, -1))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (GRAY.astype(np.float32), "floats from .* to .*; expected 0 to 1: save"),
        (np.full((4, 4), np.nan, np.float32), "floats from nan"),
        (
            np.full((4, 4), 70_000, np.int32),
            "integers from 70000 to 70000 in 32 bits; expected 16-bit",
        ),
        (np.full((4, 4), -1, np.int32), "integers from -1 to"),
        (np.full((4, 4), 200, np.int32), "integers from 200 to 200 in 32 bits"),
    ],
)
def test_values_without_an_agreed_white_are_refused(values, said):
    data = encoded(Image.fromarray(values), "TIFF")
    for read in (array, rgb, lambda data: decode.eval_transform(data, ImageSpec((32, 32)))):
        with pytest.raises(BadImage, match=said):
            read(data)


@pytest.mark.parametrize("mode", ["LAB", "HSV"])
def test_other_colour_spaces(mode):
    image = PHOTO.convert(mode)
    assert np.abs(np.asarray(to_rgb(image)).astype(int) - np.asarray(PHOTO)).mean() < 3
    if mode == "LAB":
        assert_all_see(encoded(image, "TIFF"), np.asarray(to_rgb(image)))


def test_a_jpeg_of_ycck():
    """Adobe's inverted CMYK in YCC: libjpeg unpacks it, as it does for Pillow."""
    data = bytearray(encoded(PHOTO.convert("CMYK"), "JPEG"))
    adobe = data.index(b"Adobe")
    data[adobe + 11] = 2  # the transform: YCCK
    assert_all_see(bytes(data), pixels(Image.open(io.BytesIO(bytes(data)))))


def test_a_background_is_three_values_of_a_byte():
    for wrong in ((256, 0, 0), (-1, 0, 0), (0, 0)):
        with pytest.raises(
            ValueError, match=r"background is .*; expected red, green and blue of 0 to 255"
        ):
            Decoding(background=wrong)


# ---- tools


def test_tools_look_at_upright_pictures_of_every_kind(tmp_path):
    from vlp.data.format import ShardWriter
    from vlp.data_tools import inspect, stats, validate
    from vlp.data_tools.dedup.near import fingerprint

    clear = PHOTO.copy()
    clear.putalpha(Image.fromarray(ALPHA))
    members = {
        "jpg": turned(6),
        "tif": encoded(PHOTO, "TIFF"),
        "png": encoded(clear),
        "avif": encoded(PHOTO, "AVIF"),
    }
    with ShardWriter(tmp_path / "in", 10) as writer:
        for kind, data in members.items():
            writer.add(kind, data, kind, ["a caption"])
    summary = inspect.summarise(str(tmp_path / "in"), 10)
    assert (summary["turned_by_exif"], summary["with_transparency"]) == (1, 1)
    assert summary["unreadable_images"] == [] and summary["samples_read"] == 4
    [shard] = (tmp_path / "in").glob("*.tar")
    assert validate.check_shard((0, shard))["samples"] == 4
    assert dict(stats.count((0, shard))["width"]) == {40: 1, 50: 3}

    deep = encoded(Image.fromarray(GRAY.astype(np.uint16) * 257))
    flat = encoded(Image.fromarray(GRAY))
    assert fingerprint(rgb(deep, side=64))[0] == fingerprint(rgb(flat, side=64))[0] != 0
