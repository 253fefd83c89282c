"""The members of a shard: which names count, which of them belong to one sample, and a sample taken
apart.

Only the extensions below are ever looked into; a pickle in a shard is passed over, and counted,
like any other member.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, NamedTuple, TypeVar

from vlp.data import loose_texts
from vlp.data.captions import read_texts
from vlp.data.digests import UNKNOWN, digest_of
from vlp.data.tar import Member, walk
from vlp.data.text_files import TEXT_FILES

# Pillow's names of the formats that are read, with the extensions that say so. Content decides what
# a picture is; an extension only whether a member or file is taken for one. None of these readers
# runs code or another program.
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
SOUND_TYPES = ("wav", "flac", "ogg", "mp3")
FRAMES = "N"  # in the place of a frame's number, where frames are counted
TEXT_TYPES = frozenset({*TEXT_FILES, "json", "cls"})
# KEY.negative.jpg: the image of the sample's first negative caption; KEY.negative.2.jpg: of the
# third, counted from 0
_NEGATIVE = re.compile(r"\.negative(?:\.(\d{1,3}))?$", re.IGNORECASE)
_LONGEST_NEGATIVE = len(".negative.999")
MAX_IMAGE_BYTES = 1 << 28

# What operating systems, file servers and editors leave in folders, in lower case; none of it was
# meant as data.
SYSTEM_NAMES = frozenset({
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found",
    "@recently-snapshot", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
})  # fmt: skip

_BOOKKEEPING = re.compile(r"\d{5,}_stats\.json")  # what img2dataset counts about a shard

Payload = TypeVar("Payload")


class Name(NamedTuple):
    """The name of a member, taken apart."""

    key: str
    # "image", "negative.K" (the image of negative K), one of TEXT_TYPES, or "": nothing that counts
    kind: str
    extension: str  # lower case, of an image without `negative`


class Picture(NamedTuple):
    """An encoded image."""

    data: bytes
    extension: str  # lower case, without dot


@dataclass
class Content:
    """A sample taken out of its shard, still undecoded."""

    key: str
    image: bytes = b""
    image_type: str = ""
    # images of its negative captions, by their place in the JSON's list
    negative_images: dict[int, Picture] = field(default_factory=dict)
    captions: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    text: str = ""  # of its text file, whole
    notes: list[str] = field(default_factory=list)  # oddities that did not cost the sample
    spare: list[str] = field(default_factory=list)  # text files that another one goes before
    # Reads its sound, frames and numbers, by what follows the key, where a tool copies the sample.
    further: Callable[[], dict[str, bytes]] = dict


def parse_name(name: str) -> Name | None:
    """A member's key and kind by its name; None for what is hidden, a folder, or left behind by a
    system.

    The extension is what follows the last dot, together with `negative.` before an image's; the key
    is all before it: IMG_3.v2.jpg and IMG_3.v2.txt are the sample IMG_3.v2. Whether x.seg.png is a
    sample, or belongs to the sample x as webdataset's split at the first dot says, depends on the
    others: see `separate`. Backslashes are slashes; parts such as `..` and a leading slash are
    taken out of the key, so that no tool can be led outside its folder.
    """
    # Most names have no folder, and this is called for every member of every tar.
    folder, last = "", name
    if "/" in name or "\\" in name or "\0" in name:
        parts, last = split_name(name)
        if any(map(is_hidden, parts)):
            return None
        folder = "".join(f"{part}/" for part in parts)

    if not last or is_hidden(last):
        return None

    stem, dot, extension = last.rpartition(".")
    if not dot:
        return Name(folder + last, "", "")

    extension = extension.rstrip().lower()
    kind = extension if extension in TEXT_TYPES else ""
    if _BOOKKEEPING.fullmatch(last):
        kind = ""

    if extension in IMAGE_TYPES:
        kind = "image"
        if "negative" in stem[-_LONGEST_NEGATIVE:].lower():
            kind, stem = _kind_of_image(stem)
    return Name(folder + stem, kind, extension)


def split_name(name: str) -> tuple[list[str], str]:
    """The folders of a member's name, without parts that lead elsewhere, and its last part."""
    *folders, last = name.replace("\\", "/").replace("\0", "").split("/")
    return [folder for folder in folders if folder not in ("", ".", "..")], last


