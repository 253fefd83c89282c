"""The members of a shard that belong to its samples and that the index passes over: sounds, frames
of a video, numbers of other models.

    KEY.wav, KEY.NAME.wav             a sound; flac, ogg and mp3 as well
    KEY.000.jpg, KEY.001.jpg, …       frames of a video, in the order of their numbers
    KEY.npy, KEY.NAME.npy             numbers

Whose a member is, its name says, wherever in the tar it lies. Its bytes are not part of the
sample's digest: a shard that is packed again with other sounds is to training the same shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vlp import config
from vlp.data import tar
from vlp.data.members import IMAGE_TYPES, SOUND_TYPES, Name, kind_of_guest, parse_name, separate


class Member(NamedTuple):
    """A further member of a sample."""

    infix: str  # what stands between key and extension: audio of KEY.audio.wav, 000 of KEY.000.jpg
    extension: str  # lower case
    offset: int
    size: int

    @property
    def ending(self) -> str:
        """What follows the key."""
        return f".{self.infix}.{self.extension}" if self.infix else f".{self.extension}"

    @property
    def kind(self) -> str:
        """So the index counts it among what it passes over."""
        if self.extension in IMAGE_TYPES:
            return kind_of_guest(self.infix, self.extension)
        # Of KEY.audio.wav it tells as of a .wav.
        return f"members .{self.extension}"

    def read(self, file: BinaryIO) -> bytes:
        """Its bytes, from the opened tar; ValueError where that grew shorter."""
        file.seek(self.offset)
        data = file.read(self.size)
        if len(data) != self.size:
            raise ValueError(
                f"a tar ends before byte {self.offset + self.size}; it changed after it was indexed"
            )
        return data


class OfTar(NamedTuple):
    """What a tar holds besides what the index knows."""

    members: dict[str, list[Member]]  # of the samples by key, in order of their names
    pictures: dict[int, str]  # the keys by the offsets of the samples' pictures
    damage: str  # where and why the rest of the tar could not be read; empty: it was


class Files(NamedTuple):
    """The members of one sample that make a modality, in their order; none: it lacks it."""

    path: str  # of the tar
    members: list[Member]
    # Reads bytes at an offset of the tar as it was opened with the sample; None: it is opened anew.
    # A copy of a remote tar may be cleared away between the sample and its members.
    opened: Callable[[int, int], bytes] | None = None

    def read(self, i: int) -> bytes:
        """Member i; ValueError where the tar grew shorter."""
        member = self.members[i]
        if self.opened is not None:
            return self.opened(member.offset, member.size)
        with open(self.path, "rb") as file:
            return member.read(file)


def of_tar(path: Path) -> OfTar:
    """The further members of a tar's samples, by its headers alone."""
    parts: dict[str, dict[str, tar.Member]] = {}
    named: list[tuple[Name, tar.Member]] = []
    damage = ""
    try:
        with open(path, "rb") as file:
            for member in tar.walk(file, 0, path.stat().st_size):
                name = parse_name(member.name)
                if name is None or not name.extension:
                    continue
                named.append((name, member))
                if name.kind:
                    parts.setdefault(name.key, {}).setdefault(name.kind, member)
    except tar.DamagedTar as error:
        damage = str(error)

    # KEY.000.jpg is a sample where it has a text of its own, and else a frame of KEY.
    samples, _ = separate(parts)
    pictured = {key: kinds["image"].offset for key, kinds in samples.items() if "image" in kinds}
    members: dict[str, list[Member]] = {}
    for name, member in named:
        key, infix = _owner(name.key, pictured)
        # What the index knows: the sample's picture and texts, and pictures of its negatives.
        is_known = bool(name.kind) and (not infix or name.kind != "image")
        if key is None or is_known:
            continue
        of_sample = members.setdefault(key, [])
        of_sample.append(Member(infix, name.extension, member.offset, member.size))
    in_order = {key: sorted(of_sample) for key, of_sample in members.items()}
    return OfTar(in_order, {offset: key for key, offset in pictured.items()}, damage)


def _owner(name: str, keys: dict[str, int]) -> tuple[str | None, str]:
    """The sample that a member belongs to by its name without extension, and what follows its key;
    None: no sample's.
    """
    if name in keys:
        return name, ""
    key, dot, infix = name.rpartition(".")
    return (key, infix) if dot and key in keys else (None, "")


def sound_of(of_sample: list[Member], name: str) -> list[Member]:
    """The sound KEY.NAME.wav of a sample, or its first one where no name is asked for."""
    sounds = [
        member
        for member in of_sample
        if member.extension in SOUND_TYPES and (not name or member.infix == name)
    ]
    return sounds[:1]


def frames_of(of_sample: list[Member]) -> list[Member]:
    """The frames of a sample's video, in order."""
    frames = [
        (int(member.infix), member)
        for member in of_sample
        if member.extension in IMAGE_TYPES and member.infix.isdecimal()
    ]
    # By number: 10 comes after 9.
    return [member for _, member in sorted(frames)]


def carried_of(of_sample: list[Member]) -> list[Member]:
    """Those that some reader looks at, and that a new shard of the sample holds as well: the first
    of each ending.
    """
    by_ending: dict[str, Member] = {}
    for member in of_sample:
        is_frame = member.extension in IMAGE_TYPES and member.infix.isdecimal()
        if is_frame or member.extension in (*SOUND_TYPES, "npy"):
            by_ending.setdefault(member.ending, member)
    return list(by_ending.values())


def members_of(of_sample: list[Member], members: config.Members) -> list[Member]:
    """Those of a sample's members that make a modality, in their order; none: it lacks it."""
    if isinstance(members, config.Frames):
        return frames_of(of_sample)
    return sound_of(of_sample, members.member)


def number_of(key: str) -> int:
    """A number by which a shard's samples are told apart: of a million, two are alike once in ten
    million shards.
    """
    digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
