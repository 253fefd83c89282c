"""Bombs, slow files, damage and lack of memory: each is refused in time, and costs one picture
only.
"""

from __future__ import annotations

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
from vlp.data.picture import MAX_SCANS, BadImage, array, header, jpeg_size, rgb
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
