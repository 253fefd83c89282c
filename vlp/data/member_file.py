"""The file `_members.bin`: where the members of a folder's samples lie that the index passes over,
sounds, frames and numbers (vlp.data.further_members). Only runs that read such members make it or
open it; the plain index stays small.

    magic | SHA-256 of the header | bytes of the header | header (JSON) | members, by shard

The header names a check sum of the members of each shard and what a start asks of them, so that a
start costs as much as there are shards. The members of a shard are sorted into buckets by the
numbers of their samples' keys, so that a sample's are found by three short readings. Each bucket
has a check sum of its own: nobody reads a whole shard's members for a few of its samples.

    buckets, members | first member and check sum of each bucket, and the end | members of 32 bytes
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlp import config, log
from vlp.data.further_members import Member, frames_of, number_of, of_tar
from vlp.data.index_file import checked, framed, opened, read_header, write
from vlp.data.members import FRAMES, IMAGE_TYPES, SOUND_TYPES
from vlp.data.rows import Shard, Stored, of_modalities

NAME = "_members.bin"
_MAGIC = b"vlp shard members 1\n"
EXTENSIONS = (*SOUND_TYPES, "npy", *sorted(IMAGE_TYPES))
FRAME, SOUND, NUMBERS = range(3)
MEMBER = np.dtype([
    ("number", "<u8"),  # of the sample's key
    ("offset", "<u8"),
    ("size", "<u8"),
    ("infix", "<u4"),  # number of what stands between key and extension
    ("kind", "u1"),
    ("extension", "u1"),  # its place in EXTENSIONS
    ("unused", "<u2"),
])  # fmt: skip
COUNTS = struct.Struct("<II")  # buckets, a power of two, and members
BUCKET = np.dtype([("first", "<u4"), ("checksum", "<u4")])
_A_BUCKET = 4  # samples, about
# Names of sounds in a shard that its header counts; of a shard with more its members are read.
_NAMES = 32
_IDENTITY = ("size", "mtime_ns", "ctime_ns", "order")


@dataclass
class OfShard:
    """What is known of the members of a tar's samples."""

    name: str
    # Those of the shard in the index, and the digest of its samples' places.
    size: int
    mtime_ns: int
    ctime_ns: int
    order: str
    # Samples with frames, and the extensions of these.
    n_with_frames: int = 0
    frames: list[str] = field(default_factory=list)
    # How many samples' sound by a name has an extension; "": their first sound by any name.
    sounds: dict[str, dict[str, int]] = field(default_factory=dict)
    has_further_names: bool = False  # of sounds, which are not counted
    damage: str = ""  # where and why the rest of the tar could not be read
    body: bytes = b""  # empty where it lies in a file
    stored: Stored | None = field(default=None, compare=False)

    def fits(self, shard: Shard) -> bool:
        """Whether it is of the tar that the index knows."""
        own = (self.size, self.mtime_ns, self.ctime_ns)
        return own == (shard.size, shard.mtime_ns, shard.ctime_ns) and self.order == shard.order

    def fits_elsewhere(self, shard: Shard) -> bool:
        """As `fits`, of a tar in a store, whose times are those of another machine."""
        return self.size == shard.size and self.order == shard.order

    def counted(self, wanted: config.Members) -> Mapping[str, int]:
        """How many samples have the member that makes a modality, by its extension; of frames each
        extension has them all.
        """
        if isinstance(wanted, config.Frames):
            return dict.fromkeys(self.frames, self.n_with_frames)
        if wanted.member in self.sounds or not self.has_further_names:
            return self.sounds.get(wanted.member, {})
        return self._counted_by_members(wanted.member)

    def _counted_by_members(self, name: str) -> dict[str, int]:
        body = self.body
        if self.stored is not None and not body:
            body = checked(opened(self.stored.path, self.stored.head), self.stored)
        n_buckets, _ = COUNTS.unpack_from(body)
        members = np.frombuffer(body, MEMBER, offset=_begin(n_buckets))
        sounds = members[(members["kind"] == SOUND) & (members["infix"] == number_of_infix(name))]
        # The first of each sample's.
        _, first = np.unique(sounds["number"], return_index=True)
        places, counts = np.unique(sounds["extension"][first], return_counts=True)
        return {EXTENSIONS[place]: n for place, n in zip(places.tolist(), counts.tolist())}


def may_have(shard: Shard) -> bool:
    """Whether a shard may hold members of modalities, by what its index passed over."""
    is_sure = not shard.n_damaged and "of further kinds" not in shard.left_out
    return bool(of_modalities(shard.left_out)) or not is_sure


