"""The members of a shard that belong to its samples and that training's reader passes over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vlp.data.members import parse_name
from vlp.data.tar import DamagedTar, walk


class Member(NamedTuple):
    """A member of a sample."""

    infix: str  # what stands between key and extension: audio of KEY.audio.wav, 000 of KEY.000.jpg
    extension: str  # lower case
    offset: int
    size: int

    def read(self, file: BinaryIO) -> bytes:
        file.seek(self.offset)
        return file.read(self.size)


def of_keys(path: Path, keys: Sequence[str], counts: Counter[str]) -> dict[str, list[Member]]:
    """The members of samples by key, in order of their names; counts a damaged tar."""
    wanted = set(keys)
    members: dict[str, list[Member]] = {}
    try:
        with open(path, "rb") as file:
            for member in walk(file, 0, path.stat().st_size):
                name = parse_name(member.name)
                if name is None or not name.extension:
                    continue
                key, infix = _split(name.key, wanted)
                if key is None:
                    continue
                of_sample = members.setdefault(key, [])
                of_sample.append(Member(infix, name.extension, member.offset, member.size))
    except DamagedTar as error:
        counts[f"unreadable: members after damage ({error})"] += 1
    return {key: sorted(of_sample) for key, of_sample in members.items()}


def _split(name: str, keys: set[str]) -> tuple[str | None, str]:
    """The sample that a member belongs to by its name without extension, and what follows its key;
    None: no sample's.
    """
    if name in keys:
        return name, ""
    key, dot, infix = name.rpartition(".")
    return (key, infix) if dot and key in keys else (None, "")
