"""The members of a shard: which names count, where samples begin and end in a tar, what a sample's text is.

Headers are parsed here rather than with `tarfile`, which is an order of magnitude slower, because the same walk finds
samples when a shard is indexed and takes a sample apart each time it is read. Nothing is ever unpacked to disk, and only
the extensions below are ever looked into; a pickle in a shard is skipped like any other foreign member.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, BinaryIO

# Pillow's names of the formats that are read, with the extensions that say so. Content decides what a
# picture is; an extension only whether a member or file is taken for one. None of these readers runs
# code or another program.
IMAGE_FORMATS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif", "mpo"),
    "PNG": ("png", "apng"),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
    "AVIF": ("avif",),
    "PPM": ("ppm", "pgm", "pbm", "pnm", "pfm"),
    "JPEG2000": ("jp2", "j2k", "jpf", "jpx"),
}
IMAGE_TYPES = frozenset().union(*IMAGE_FORMATS.values())
TEXT_TYPES = frozenset({"txt", "json", "cls"})
NEGATIVE = "negative."  # KEY.negative.jpg: the image of the sample's first negative caption
MAX_TEXT_BYTES = 1 << 20  # a caption file or JSON beyond this is an attack or an accident
MAX_IMAGE_BYTES = 1 << 28

BLOCK = 512
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


class DamagedTar(ValueError):
    """A header that is not one, or a member that ends beyond the file; `offset` says where."""

    def __init__(self, offset: int, reason: str) -> None:
        self.offset = offset
        super().__init__(f"{reason} at byte {offset}")


@dataclass(frozen=True)
class Member:
    """One file in a tar: its header chain starts at `start`, its `size` bytes at `offset`."""

    name: str
    start: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + -(-self.size // BLOCK) * BLOCK


@dataclass
class Content:
    """A sample taken out of its shard, still undecoded."""

    key: str
    image: bytes = b""
    image_type: str = ""
    negative_image: bytes = b""  # empty: none
    negative_image_type: str = ""
    captions: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # oddities that did not cost the sample


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension in lower case) as webdataset splits them, at the first dot of the last part; None for no sample.

    Parts such as `..` and a leading slash are taken out of the key, so that no tool can be led outside its folder.
    """
    match = _NAME.fullmatch(name)
    if not match:
        return None
    parts = match[1].replace("\\", "/").replace("\0", "").split("/")
    key = "/".join(part for part in parts if part not in ("", ".", ".."))
    return (key, match[2].lower()) if key else None


def member_kind(extension: str) -> str | None:
    """What a member is to its sample: "image", "negative" (an image), one of TEXT_TYPES; None: nothing that counts."""
    if extension in IMAGE_TYPES:
        return "image"
    if extension.removeprefix(NEGATIVE) in IMAGE_TYPES:
        return "negative"
    return extension if extension in TEXT_TYPES else None