def of_shard(path: Path, shard: Shard) -> OfShard:
    """Find the members of the tar at `path`, by its headers alone."""
    found = of_tar(path)
    rows: list[tuple[int, ...]] = []
    result = OfShard(shard.name, shard.size, shard.mtime_ns, shard.ctime_ns, shard.order)
    result.damage = found.damage
    for key, of_sample in found.members.items():
        number = unsigned_number_of(key)
        frames = frames_of(of_sample)
        sounds = [member for member in of_sample if member.extension in SOUND_TYPES]
        numbers = [member for member in of_sample if member.extension == "npy"]
        for kind, members in ((FRAME, frames), (SOUND, sounds), (NUMBERS, numbers)):
            rows += [_row(number, kind, member) for member in members]
        _count(result, frames, sounds)

    result.body = _body(np.array(rows, MEMBER), len(found.members))
    return result


def _row(number: int, kind: int, member: Member) -> tuple[int, ...]:
    place = EXTENSIONS.index(member.extension)
    infix = number_of_infix(member.infix)
    return number, member.offset, member.size, infix, kind, place, 0


def _count(result: OfShard, frames: list[Member], sounds: list[Member]) -> None:
    """Note what one more sample has."""
    if frames:
        result.n_with_frames += 1
        extensions = {member.extension for member in frames}
        result.frames = sorted(extensions.union(result.frames))

    by_name = {member.infix: member.extension for member in reversed(sounds)}
    if sounds:
        by_name[""] = sounds[0].extension  # whatever its name
    for name, extension in by_name.items():
        # A hostile tar may hold a million.
        if name and name not in result.sounds and len(result.sounds) >= _NAMES:
            result.has_further_names = True
            continue
        counts = result.sounds.setdefault(name, {})
        counts[extension] = counts.get(extension, 0) + 1


def _body(members: np.ndarray, n_samples: int) -> bytes:
    """The members of a shard as they are stored; those of a sample stay in their order."""
    n_buckets = 2
    while n_buckets * _A_BUCKET < n_samples:
        n_buckets *= 2
    members = members[np.argsort(members["number"], kind="stable")]
    buckets = np.zeros(n_buckets + 1, BUCKET)
    numbers = _bucket_of(members["number"], n_buckets)
    buckets["first"] = np.searchsorted(numbers, np.arange(n_buckets + 1))

    counts, data = COUNTS.pack(n_buckets, len(members)), members.tobytes()
    ends = (buckets["first"].astype(int) * MEMBER.itemsize).tolist()
    for place, (first, end) in enumerate(pairwise(ends)):
        buckets["checksum"][place] = _checksum(counts, place, data[first:end])
    return counts + buckets.tobytes() + data


def _checksum(counts: bytes, place: int, members: bytes) -> int:
    """Of a bucket, and of what leads to it."""
    return zlib.crc32(members, zlib.crc32(counts, place))


def _begin(n_buckets: int) -> int:
    """Where the members begin, behind their buckets."""
    return COUNTS.size + (n_buckets + 1) * BUCKET.itemsize


def members_of_key(read: Callable[[int, int], bytes], key: str) -> np.ndarray:
    """The members of the sample `key`, [m] MEMBER, from the bytes of a shard's that `read` gives by
    offset and number; ValueError where they are damaged.
    """
    number = unsigned_number_of(key)
    counts = read(0, COUNTS.size)
    n_buckets, n_members = COUNTS.unpack(counts)
    place = _bucket_of(number, n_buckets)

    two = read(COUNTS.size + place * BUCKET.itemsize, 2 * BUCKET.itemsize)
    (first, checksum), (end, _) = np.frombuffer(two, BUCKET).tolist()
    if not first <= end <= n_members:
        raise ValueError("a bucket of members lies nowhere")

    data = read(_begin(n_buckets) + first * MEMBER.itemsize, (end - first) * MEMBER.itemsize)
    if _checksum(counts, place, data) != checksum:
        raise ValueError("a bucket of members is damaged")
    members = np.frombuffer(data, MEMBER)
    return members[members["number"] == number]


def _bucket_of(number: Any, n_buckets: int) -> Any:
    """Which bucket holds the members of a key's number (or numbers, uint64); ValueError for a
    number of buckets that is damaged.
    """
    shift = 65 - n_buckets.bit_length()
    if not 0 < shift < 64:
        raise ValueError(f"{n_buckets} buckets of members")
    return number >> shift


