"""One way from bytes to RGB: formats and modes against arithmetic written out here, damage, bombs."""

from __future__ import annotations

import io
import random
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.data.material import encoded, picture
from vlp.config import Augment
from vlp.data import decode
from vlp.data.members import IMAGE_FORMATS, IMAGE_TYPES
from vlp.data.picture import MAX_SCANS, BadImage, array, header, jpeg_size, rgb, to_rgb
from vlp.types import ON_WHITE, Decoding, ImageSpec

BLUE = Decoding(background=(10, 60, 200))
AS_STORED = Decoding(exif=False)
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
    trained = decode.train(data, spec, whole, random.Random(0))
    shown = [trained, decode.decode(data, decoding), decode.evaluate(data, spec)]
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
    "PNG": {}, "BMP": {}, "GIF": {}, "TIFF": {}, "PPM": {}, "WEBP": {"lossless": True}, "JPEG2000": {"irreversible": False},
    "JPEG": {"quality": 95}, "AVIF": {"quality": 95},
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGE_FORMATS)
def test_every_format_is_told_by_its_content(name):
    image = PHOTO.convert("P") if name == "GIF" else PHOTO
    data = encoded(image, name, **SAVED[name])
    expected = pixels(Image.open(io.BytesIO(data)))
    assert_all_see(data, expected)
    assert np.abs(expected.astype(int) - pixels(image)).mean() < (
        3 if name in ("JPEG", "AVIF") else 0.01
    )
    assert header(data) == (50, 40, False, False)


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
        # Premultiplied colours are stored rounded, so the darkest alphas come back a few levels off.
        assert np.abs(found - on(decoding.background, colours, ALPHA)).max() <= (
            2 if mode.endswith("a") else 1
        )


def test_composition_is_that_of_transformers():
    transforms = pytest.importorskip("transformers.image_transforms")
    values, alpha = np.mgrid[:256, :256].astype(np.uint8)
    image = Image.fromarray(np.stack([values, values, values, alpha], -1))
    assert np.array_equal(
        np.asarray(to_rgb(image)), transforms.convert_to_rgb(image, return_numpy=True)
    )


def transparent_png(image: Image.Image, transparency: bytes) -> bytes:
    """The picture as PNG with a tRNS chunk before its data."""
    data = encoded(image)
    chunk = b"tRNS" + transparency
    whole = struct.pack(">I", len(transparency)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    at = data.index(b"IDAT") - 4
    return data[:at] + whole + data[at:]


def raw_png(rows: np.ndarray, depth: int, colour_type: int, transparency: bytes) -> bytes:
    """A PNG of rows of packed bytes [H, bytes]; width in pixels is told by `depth`."""
    bits = 8 * rows.shape[1] // (3 if colour_type == 2 else 1)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", bits // depth, len(rows), depth, colour_type, 0, 0, 0),
        b"tRNS": transparency,
        b"IDAT": zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)),
        b"IEND": b"",
    }
    body = b""
    for name, content in chunks.items():
        body += (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )
    return b"\x89PNG\r\n\x1a\n" + body


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
    for read in (array, rgb, lambda data: decode.evaluate(data, ImageSpec((32, 32)))):
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


# ---- orientation