def _kind_of_image(stem: str) -> tuple[str, str]:
    """The kind of an image by its name without the extension, and the sample's part of the name."""
    match = _NEGATIVE.search(stem)
    if match is None:
        return "image", stem
    return f"negative.{int(match[1] or 0)}", stem[: match.start()]


def is_picture(kind: str) -> bool:
    """Whether members of this kind are images: the sample's, or one of its negatives'."""
    return kind == "image" or kind.startswith("negative.")


def negative_member(place: int, extension: str) -> str:
    """The extension under which the image of the negative at a place of the JSON's list lies."""
    # The first has no number: shards were once written with one image only.
    return f"negative.{place}.{extension}" if place else f"negative.{extension}"


def is_hidden(part: str) -> bool:
    """Whether one part of a path is hidden or a system's: .DS_Store, ._x.jpg, __MACOSX,
    PaxHeaders.123.
    """
    return part.startswith((".", "PaxHeader")) or part.lower() in SYSTEM_NAMES


def is_guest(key: str, host: str) -> bool:
    """Whether a member with this key would belong to the sample `host` by the first dot: x.seg to
    x.
    """
    return key.startswith(host + ".") and "/" not in key[len(host) :]


def join_texts(
    parts: dict[str, dict[str, Payload]], extension_of: Callable[[Payload], str]
) -> dict[str, dict[str, Payload]]:
    """The members by kind, by key, with each text that is called by its image's whole name given to
    that image's sample: 1.jpg.txt beside 1.jpg is the text of 1.

    A text by the sample's own name, 1.txt, goes before. `extension_of` gives an image's extension
    in lower case.
    """
    joined = {key: dict(members) for key, members in parts.items()}
    for key, members in parts.items():
        host, _, extension = key.rpartition(".")
        image = parts.get(host, {}).get("image")
        if image is None or "image" in members or extension_of(image) != extension.lower():
            continue

        # In one order everywhere: the index keeps a digest of a sample's texts.
        for kind in sorted(TEXT_TYPES & members.keys() - joined[host].keys()):
            joined[host][kind] = joined[key].pop(kind)
        if not joined[key]:
            del joined[key]
    return joined


def join_loose_texts(
    parts: dict[str, dict[str, Payload]],
) -> tuple[dict[str, dict[str, Payload]], Counter[str]]:
    """The members by kind, by key, with the texts that `vlp.data.loose_texts` finds a picture for;
    and how many were found in which way.
    """
    pictures = {key: TEXT_TYPES & kinds.keys() for key, kinds in parts.items() if "image" in kinds}
    texts = [
        (key, kind)
        for key in parts.keys() - pictures.keys()
        for kind in TEXT_TYPES & parts[key].keys()
    ]
    owners = loose_texts.owners(pictures, texts)
    if not owners:
        return parts, Counter()

    joined = {key: dict(members) for key, members in parts.items()}
    for (key, kind), owner in sorted(owners.items()):
        joined[owner.key][kind] = joined[key].pop(kind)
        if not joined[key]:
            del joined[key]
    return joined, Counter(owner.how for owner in owners.values())


def separate(
    parts: dict[str, dict[str, Payload]],
) -> tuple[dict[str, dict[str, Payload]], dict[str, str]]:
    """Which keys are samples of their own: (members by kind, by key; the keys of the others, each
    with its host's).

    A dotted key (x.seg) with an image and a text of its own is a sample. With less it belongs to
    the sample x where x has an image, as a member that nobody reads.
    """
    guests: dict[str, str] = {}
    for key, members in parts.items():
        if "image" in members and members.keys() & TEXT_TYPES:
            continue

        host = next((host for host in _hosts(key) if "image" in parts.get(host, ())), None)
        if host is not None:
            guests[key] = host

    samples = {key: members for key, members in parts.items() if key not in guests}
    return samples, guests