def unsigned_number_of(key: str) -> int:
    """As `number_of`, as it is stored here."""
    return number_of(key) % (1 << 64)


def number_of_infix(infix: str) -> int:
    """A number by which the sounds of a sample are told apart."""
    return number_of(infix) % (1 << 32)


def is_of_modality(wanted: config.Members, members: np.ndarray) -> np.ndarray:
    """Those of a sample's members that make a modality, in their order."""
    if isinstance(wanted, config.Frames):
        return members[members["kind"] == FRAME]
    sounds = members[members["kind"] == SOUND]
    if wanted.member:
        sounds = sounds[sounds["infix"] == number_of_infix(wanted.member)]
    return sounds[:1]


def kinds_of(wanted: config.Members, extensions: Collection[str]) -> set[str]:
    """So the index counts members of these extensions among what it passes over."""
    before = f"members .{FRAMES}." if isinstance(wanted, config.Frames) else "members ."
    return {f"{before}{extension}" for extension in extensions}


# --- the file ------------------------------------------------------------------------------------


def open_members(path: Path) -> dict[str, OfShard]:
    """What a file says of shards, by name; their members stay there. Raises OSError, ValueError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("it starts with other bytes")
        try:
            shards = _read(file, size, os.fspath(path))
        except (TypeError, KeyError, IndexError, RecursionError, AttributeError) as error:
            raise ValueError(f"its header is none ({type(error).__name__})") from None

    # Kept open from now on, because another process may replace it.
    for shard in shards.values():
        if shard.stored is not None:
            opened(shard.stored.path, shard.stored.head, again=True)
            break
    return shards


def usable_members(path: Path) -> dict[str, OfShard]:
    """As `open_members` of a copy, or of what was made here; empty where there is none, or one that
    is of no use, which is removed.
    """
    try:
        return open_members(path)
    except OSError:
        return {}
    except ValueError as error:
        log.warn(f"{path} is not usable ({error}); what it says is found anew")
        path.unlink(missing_ok=True)
        return {}


def _read(file: Any, size: int, path: str) -> dict[str, OfShard]:
    head, header = read_header(file, size)
    if header["extensions"] != list(EXTENSIONS):
        raise ValueError("it knows members of other extensions")

    position = file.tell()
    shards = {}
    for entry in header["shards"]:
        stored = Stored(path, head, position, entry.pop("n_bytes"), 0, entry.pop("digest"))
        shards[entry["name"]] = OfShard(**entry, stored=stored)
        position += stored.n_bytes
    if position != size:
        raise ValueError(f"it has {size} bytes instead of {position}")
    return shards


class Body(NamedTuple):
    """What the header says of the members of a shard."""

    n_bytes: int
    digest: str  # SHA-256, in hex


def save_members(path: Path, shards: Mapping[str, OfShard]) -> None:
    """Write a file, and let the shards leave their members there; raises OSError, ValueError."""
    said = []
    for shard in shards.values():
        if shard.stored is not None and not shard.body:
            said.append(Body(shard.stored.n_bytes, shard.stored.digest))
        else:
            said.append(Body(len(shard.body), hashlib.sha256(shard.body).hexdigest()))

    bodies = ([_body_of(shard)] for shard in shards.values())
    head, extents = write(path, header(list(shards.values()), said), bodies)

    # Only where the file is complete.
    place = os.fspath(path)
    for shard, of_one, (offset, n_bytes) in zip(shards.values(), said, extents):
        shard.body, shard.stored = b"", Stored(place, head, offset, n_bytes, 0, of_one.digest)
    opened(place, head, again=True)


def header(shards: Sequence[OfShard], bodies: Sequence[Body]) -> bytes:
    """The beginning of a file, up to the members of the first shard."""
    entries = []
    for shard, body in zip(shards, bodies, strict=True):
        entry = {name: value for name, value in vars(shard).items() if value}
        entry = {name: value for name, value in entry.items() if name not in ("body", "stored")}
        # These may be 0 or empty, and are told all the same.
        identity = {name: getattr(shard, name) for name in _IDENTITY}
        entries.append({**entry, **identity, **body._asdict()})
    return framed(_MAGIC, json.dumps({"extensions": EXTENSIONS, "shards": entries}).encode())


def _body_of(shard: OfShard) -> bytes:
    # Unchecked: a damaged body keeps its check sum, and is noticed when it is read.
    if shard.body or shard.stored is None:
        return shard.body
    stored = shard.stored
    return opened(stored.path, stored.head).read(stored.offset, stored.n_bytes)
