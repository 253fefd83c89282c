"""The file `_members.bin`: where the members of a folder's samples lie that the index passes over,
sounds, frames and numbers (vlp.data.further_members). Only runs that read such members make it or
open it; the plain index stays small.

    magic | SHA-256 of the header | bytes of the header | header (JSON) | members, by shard

The header names a check sum of the members of each shard and what a start asks of them, so that a
start costs as much as there are shards. The members of a shard are sorted into buckets by the
numbers of their samples' keys, so that a sample's are found by three short readings:

    buckets, members | first member of each bucket, and the end | members, 32 bytes each
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
START = struct.Struct("<I")
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
        members = np.frombuffer(body, MEMBER, offset=COUNTS.size + (n_buckets + 1) * START.size)
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
    buckets = bucket_of(members["number"], n_buckets)
    starts = np.searchsorted(buckets, np.arange(n_buckets + 1)).astype("<u4")
    return COUNTS.pack(n_buckets, len(members)) + starts.tobytes() + members.tobytes()


def bucket_of(number: Any, n_buckets: int) -> Any:
    """Which bucket holds the members of a key's number (or numbers, uint64)."""
    return number >> (65 - n_buckets.bit_length())


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


def save_members(path: Path, shards: Mapping[str, OfShard]) -> None:
    """Write a file, and let the shards leave their members there; raises OSError, ValueError."""
    entries, digests = [], []
    for shard in shards.values():
        n_bytes, digest = len(shard.body), hashlib.sha256(shard.body).hexdigest()
        if shard.stored is not None and not shard.body:
            n_bytes, digest = shard.stored.n_bytes, shard.stored.digest
        entry = {name: value for name, value in asdict(shard).items() if value}
        for name in ("body", "stored"):
            entry.pop(name, None)
        # These may be 0 or empty, and are told all the same.
        always = {name: getattr(shard, name) for name in _IDENTITY}
        entries.append({**entry, **always, "n_bytes": n_bytes, "digest": digest})
        digests.append(digest)

    encoded = json.dumps({"extensions": EXTENSIONS, "shards": entries}).encode()
    bodies = ([_body_of(shard)] for shard in shards.values())
    head, extents = write(path, framed(_MAGIC, encoded), bodies)

    # Only where the file is complete.
    place = os.fspath(path)
    for shard, digest, (offset, n_bytes) in zip(shards.values(), digests, extents):
        shard.body, shard.stored = b"", Stored(place, head, offset, n_bytes, 0, digest)
    opened(place, head, again=True)


def _body_of(shard: OfShard) -> bytes:
    # Unchecked: a damaged body keeps its check sum, and is noticed when it is read.
    if shard.body or shard.stored is None:
        return shard.body
    stored = shard.stored
    return opened(stored.path, stored.head).read(stored.offset, stored.n_bytes)