def kind_of_guest(infix: str, extension: str) -> str:
    """So the index counts an image KEY.INFIX.jpg of the sample KEY that is no sample: frames of all
    numbers as one kind.
    """
    return f"members .{FRAMES if infix.isdecimal() else infix}.{extension}"


def _hosts(key: str) -> Iterable[str]:
    """The keys of which `key` may be a guest, the longest first: a.b and a for a.b.c."""
    folder, slash, last = key.rpartition("/")
    while "." in last:
        last = last.rpartition(".")[0]
        yield folder + slash + last


def open_sample(span: bytes, digest: int = UNKNOWN) -> Content:
    """Take apart the bytes of one sample's members; raises ValueError saying why the sample cannot
    be used.

    All members that count must be of one key, and have this digest where it is known.
    """
    named = [(member, parse_name(member.name)) for member in walk(BytesIO(span), 0, len(span))]
    counting = [(member, name) for member, name in named if name is not None and name.kind]

    members: dict[str, Member] = {}  # by kind
    content = Content(key=_key_of([name for _, name in counting]))
    for member, name in counting:
        # A sample of parts of two would be worse than none.
        if not _is_part(name, content.key):
            raise ValueError(
                f"members of {content.key!r} and {name.key!r} are mixed; the index is out of date"
            )
        if name.kind in members:
            continue  # the first of a kind counts
        members[name.kind] = member
        if name.kind == "image":
            content.image_type = name.extension

    check_images(members)
    data = {kind: span[m.offset : m.offset + m.size] for kind, m in members.items()}
    if digest != UNKNOWN:
        by_name = {member.name: data[kind] for kind, member in members.items()}
        if digest_of(by_name) != digest:
            raise ValueError(
                f"the members of {content.key!r} are not those that were indexed (their digest "
                "differs): the shard is damaged, or changed after that; restore it"
            )

    content.image = data.pop("image")
    extensions = {name.kind: name.extension for _, name in reversed(counting)}
    content.negative_images = {
        int(kind.removeprefix("negative.")): Picture(data.pop(kind), extensions[kind])
        for kind in sorted(data)
        if is_picture(kind)
    }
    fill(content, data)
    return content


def _key_of(names: list[Name]) -> str:
    """The key of the sample that these members make: its image's, for texts may lengthen it."""
    images = [name.key for name in names if name.kind == "image"]
    keys = images or [name.key for name in names]
    return keys[0] if keys else ""


def _is_part(name: Name, key: str) -> bool:
    """Whether a member may belong to a sample: by its key, or as a text by its image's name or by
    another spelling of it.
    """
    if name.key == key:
        return True
    stem, _, extension = name.key.rpartition(".")
    if name.kind not in TEXT_TYPES:
        return False
    by_image = stem == key and extension.lower() in IMAGE_TYPES
    return by_image or loose_texts.may_own(key, name.key)


def check_images(members: dict[str, Member]) -> None:
    """Raise ValueError unless there is an image, and every image (by kind) has a size that one can
    have.
    """
    if "image" not in members:
        raise ValueError(f"no image member: one of {', '.join(sorted(IMAGE_TYPES))}")
    for kind, member in members.items():
        if is_picture(kind) and not 0 < member.size <= MAX_IMAGE_BYTES:
            name = "an image" if kind == "image" else "a negative image"
            raise ValueError(f"{name} of {member.size} bytes: expected 1 to {MAX_IMAGE_BYTES}")


def fill(content: Content, texts: dict[str, bytes]) -> None:
    """Read the text members into captions, meta and text; what cannot be used is noted."""
    read = read_texts(texts)
    content.captions, content.meta, content.text = read.captions, read.meta, read.text
    content.notes += read.notes
    content.spare = read.spare
