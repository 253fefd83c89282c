"""What one picture may cost: about a second and a gigabyte, known from its header before decoding.

Nothing here stops a decoder that runs (no signal reaches one inside a thread): what would take too
long is never begun. Cost is a sum of what the pixels, the bytes and the scans of a format take,
measured with the slowest pictures of each; every read of Pillow's readers, which walk through
headers in Python, is counted.

`VLP_DECODE_LIMIT=3` allows about three seconds and three gigabytes a picture, for those who train
on huge scans. It is a variable of the environment because it concerns the machine, and all of its
processes: training, evaluation and tools.
"""

from __future__ import annotations

import os
import re
import struct
from io import BytesIO
from typing import NamedTuple

MAX_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb: 268 MB of RGB
MAX_SIDE = 65_535  # the longest that JPEG knows
MAX_SCANS = 100  # of one JPEG; encoders write about ten, and each costs a pass over the picture

_MAX_STEPS = 50_000  # segments of a JPEG, and markers between its scans; usual are a dozen
# By a reader written in Python; a PNG of 268 MB in parts of 8 kB takes 100,000.
_MAX_READS = 300_000
_MAX_TILES = 65_535  # of a TIFF, as many as a picture in strips has rows
_BYTES_A_PIXEL = 20  # of memory at most, by WebP and by floats; libjpeg-turbo takes half

# Nanoseconds a pixel and a byte, on one core of 2024 with memory that is touched for the first
# time. The bytes of noise are the slowest, and a bomb's pixels have none.
_COSTS = {
    "JPEG": (11.0, 6.0),
    "CMYK": (18.0, 6.0),  # a JPEG that Pillow converts
    "PNG": (18.0, 1.0),
    "WEBP": (22.0, 44.0),
    "GIF": (11.0, 3.0),
    "BMP": (6.0, 1.0),
    "TIFF": (14.0, 6.0),
    "AVIF": (15.0, 55.0),
    "PPM": (6.0, 1.0),
    "JPEG2000": (30.0, 125.0),
}
_PROGRESSIVE = (18.0, 22.0)  # a JPEG, whose coefficients are held until its last scan
_NS_A_PIXEL_AND_SCAN = 0.5
_SLOW_TIFF = (60.0, 60.0)  # compressed with LZMA or as WebP
_SLOW_READER = (50.0, 500.0)  # written in Python
_SLOW_READERS = ("ppm", "ppm_plain", "bmp_rle")  # Pillow's names
_MOST_BYTES_A_PIXEL = 10  # that a decoder can use; further frames and pages may follow

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_APP1 = 0xE1  # Exif and XMP lie there
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in a scan, 0 or a restart follows 0xFF
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # starts of frames, of every process
_PROGRESSIVE_FRAMES = frozenset({0xC2, 0xC6, 0xCA, 0xCE})


class BadImage(ValueError):
    """The bytes are no picture that can be used; the message says why."""


class Markers(NamedTuple):
    """What a walk over the segments of a JPEG tells."""

    has_metadata: bool  # it may carry an orientation (Exif, XMP)
    progressive: bool
    n_scans: int


class CountedBytes(BytesIO):
    """Bytes that end a reader which goes through them in too many small steps."""

    n_reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.n_reads += 1
        if self.n_reads > _MAX_READS:
            raise BadImage(
                f"a picture of more than {_MAX_READS} parts, slow to read; save it again"
            )
        return super().read(size)


def limit() -> float:
    """Seconds, and gigabytes, that one picture may take."""
    text = os.environ.get("VLP_DECODE_LIMIT") or "1"
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise RuntimeError(f"VLP_DECODE_LIMIT is {text!r}; expected a number above 0, such as 2")
    return value


def refuse_giant(height: int, width: int, kind: str) -> None:
    """Raise BadImage for a picture with more pixels than the limit's memory holds."""
    most = MAX_PIXELS
    if kind != "JPEG":
        most = min(most, int(limit() * 1e9 / _BYTES_A_PIXEL))
    if height * width > most:
        raise BadImage(f"an image of {width}×{height} pixels, more than {most}; {_ADVICE}")
    if max(height, width) > MAX_SIDE:
        raise BadImage(f"an image of {width}×{height} pixels, with a side of more than {MAX_SIDE}")