def turned(orientation: int, name: str = "JPEG", image: Image.Image = PHOTO) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, name, exif=exif, **SAVED.get(name, {}))


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_pictures_are_turned_as_their_exif_says(name):
    n_turned = 0
    for orientation in range(1, 9):
        data = turned(orientation, name)
        upright = pixels(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        assert_all_see(data, upright)
        seen = header(data)
        assert (seen.height, seen.width) == upright.shape[:2]
        assert seen.turned == (orientation != 1)
        n_turned += seen.turned
        if name == "TIFF":  # its orientation is no Exif, but what the format says
            continue
        stored = pixels(Image.open(io.BytesIO(data)))
        assert stored.shape == (40, 50, 3)
        assert_all_see(data, stored, AS_STORED)
        assert header(data, AS_STORED)[:2] == (50, 40)
    assert n_turned == 7


def test_an_orientation_in_xmp_counts_as_pillow_counts_it():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(PHOTO, "JPEG", xmp=xmp)
    upright = pixels(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert upright.shape == (50, 40, 3)
    assert_all_see(data, upright)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_training_crops_show_the_same_part_of_a_turned_picture(orientation, scaled):
    """The crop of a picture stored turned is that of the same picture stored upright."""
    image = picture(4, (640, 480))
    undo = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    by_exif = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Pillow's numbers of the transpositions
    stored = image if orientation == 1 else image.transpose(Image.Transpose(by_exif[undo]))
    data = turned(orientation, image=stored)
    assert np.abs(array(data).astype(int) - np.asarray(image)).mean() < 4
    spec, augment = ImageSpec((56, 56)), Augment(scale=(0.5, 1.0), scaled_decoding=scaled)
    n_crops = 0
    for seed in range(5):
        expected = decode.random_crop(
            torch.from_numpy(np.array(image)).permute(2, 0, 1), spec, augment, random.Random(seed)
        )
        found = decode.train(data, spec, augment, random.Random(seed))
        difference = (found.int() - expected.int()).abs().float().mean()
        assert difference < (found.int() - expected.flip(-1).int()).abs().float().mean() / 4
        assert difference < (found.int() - expected.roll(3, -1).int()).abs().float().mean()
        n_crops += 1
    assert n_crops == 5


@pytest.mark.parametrize("name", ["JPEG", "MPO", "PNG", "WEBP"])
def test_damaged_exif_never_costs_the_picture(name):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    options = {"WEBP": {"lossless": True}, "MPO": {"save_all": True, "append_images": [PHOTO]}}.get(
        name, {}
    )
    data = encoded(PHOTO, name, exif=exif, **options)
    start, size = data.index(b"MM\0*"), len(exif.tobytes()) - len(b"Exif\0\0")
    chance = random.Random(0)
    n_upright = 0
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(chance.randrange(1, 6)):
            damaged[start + chance.randrange(size)] = chance.randrange(256)
        if name == "PNG":
            at = data.index(b"eXIf")
            length = int.from_bytes(data[at - 4 : at], "big")
            damaged[at + 4 + length : at + 8 + length] = struct.pack(
                ">I", zlib.crc32(damaged[at : at + 4 + length])
            )
        seen = every_reader(bytes(damaged))
        assert all(np.array_equal(found, seen[0]) for found in seen)
        assert seen[0].shape in ((50, 40, 3), (40, 50, 3))
        n_upright += seen[0].shape == (50, 40, 3)
    assert 20 < n_upright < 200  # some lost their orientation, and not all


# ---- limits


def chunked_png(width: int, height: int, extra: bytes = b"") -> bytes:
    """A PNG that claims this size in gray of 1 bit, with all its data where it is little."""
    rows = zlib.compress(bytes((1 + -(-width // 8)) * height), 9) if width * height < 10**8 else b""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = b""
    for name, content in ((b"IHDR", head), (b"zTXt", extra), (b"IDAT", rows), (b"IEND", b"")):
        if content or name == b"IEND":
            body += (
                struct.pack(">I", len(content))
                + name
                + content
                + struct.pack(">I", zlib.crc32(name + content))
            )
    return b"\x89PNG\r\n\x1a\n" + body


def tiff_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("L", (16, 16)), "TIFF"))
    for tag, value in ((256, width), (257, height)):
        at = next(
            data.index(start)
            for start in (struct.pack("<HH", tag, kind) for kind in (3, 4))
            if start in data
        )
        data[at : at + 12] = struct.pack("<HHII", tag, 4, 1, value)
    return bytes(data)


def avif_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(PHOTO, "AVIF"))
    at = data.index(b"ispe") + 8
    data[at : at + 8] = struct.pack(">II", width, height)
    return bytes(data)


BOMBS = {
    "99,000,000 × 1": chunked_png(99_000_000, 1),
    "1 × 80,000,000": chunked_png(1, 80_000_000),
    "70,000 × 2": chunked_png(70_000, 2),
    "60,000 × 60,000": chunked_png(60_000, 60_000),
    "TIFF": tiff_of(40_000, 40_000),
    "AVIF": avif_of(60_000, 60_000),
    "BMP": b"BM" + struct.pack("<IIIIiiHH", 100, 0, 54, 40, 60_000, 60_000, 1, 24) + bytes(100),
    "GIF": b"GIF89a" + struct.pack("<HH", 65_000, 65_000) + b"\x80\0\0" + bytes(6)
    + b",\0\0\0\0" + struct.pack("<HH", 65_000, 65_000),
    "PPM": b"P6\n60000 60000\n255\n",
    "WebP": b"RIFF\x1e\0\0\0WEBPVP8L\x11\0\0\0\x2f\xff\xff\xff\x0f" + bytes(16),
    "zTXt": chunked_png(8, 8, b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_anything_is_decoded(name):
    data = BOMBS[name]
    assert len(data) < 250_000
    for read in (array, rgb, header):
        started = time.process_time()
        with pytest.raises(BadImage):
            read(data)
        assert time.process_time() - started < 0.2


def test_running_out_of_memory_is_a_bad_picture(monkeypatch):
    def exhausted(*_, **__):
        raise MemoryError

    png, jpeg = encoded(PHOTO), encoded(PHOTO, "JPEG")
    monkeypatch.setattr("vlp.data.picture.decode_jpeg", exhausted)
    with pytest.raises(BadImage, match="cannot decode the JPEG: MemoryError"):
        array(jpeg)
    monkeypatch.setattr(Image.Image, "__array_interface__", property(exhausted))
    with pytest.raises(BadImage, match="MemoryError"):
        array(png)
    monkeypatch.setattr(Image.Image, "convert", exhausted)
    with pytest.raises(BadImage, match="cannot decode the PNG: MemoryError"):
        array(encoded(Image.new("L", (4, 4))))


def many_scans(n: int) -> bytes:
    """A progressive JPEG whose last scan is repeated until there are n."""
    data = encoded(picture(2, (200, 160)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    return data[:-2] + scan * (n - data.count(b"\xff\xda")) + data[-2:]


def test_jpegs_of_absurdly_many_scans_are_refused_at_once():
    data = many_scans(2000)
    started = time.process_time()
    for read in (array, jpeg_size, rgb, header):
        with pytest.raises(BadImage, match=f"a JPEG of 2000 scans, more than {MAX_SCANS}"):
            read(data)
    assert time.process_time() - started < 0.1
    inverted = bytearray(encoded(PHOTO.convert("CMYK"), "JPEG", progressive=True))  # Pillow's way
    inverted[-2:-2] = inverted[inverted.rindex(b"\xff\xda") : -2] * 200
    with pytest.raises(BadImage, match="scans"):
        array(bytes(inverted))
    ordinary = encoded(PHOTO, "JPEG", progressive=True)
    assert 5 < ordinary.count(b"\xff\xda") < 20
    assert_all_see(ordinary, pixels(Image.open(io.BytesIO(ordinary))))


def test_rare_forms_that_are_slow_to_read_are_refused_when_large(monkeypatch):
    monkeypatch.setattr("vlp.data.picture.MAX_SLOW_BYTES", 1000)
    numbers = " ".join(["7"] * 3 * 600)
    with pytest.raises(BadImage, match="a rare form of PPM, which is slow to read; save it as PNG"):
        array(f"P3\n30 20\n255\n{numbers}\n".encode())
    assert array(encoded(PHOTO, "PPM")).shape == (40, 50, 3)


def half(name: str) -> bytes:
    data = encoded(picture(1, (200, 160)), name)
    return data[: len(data) // 2]


BROKEN = {
    "empty": b"", "text": b"not found", "zeros": bytes(5000), "pickle": b"\x80\x04\x95\x10",
    "no end": encoded(picture(1, (200, 160)), "JPEG")[:-2], "header only": encoded(picture(1, (200, 160)), "JPEG")[:300],
    **{f"half {name}": half(name) for name in IMAGE_FORMATS},
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_refused_never_half_shown(name):
    for read in (
        array,
        rgb,
        decode.decode,
        lambda data: decode.evaluate(data, ImageSpec((224, 224))),
    ):
        with pytest.raises(BadImage, match=r"\w+"):
            read(BROKEN[name])


@pytest.mark.parametrize("cases", [300, pytest.param(6000, marks=pytest.mark.slow)])
def test_mutated_pictures_decode_or_are_refused(cases):
    """Whatever bytes are changed, cut or repeated: pixels of the header's size, or a BadImage."""
    chance = random.Random(cases)
    originals = [
        encoded(PHOTO.convert("P") if name == "GIF" else PHOTO, name) for name in IMAGE_FORMATS
    ]
    originals += [many_scans(20), turned(6)]
    n_decoded = n_refused = 0
    for i in range(cases):
        data = bytearray(originals[i % len(originals)])
        for _ in range(chance.randrange(1, 4)):
            at, length = chance.randrange(len(data)), chance.choice([1, 2, 8, 50])
            change = chance.randrange(3)
            if change == 0:
                data[at : at + length] = chance.randbytes(length)
            elif change == 1:
                del data[at : at + length]
            else:
                data[at:at] = data[at : at + length]
        try:
            seen = array(bytes(data))
        except BadImage:
            n_refused += 1
        else:
            n_decoded += 1
            assert seen.dtype == np.uint8 and seen.ndim == 3 and seen.shape[2] == 3
            assert (header(bytes(data)).height, header(bytes(data)).width) == seen.shape[:2]
    assert n_decoded + n_refused == cases
    assert min(n_decoded, n_refused) > cases / 10


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
    from vlp.data_tools._near import fingerprint

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
