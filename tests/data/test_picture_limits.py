"""Bombs, slow files, damage and lack of memory: each is refused in time, and costs one picture
only.
"""

from __future__ import annotations

import contextlib
import io
import random
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.data.material import encoded, picture
from tests.data.test_picture import PHOTO, PNG, assert_all_see, chunk, pixels, turned
from vlp.data import decode
from vlp.data.members import IMAGE_FORMATS
from vlp.data.picture import BadImage, array, header, jpeg_size, rgb
from vlp.data.picture_limits import MAX_SCANS
from vlp.types import ImageSpec


def chunked_png(width: int, height: int, extra: bytes = b"") -> bytes:
    """A PNG that claims this size in gray of 1 bit, with all its data where it is little."""
    rows = zlib.compress(bytes((1 + -(-width // 8)) * height), 9) if width * height < 10**8 else b""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    text = chunk(b"zTXt", extra) if extra else b""
    return PNG + chunk(b"IHDR", head) + text + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


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


def tiff_of_tiles(side: int) -> bytes:
    """A gray TIFF in tiles of one pixel."""
    n_tiles, start = side * side, 8 + 2 + 10 * 12 + 4
    tags = [(256, 1, side), (257, 1, side), (258, 1, 8), (259, 1, 1), (262, 1, 1), (277, 1, 1)]
    tags += [(322, 1, 1), (323, 1, 1), (324, n_tiles, start), (325, n_tiles, start + 4 * n_tiles)]
    entries = b"".join(struct.pack("<HHII", tag, 4, n, value) for tag, n, value in tags)
    places = struct.pack("<I", start) * n_tiles + struct.pack("<I", 1) * n_tiles
    return b"II*\0\x08\0\0\0\x0a\0" + entries + bytes(4) + places


JPEG = encoded(PHOTO, "JPEG")
PROGRESSIVE = encoded(PHOTO, "JPEG", progressive=True)
PNG_8 = encoded(Image.new("RGB", (8, 8)), "PNG")
BOMBS = {
    "99,000,000 × 1": chunked_png(99_000_000, 1),
    "1 × 80,000,000": chunked_png(1, 80_000_000),
    "70,000 × 2": chunked_png(70_000, 2),
    "60,000 × 60,000": chunked_png(60_000, 60_000),
    "TIFF": tiff_of(40_000, 40_000),
    "AVIF": avif_of(60_000, 60_000),
    "BMP": b"BM" + struct.pack("<IIIIiiHH", 100, 0, 54, 40, 60_000, 60_000, 1, 24) + bytes(100),
    "GIF": b"GIF89a"
    + struct.pack("<HH", 65_000, 65_000)
    + b"\x80\0\0"
    + bytes(6)
    + b",\0\0\0\0"
    + struct.pack("<HH", 65_000, 65_000),
    "PPM": b"P6\n60000 60000\n255\n",
    "WebP": b"RIFF\x1e\0\0\0WEBPVP8L\x11\0\0\0\x2f\xff\xff\xff\x0f" + bytes(16),
    "zTXt": chunked_png(8, 8, b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9)),
}


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
        with pytest.raises(BadImage, match=f"a JPEG of more than {MAX_SCANS} scans"):
            read(data)
    assert time.process_time() - started < 0.1
    inverted = bytearray(encoded(PHOTO.convert("CMYK"), "JPEG", progressive=True))  # Pillow's way
    inverted[-2:-2] = inverted[inverted.rindex(b"\xff\xda") : -2] * 200
    with pytest.raises(BadImage, match="scans"):
        array(bytes(inverted))
    with pytest.raises(BadImage, match="scans"):  # an end in a comment is none
        array(data.replace(b"\xff\xda", b"\xff\xfe\0\4\xff\xd9\xff\xda"))
    ordinary = encoded(PHOTO, "JPEG", progressive=True)
    film = ordinary + b"\xff\xda\0\2" * 5000  # behind the picture's end, as phones append one
    assert np.array_equal(array(film), array(ordinary))
    assert 5 < ordinary.count(b"\xff\xda") < 20
    assert_all_see(ordinary, pixels(Image.open(io.BytesIO(ordinary))))


IN_STEPS = {
    "PNG, empty parts": PNG_8[:-12] + chunk(b"IDAT", b"") * 200_000 + PNG_8[-12:],
    "PNG, notes": PNG_8[:33] + chunk(b"tEXt", b"a\0b") * 200_000 + PNG_8[33:],
    "JPEG, comments": JPEG[:2] + b"\xff\xfe\0\2" * 500_000 + JPEG[2:],
    "JPEG, Exif": JPEG[:2] + b"\xff\xe1\0\2" * 500_000 + JPEG[2:],
    "JPEG, fill bytes": JPEG[:2] + b"\xff" * 4_000_000 + JPEG[2:],
    "JPEG, markers": PROGRESSIVE[:-2] + b"\xff\xfe\0\2" * 500_000 + PROGRESSIVE[-2:],
    "GIF": b"GIF89a\x08\0\x08\0\0\0\0" + b"!\1\1a\0" * 400_000 + b",",
    "PPM, comment": b"P6\n#" + b"a" * 8_000_000 + b"\n4 4\n255\n" + bytes(48),
    "PGM, read in Python": b"P5\n2800 2800\n200\n" + bytes(2800 * 2800),
    "TIFF, tiles": tiff_of_tiles(700),
}


@pytest.mark.parametrize("name", IN_STEPS)
def test_pictures_that_readers_walk_through_in_small_steps_are_refused_in_time(name):
    started = time.process_time()
    with pytest.raises(BadImage, match=r"slow to read|takes about 4.3 s to decode"):
        array(IN_STEPS[name])
    assert time.process_time() - started < 1
    with contextlib.suppress(BadImage):  # of a PNG the header comes before its parts
        header(IN_STEPS[name])
    assert time.process_time() - started < 2


def test_the_limit_is_that_of_the_environment(monkeypatch):
    numbers = " ".join(["7"] * 3 * 600)
    plain = f"P3\n30 20\n255\n{numbers}\n".encode()
    assert array(plain).shape == (20, 30, 3)
    monkeypatch.setenv("VLP_DECODE_LIMIT", "0.001")
    with pytest.raises(BadImage, match=r"a PPM of 30×20 pixels .* set VLP_DECODE_LIMIT=2 or more"):
        array(plain)
    assert array(encoded(PHOTO, "PPM")).shape == (40, 50, 3)
    monkeypatch.setenv("VLP_DECODE_LIMIT", "much")
    with pytest.raises(RuntimeError, match="VLP_DECODE_LIMIT is 'much'; expected a number"):
        array(plain)

    large = chunked_png(7_100, 7_100)
    monkeypatch.setenv("VLP_DECODE_LIMIT", "1")
    with pytest.raises(BadImage, match="an image of 7100×7100 pixels, more than 50000000"):
        header(large)
    monkeypatch.setenv("VLP_DECODE_LIMIT", "1.1")
    assert header(large).width == 7_100


NOISE = {
    "JPEG": ("JPEG", {"quality": 95}),
    "JPEG, every coefficient": ("JPEG", {"quality": 100, "subsampling": 0}),
    "JPEG, progressive": ("JPEG", {"quality": 95, "progressive": True}),
    "PNG": ("PNG", {"compress_level": 1}),
    "WebP": ("WEBP", {"quality": 95, "method": 0}),
    "WebP, lossless": ("WEBP", {"lossless": True, "method": 0}),
    "GIF": ("GIF", {}),
    "BMP": ("BMP", {}),
    "TIFF, LZW": ("TIFF", {"compression": "tiff_lzw"}),
    "AVIF": ("AVIF", {"quality": 90, "speed": 10}),
    "JPEG 2000": ("JPEG2000", {}),
}
LIMITS = [0.02, pytest.param(0.2, marks=pytest.mark.slow)]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", NOISE)
def test_no_accepted_picture_takes_longer_than_the_limit(name, limit, monkeypatch):
    """Noise is the slowest to decode; of each format the largest that the limit lets in."""
    monkeypatch.setenv("VLP_DECODE_LIMIT", str(limit))
    kind, options = NOISE[name]
    side, data = 32, b""
    while True:
        side = int(side * 1.25)
        shape = (side, side) if kind == "GIF" else (side, side, 3)
        noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        larger = encoded(Image.fromarray(noise), kind, **options)
        try:
            header(larger)
        except BadImage:
            break
        data = larger
    assert side > 100

    times = []
    for _ in range(3):
        started = time.process_time()
        array(data)
        times.append(time.process_time() - started)
    assert min(times) < limit


def half(name: str) -> bytes:
    data = encoded(picture(1, (200, 160)), name)
    return data[: len(data) // 2]


BROKEN = {
    "empty": b"",
    "text": b"not found",
    "zeros": bytes(5000),
    "pickle": b"\x80\x04\x95\x10",
    "no end": encoded(picture(1, (200, 160)), "JPEG")[:-2],
    "header only": encoded(picture(1, (200, 160)), "JPEG")[:300],
    **{f"half {name}": half(name) for name in IMAGE_FORMATS},
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_refused_never_half_shown(name):
    for read in (
        array,
        rgb,
        decode.decode,
        lambda data: decode.eval_transform(data, ImageSpec((224, 224))),
    ):
        with pytest.raises(BadImage, match=r"\w+"):
            read(BROKEN[name])


@pytest.mark.parametrize("cases", [300, pytest.param(10_000, marks=pytest.mark.slow)])
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
