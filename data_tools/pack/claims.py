"""What a sample's JSON claims of its picture's bytes, kept true where those change.

    width, height              pixels, as shown; or as stored, of a picture that is turned
    format, ext, mime_type, …  the format, in the spelling that stands there
    file_size, n_bytes, …      bytes
    md5, sha256, image_hash, … MD5, SHA-1, SHA-256 or SHA-512 of the file, in hexadecimal digits

A value that was not true of the picture that came is of something else, and stays: what img2dataset
notes as `original_width` and `original_height`, and the digest of the file that it fetched before
it resized. What was true goes on under `original_NAME`, unless that is there, so that coordinates
in pixels can still be brought to scale.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from vlp.data.members import IMAGE_FORMATS
from vlp.data.picture import Header, header

_SIDES = ("width", "height")
_FORMATS = frozenset({
    "format", "image_format", "file_format", "ext", "extension", "file_extension", "image_type",
    "mime", "mime_type", "mimetype", "content_type", "media_type",
})  # fmt: skip
_SIZES = frozenset({
    "bytes", "n_bytes", "num_bytes", "size_bytes", "size_in_bytes", "file_size", "filesize", "size",
    "content_length",
})  # fmt: skip
_BY_LENGTH = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}  # hexadecimal digits
# An `id` or `origin` may be a digest as well; what finds a sample again must not change.
_DIGESTS = re.compile(r"md5|sha-?_?\d|hash|digest|checksum", re.IGNORECASE)
_HEXADECIMAL = re.compile(r"[0-9a-f]+|[0-9A-F]+")
_PREFIX = re.compile(r"(image/|\.)?(.*)", re.DOTALL)
_ORIGINAL = "original_"

Claims = dict[str, Any]  # fields of a sample's JSON


def of(meta: dict[str, Any]) -> Claims:
    """The fields of a JSON that may speak of the bytes of its picture; mostly none."""
    return {name: value for name, value in meta.items() if _may_claim(name, value)}


def _may_claim(name: str, value: Any) -> bool:
    lower = name.lower()
    return name in _SIDES or lower in _FORMATS | _SIZES or _is_digest(lower, value)


def _is_digest(name: str, value: Any) -> bool:
    """Whether a value may be a digest of the picture in the shard, rather than of an earlier
    file.
    """
    if name.startswith(_ORIGINAL) or not _DIGESTS.search(name):
        return False
    if not isinstance(value, str) or len(value) not in _BY_LENGTH:
        return False
    return _HEXADECIMAL.fullmatch(value) is not None


def mended(claims: Claims, before: bytes, after: bytes) -> Claims:
    """The claims that were true of the picture that came, as they are of the one that is
    written.
    """
    if not claims or after == before:
        return {}
    came, written = header(before), header(after)
    true = _sides(claims, came, written)
    for name, value in claims.items():
        lower = name.lower()
        if lower in _FORMATS:
            true[name] = _respelled(lower, value, came.kind, written.kind)
        elif lower in _SIZES:
            true[name] = _counted(value, len(before), len(after))
        elif _is_digest(lower, value):
            true[name] = _digested(value, before, after)
    return {
        name: value for name, value in true.items() if value is not None and value != claims[name]
    }


def put(meta: dict[str, Any], true: Claims) -> None:
    """Let a JSON claim these, and keep what it claimed before."""
    for name, value in true.items():
        meta.setdefault(f"{_ORIGINAL}{name}", meta[name])
        meta[name] = value


def _sides(claims: Claims, came: Header, written: Header) -> Claims:
    """Width and height as they are written, where those that stand there were both true."""
    told = [name for name in _SIDES if name in claims]
    shown = {"width": came.width, "height": came.height}
    now = {"width": written.width, "height": written.height}
    # As other readers see it, which do not turn pictures.
    stored = {"width": came.height, "height": came.width} if came.turned else shown
    for sides in (shown, stored):
        values = {name: _counted(claims[name], sides[name], now[name]) for name in told}
        if None not in values.values():
            return values
    return {}


def _counted(value: Any, came: int, written: int) -> Any:
    """The new number in the form of the old one; None where that was another, or no number."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return str(written) if value.strip() == str(came) else None
    if isinstance(value, int | float) and value == came:
        return type(value)(written)
    return None


def _respelled(name: str, value: Any, came: str, written: str) -> str | None:
    """The new format's name, spelled as the old one is; None where that named another format."""
    if not isinstance(value, str):
        return None
    match = _PREFIX.fullmatch(value.strip())
    assert match is not None  # it takes any text
    prefix, spelled = match[1] or "", match[2]
    if came == written or spelled.lower() not in (came.lower(), *IMAGE_FORMATS[came]):
        return None

    is_extension = prefix == "." or "ext" in name
    new = IMAGE_FORMATS[written][0] if is_extension else written.lower()
    return prefix + (new.upper() if spelled.isupper() else new)


def _digested(value: str, before: bytes, after: bytes) -> str | None:
    """The digest of the picture that is written; None where the value was not of the one that
    came.
    """
    algorithm = _BY_LENGTH[len(value)]
    if hashlib.new(algorithm, before).hexdigest() != value.lower():
        return None
    digest = hashlib.new(algorithm, after).hexdigest()
    return digest.upper() if value.isupper() else digest