def refuse_slow(
    height: int, width: int, n_bytes: int, kind: str, codec: str = "", compression: str = ""
) -> None:
    """Raise BadImage for a picture of one of Pillow's formats that takes long to decode.

    codec: Pillow's name of the decoder. compression: of a TIFF.
    """
    costs = _COSTS[kind]
    if codec in _SLOW_READERS:
        costs = _SLOW_READER
    elif compression in ("lzma", "webp"):
        costs = _SLOW_TIFF

    # A decoder stops where its picture is full, whatever follows; readers in Python read all.
    area = height * width
    if codec not in _SLOW_READERS:
        n_bytes = min(n_bytes, _MOST_BYTES_A_PIXEL * area + (1 << 16))
    _refuse(area * costs[0] + n_bytes * costs[1], height, width, kind)


def refuse_slow_jpeg(height: int, width: int, n_bytes: int, markers: Markers) -> None:
    """Raise BadImage for a JPEG in gray or colours that takes long to decode."""
    a_pixel, a_byte = _PROGRESSIVE if markers.progressive else _COSTS["JPEG"]
    a_pixel += markers.n_scans * _NS_A_PIXEL_AND_SCAN
    _refuse(height * width * a_pixel + n_bytes * a_byte, height, width, "JPEG")


_ADVICE = "save it smaller, or set VLP_DECODE_LIMIT=2 or more where pictures may take so long"


def _refuse(nanoseconds: float, height: int, width: int, kind: str) -> None:
    seconds = nanoseconds / 1e9
    if seconds > limit():
        raise BadImage(
            f"a {kind} of {width}×{height} pixels takes about {seconds:.1f} s to decode, "
            f"more than {limit():g} s; {_ADVICE}"
        )


def read_markers(data: bytes) -> Markers:
    """Walk over the segments of a JPEG; raises BadImage for too many of them or of scans."""
    at, n_components = 2, 0
    has_metadata = progressive = False
    for _ in range(_MAX_STEPS):
        if at + 10 > len(data) or data[at] != 0xFF:
            # Something lies between the segments. Decoders skip it, so nothing is known about the
            # rest.
            return Markers(True, progressive, _count_scans(data, 2))

        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == _START_OF_SCAN:
            several = progressive or data[at + 4] < n_components
            n_scans = _count_scans(data, at) if several else 1
            return Markers(has_metadata, progressive, n_scans)

        if marker == _APP1:
            has_metadata = True
        elif marker in _FRAMES:
            progressive, n_components = marker in _PROGRESSIVE_FRAMES, data[at + 9]
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise BadImage(f"a JPEG of more than {_MAX_STEPS} segments, slow to read; save it again")


def _count_scans(data: bytes, start: int) -> int:
    """Scans between a marker and the end of the picture; raises BadImage for too many.

    Phones append films behind that end, in which any marker may occur.
    """
    n_scans = n_markers = 0

    marker = _MARKER.search(data, start)
    while marker and data[marker.start() + 1] != _END_OF_IMAGE:
        n_markers += 1
        if data[marker.start() + 1] == _START_OF_SCAN:
            n_scans += 1

        if n_scans > MAX_SCANS:
            raise BadImage(f"a JPEG of more than {MAX_SCANS} scans, slow to decode; save it again")
        if n_markers > _MAX_STEPS:
            raise BadImage(f"a JPEG of more than {_MAX_STEPS} markers, slow to read; save it again")

        length = int.from_bytes(data[marker.end() : marker.end() + 2], "big")
        marker = _MARKER.search(data, marker.end() + length)
    return n_scans


def refuse_tiles(data: bytes) -> None:
    """Raise BadImage for a TIFF whose first page lies in too many strips or tiles.

    Pillow makes a list of them as soon as it opens the file.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or data[2:4] not in (b"*\0", b"\0*", b"+\0", b"\0+"):
        return
    try:
        _check_tiles(data, order)
    except struct.error:
        return  # cut off: Pillow says so


def _check_tiles(data: bytes, order: str) -> None:
    # BigTIFF has wider counts and places.
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    if big:
        count_form, entry_form, entry_bytes = "Q", "HHQQ", 20
        [place] = struct.unpack_from(order + "Q", data, 8)
    else:
        count_form, entry_form, entry_bytes = "H", "HHII", 12
        [place] = struct.unpack_from(order + "I", data, 4)

    [n_entries] = struct.unpack_from(order + count_form, data, place)
    place += struct.calcsize(order + count_form)
    for i in range(min(n_entries, _MAX_TILES)):
        tag, _, n_values, _ = struct.unpack_from(order + entry_form, data, place + i * entry_bytes)
        if tag in (273, 324) and n_values > _MAX_TILES:  # offsets of strips, of tiles
            raise BadImage(f"a TIFF of {n_values} tiles, slow to read; save it again")
