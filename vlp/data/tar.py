"""The headers of a tar: which members lie where. Nothing is ever unpacked to disk.

Headers are parsed here rather than with `tarfile`, which is an order of magnitude slower, because
the same walk finds samples when a shard is indexed and takes a sample apart each time it is read.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

BLOCK = 512
MAX_HEADER_BYTES = 1 << 20  # an extended header beyond this is an attack or an accident

_REGULAR = b"0\x007"
# Links, devices, folders and pipes: their size, if any, counts no bytes of the file.
_WITHOUT_DATA = b"123456"
_NAMES = {
    b"1": "links (tar --hard-dereference stores the files)",
    b"2": "links (tar --dereference stores the files)",
    b"3": "devices",
    b"4": "devices",
    b"5": "folders",
    b"6": "pipes",
    b"S": "sparse files",
}

# How other files begin that are taken for tars by their name.
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}
_FOREIGN = {
    b"PK\x03\x04": "a zip archive; unpack it and give the folder",
    b"7z\xbc\xaf": "a 7z archive; unpack it and give the folder",
    b"Rar!": "a rar archive; unpack it and give the folder",
    b"version https://git-lfs": "a pointer of Git LFS; git lfs pull fetches the file",
    b"<": "a web page; download the file again",
    b"PAR1": "a parquet file; the source huggingface reads it",
}


class DamagedTar(ValueError):
    """A header that is not one, or a member that ends beyond the file; `offset` says where."""

    def __init__(self, offset: int, reason: str) -> None:
        self.offset = offset
        super().__init__(f"{reason} at byte {offset}")


class Member(NamedTuple):
    """One file in a tar: its header chain starts at `start`, its `size` bytes at `offset`."""

    name: str
    start: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + -(-self.size // BLOCK) * BLOCK


def walk(
    file: BinaryIO, start: int, end: int, passed: Counter[str] | None = None
) -> Iterator[Member]:
    """All regular members between two byte positions, in order; raises DamagedTar.

    Tars that were joined by `cat` are read to the end of the last. `passed` counts what is no
    regular member, by kind, and the joints.
    """
    position = chain = start  # of the next header, and of the first that belongs to its member
    override: dict[str, Any] = {}  # what extended headers say of that member
    passed = Counter() if passed is None else passed

    while position + BLOCK <= end:
        file.seek(position)
        header = file.read(BLOCK)
        if header.count(0) == BLOCK:
            position = chain = _after_end(file, position, end)
            if position < end:
                passed["joints"] += 1
            override = {}
            continue

        kind, name, size = _header(header, position)
        data = position + BLOCK
        if kind == b"S":
            data += _sparse_map_bytes(file, header)
        # A long name (GNU) or extended header (POSIX) for the member that comes next.
        if kind in b"Lx":
            if data + size > end or size > MAX_HEADER_BYTES:
                raise DamagedTar(position, "an extended header that is cut off or too large")
            override |= _extended(kind, file.read(size), position)
        else:
            size = 0 if kind in _WITHOUT_DATA else override.get("size", size)
            name = override.get("path", name)
            if data + size > end:
                raise DamagedTar(position, f"member {name!r} needs {size} bytes but the file ends")
            if override.get("sparse"):
                kind = b"S"
            if kind in _REGULAR:
                yield Member(name, chain, data, size)
            elif kind not in b"gK":  # a header of no member, and a long link's name
                passed[_NAMES.get(kind, "members of unknown kind")] += 1
            override = {}

        position = data + -(-size // BLOCK) * BLOCK
        chain = position if not override else chain
    if position < end:
        raise DamagedTar(position, "the file ends within a header")


def _sparse_map_bytes(file: BinaryIO, header: bytes) -> int:
    """How many bytes of GNU's map of a sparse file follow its header, before its data; the file
    stands behind the header.
    """
    n_blocks = 0
    block, flag = header, 482  # whether a block of the map follows, and in that, another one
    while len(block) == BLOCK and block[flag]:
        block, flag = file.read(BLOCK), 504
        n_blocks += 1
    return n_blocks * BLOCK


def find_header(file: BinaryIO, position: int, end: int) -> int:
    """The first position at or after `position`, in whole blocks, that holds a valid header; `end`
    if there is none.
    """
    while position + BLOCK <= end:
        file.seek(position)
        chunk = file.read(min(1 << 20, end - position))
        for i in range(0, len(chunk) - BLOCK + 1, BLOCK):
            # The word may occur in an image, too; then the check sum is wrong.
            if chunk[i + 257 : i + 262] != b"ustar":
                continue
            if _is_header(chunk[i : i + BLOCK]):
                return position + i
        position += len(chunk) // BLOCK * BLOCK
    return end


def _after_end(file: BinaryIO, position: int, end: int) -> int:
    """Where the walk goes on after zeros at `position`: at the next tar's first header, else at the
    `end`.

    Zeros that something else follows are a hole in the tar: DamagedTar.
    """
    first = position
    while position < end:
        file.seek(position)
        chunk = file.read(min(1 << 20, (end - position) // BLOCK * BLOCK))
        if not chunk:
            return end
        if chunk.count(0) == len(chunk):
            position += len(chunk)
            continue

        # `cat` leaves the two empty blocks of a tar's end before the next tar's header.
        position += (len(chunk) - len(chunk.lstrip(b"\0"))) // BLOCK * BLOCK
        file.seek(position)
        if position - first >= 2 * BLOCK and _is_header(file.read(BLOCK)):
            return position
        raise DamagedTar(first, "zeros where a header should be, and more after them,")
    return end


def _is_header(block: bytes) -> bool:
    try:
        _header(block, 0)
    except DamagedTar:
        return False
    return True


def _header(header: bytes, position: int) -> tuple[bytes, str, int]:
    try:
        expected = int(header[148:156].strip(b" \0") or b"-1", 8)
        if header[124] & 0x80:  # base-256, for members beyond 8 GiB
            size = int.from_bytes(header[125:136], "big")
        else:
            size = int(header[124:136].strip(b" \0") or b"0", 8)
    except (ValueError, IndexError):
        raise DamagedTar(position, "a damaged header") from None

    # The low half of Adler-32 is one more than the sum of the bytes, modulo 65521: a tar's check
    # sum at the speed of C.
    summed = zlib.adler32(header[:148] + b"        " + header[156:]) & 0xFFFF
    if len(header) < BLOCK or expected < 0 or (expected + 1) % 65521 != summed or size < 0:
        raise DamagedTar(position, "a damaged header")

    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
        folder = header[345:500].split(b"\0", 1)[0]
        name = folder + b"/" + name
    return header[156:157], name.decode("utf-8", "replace"), size


def _extended(kind: bytes, data: bytes, position: int) -> dict[str, Any]:
    """What an extended header says of the next member: its `path` and `size`, where it does."""
    if kind == b"L":
        return {"path": data.split(b"\0", 1)[0].decode("utf-8", "replace")}

    result: dict[str, Any] = {}
    start, end = 0, len(data.rstrip(b"\0"))
    try:
        while start < end:
            blank = data.index(b" ", start, start + 20)  # "LENGTH key=value\n"
            length = int(data[start:blank])
            if length <= blank - start:
                raise ValueError(length)
            key, value = data[blank + 1 : start + length].split(b"=", 1)
            if key == b"path":
                result["path"] = value[:-1].decode("utf-8", "replace")
            elif key == b"size":
                result["size"] = int(value)
            # Such a file looks like a regular one, and holds a map before parts of its bytes.
            elif key.startswith(b"GNU.sparse."):
                result["sparse"] = True
            start += length
    except ValueError:
        raise DamagedTar(position, "a damaged extended header") from None

    # A negative size would lead the walk back to this header, for ever.
    if result.get("size", 0) < 0:
        raise DamagedTar(position, f"a member of {result['size']} bytes")
    return result


# --- what is no plain tar ------------------------------------------------------------------------


def packed_with(head: bytes) -> str:
    """The name of the compression that a file begins with; "" for none that is known."""
    return next((name for magic, name in _PACKED.items() if head.startswith(magic)), "")


def foreign(head: bytes) -> str:
    """What a file with this beginning is and what to do with it; "" for a tar or unknown bytes."""
    head = head.lstrip()
    return next((name for magic, name in _FOREIGN.items() if head.startswith(magic)), "")


def open_packed(path: Path) -> BinaryIO:
    """A compressed tar, read as the tar that it holds; raises ValueError for an unknown
    compression, OSError.
    """
    with open(path, "rb") as file:
        name = packed_with(file.read(8))
    if name == "zstd":
        import pyarrow  # here, because it is slow to import and few tars are packed with zstd

        return pyarrow.input_stream(str(path), compression="zstd")
    openers: dict[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
    if name not in openers:
        raise ValueError(
            f"{path} is compressed in no way that is known here (gzip, zstd, bzip2, xz); "
            "unpack it first"
        )
    return openers[name](path)