def walk(file: BinaryIO, start: int, end: int) -> Iterator[Member]:
    """All regular members between two byte positions, in order; raises DamagedTar."""
    position, chain, override = start, start, {}
    while position + BLOCK <= end:
        file.seek(position)
        header = file.read(BLOCK)
        if header.count(0) == BLOCK:
            return
        kind, name, size = _header(header, position)
        data = position + BLOCK
        if kind in b"Lx":  # a long name (GNU) or extended header (POSIX) for the member that comes next
            if data + size > end or size > MAX_TEXT_BYTES:
                raise DamagedTar(position, "an extended header that is cut off or too large")
            override |= _extended(kind, file.read(size), position)
        else:
            size = override.get("size", size)
            if kind in b"0\0":
                if data + size > end:
                    raise DamagedTar(position, f"member {name!r} needs {size} bytes but the file ends")
                yield Member(override.get("path", name), chain, data, size)
            override = {}
        position = data + -(-size // BLOCK) * BLOCK
        chain = position if not override else chain
    if position < end:
        raise DamagedTar(position, "the file ends within a header")


def find_header(file: BinaryIO, position: int, end: int) -> int:
    """The first position at or after `position`, in whole blocks, that holds a valid header; `end` if there is none."""
    while position + BLOCK <= end:
        file.seek(position)
        chunk = file.read(min(1 << 20, end - position))
        for i in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if chunk[i + 257 : i + 262] == b"ustar":
                try:
                    _header(chunk[i : i + BLOCK], position + i)
                except DamagedTar:
                    continue  # the word occurs in an image; keep looking
                return position + i
        position += len(chunk) // BLOCK * BLOCK
    return end


def _header(header: bytes, position: int) -> tuple[bytes, str, int]:
    try:
        expected = int(header[148:156].strip(b" \0") or b"-1", 8)
        actual = sum(header) - sum(header[148:156]) + 8 * 32
        if header[124] & 0x80:  # base-256, for members beyond 8 GiB
            size = int.from_bytes(header[125:136], "big")
        else:
            size = int(header[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        raise DamagedTar(position, "a damaged header") from None
    if expected != actual or size < 0:
        raise DamagedTar(position, "a damaged header")
    name, prefix = header[:100].split(b"\0", 1)[0], b""
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
    full = prefix + b"/" + name if prefix else name
    return header[156:157], full.decode("utf-8", "replace"), size


def _extended(kind: bytes, data: bytes, position: int) -> dict[str, Any]:
    if kind == b"L":
        return {"path": data.split(b"\0", 1)[0].decode("utf-8", "replace")}
    result: dict[str, Any] = {}
    try:
        while data.strip(b"\0"):
            length = int(data.split(b" ", 1)[0])
            key, value = data[:length].split(b" ", 1)[1].split(b"=", 1)
            if key == b"path":
                result["path"] = value[:-1].decode("utf-8", "replace")
            elif key == b"size":
                result["size"] = int(value)
            if length < 1:
                raise ValueError(length)
            data = data[length:]
    except (ValueError, IndexError):
        raise DamagedTar(position, "a damaged extended header") from None
    return result


def open_sample(span: bytes) -> Content:
    """Take apart the bytes of one sample's members; raises ValueError saying why the sample cannot be used."""
    found: dict[str, Member] = {}
    content = Content(key="")
    for member in walk(BytesIO(span), 0, len(span)):
        named = split_name(member.name)
        kind = member_kind(named[1]) if named else None
        if kind is None:
            continue
        content.key = content.key or named[0]
        if named[0] != content.key:
            raise ValueError(f"members of {content.key!r} and {named[0]!r} are mixed; the index is out of date")
        if kind not in found:
            found[kind] = member
            if kind == "image":
                content.image_type = named[1]
            elif kind == "negative":
                content.negative_image_type = named[1].removeprefix(NEGATIVE)
    check_images(found)
    data = {kind: span[m.offset : m.offset + m.size] for kind, m in found.items()}
    content.image, content.negative_image = data.pop("image"), data.pop("negative", b"")
    read_text(content, data)
    return content


def check_images(members: dict[str, Member]) -> None:
    """Raise ValueError unless there is an image, and every image (by kind) has a size that one can have."""
    if "image" not in members:
        raise ValueError(f"no image member ({', '.join(sorted(IMAGE_TYPES))})")
    for kind, name in (("image", "an image"), ("negative", "a negative image")):
        if kind in members and not 0 < members[kind].size <= MAX_IMAGE_BYTES:
            raise ValueError(f"{name} of {members[kind].size} bytes; expected 1 to {MAX_IMAGE_BYTES}")


def read_text(content: Content, texts: dict[str, bytes]) -> None:
    """Fill captions and meta from the members txt, json and cls; raises ValueError.

    Captions are the JSON's `captions` (a list), else its `caption`, else the lines of the .txt; empty ones are left out.
    """
    if any(len(data) > MAX_TEXT_BYTES for data in texts.values()):
        raise ValueError(f"a text member of more than {MAX_TEXT_BYTES} bytes")
    decoded = {kind: _decode(data, kind, content) for kind, data in texts.items()}
    if decoded.get("json", "").strip():
        content.meta = _json(decoded["json"])
    if label := decoded.get("cls", "").strip():
        if not re.fullmatch(r"\d{1,9}", label):
            raise ValueError(f"class number {label[:40]!r} is not a whole number")
        content.meta.setdefault("cls", int(label))
    captions = content.meta.get("captions")
    if captions is None and content.meta.get("caption") is not None:
        captions = [content.meta["caption"]]
    if captions is None:
        captions = decoded.get("txt", "").split("\n")
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise ValueError("the JSON's captions are not a list of texts")
    content.captions = tuple(c.strip() for c in captions if c.strip())


def _decode(data: bytes, kind: str, content: Content) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        content.notes.append(f".{kind} is not UTF-8; the wrong bytes became U+FFFD")
        return data.decode("utf-8", "replace")


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {str(error)[:80]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"JSON holds {type(value).__name__}, expected a mapping")
    return value
