"""Ways in which the bytes of a tar get damaged or mixed up, for tests: `KINDS`, by name.

Each is a function (tar, its members, a random generator) -> the bytes of the damaged tar.
"""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable
from typing import NamedTuple

BLOCK = 512


class Part(NamedTuple):
    """A member of the tar before it is damaged: header and data, in whole blocks."""

    name: str
    start: int
    data: int
    end: int


Mutation = Callable[[bytes, list[Part], random.Random], bytes]


def parts_of(tar: bytes) -> list[Part]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        return [
            Part(m.name, m.offset, m.offset_data, m.offset_data + -(-m.size // BLOCK) * BLOCK)
            for m in file.getmembers()
        ]


def block_in(tar: bytes, chance: random.Random) -> int:
    """The position of some block."""
    return chance.randrange(len(tar) // BLOCK) * BLOCK


def overwritten(length: int, aligned: bool, zero: bool = False) -> Mutation:
    def mutate(tar: bytes, parts: list[Part], chance: random.Random) -> bytes:
        at = block_in(tar, chance) if aligned else chance.randrange(len(tar))
        patch = bytes(length) if zero else chance.randbytes(length)
        return (tar[:at] + patch + tar[at + length :])[: len(tar)]

    return mutate


def cut_out(length: int, aligned: bool) -> Mutation:
    def mutate(tar: bytes, parts: list[Part], chance: random.Random) -> bytes:
        at = block_in(tar, chance) if aligned else chance.randrange(len(tar))
        return tar[:at] + tar[at + length :]

    return mutate


def inserted(length: int, aligned: bool, zero: bool = False) -> Mutation:
    def mutate(tar: bytes, parts: list[Part], chance: random.Random) -> bytes:
        at = block_in(tar, chance) if aligned else chance.randrange(len(tar))
        return tar[:at] + (bytes(length) if zero else chance.randbytes(length)) + tar[at:]

    return mutate


def bit_flipped(tar: bytes, parts: list[Part], chance: random.Random) -> bytes:
    damaged = bytearray(tar)
    damaged[chance.randrange(len(tar))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def block_repeated(tar: bytes, parts: list[Part], chance: random.Random) -> bytes:
    at = block_in(tar, chance)
    return tar[:at] + tar[at : at + BLOCK] + tar[at:]


def block_copied_over_another(tar: bytes, parts: list[Part], chance: random.Random) -> bytes:
    source, target = block_in(tar, chance), block_in(tar, chance)
    return tar[:target] + tar[source : source + BLOCK] + tar[target + BLOCK :]


def blocks_exchanged(tar: bytes, parts: list[Part], chance: random.Random) -> bytes:
    a, b = sorted((block_in(tar, chance), block_in(tar, chance)))
    if a == b:
        return tar
    first, second = tar[a : a + BLOCK], tar[b : b + BLOCK]
    return tar[:a] + second + tar[a + BLOCK : b] + first + tar[b + BLOCK :]


def two_of_a_kind(parts: list[Part], chance: random.Random) -> list[Part]:
    """Two members of different samples with the same extension, in order."""
    kind = chance.choice(["png", "txt", "json"])
    return sorted(chance.sample([part for part in parts if part.name.endswith(kind)], 2))


def headers_exchanged(tar: bytes, parts: list[Part], chance: random.Random) -> bytes:
    a, b = (part.start for part in two_of_a_kind(parts, chance))
    first, second = tar[a : a + BLOCK], tar[b : b + BLOCK]
    if a > b:
        a, b, first, second = b, a, second, first
    return tar[:a] + second + tar[a + BLOCK : b] + first + tar[b + BLOCK :]


def header_copied(tar: bytes, parts: list[Part], chance: random.Random) -> bytes:
    source, target = (part.start for part in two_of_a_kind(parts, chance))
    return tar[:target] + tar[source : source + BLOCK] + tar[target + BLOCK :]


def data_exchanged(tar: bytes, parts: list[Part], chance: random.Random) -> bytes:
    """The texts of two samples, each with the other's length."""
    a, b = sorted(chance.sample([part for part in parts if not part.name.endswith("png")], 2))
    if a.data > b.data:
        a, b = b, a
    first, second = tar[a.data : a.data + BLOCK], tar[b.data : b.data + BLOCK]
    return tar[: a.data] + second + tar[a.end : b.data] + first + tar[b.end :]


def rewritten(tar: bytes, at: int, **fields: bytes) -> bytes:
    """A header with other fields and the check sum that fits them."""
    places = {"name": (0, 100), "size": (124, 12)}
    header = bytearray(tar[at : at + BLOCK])
    for name, value in fields.items():
        start, length = places[name]
        header[start : start + length] = value.ljust(length, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return tar[:at] + bytes(header) + tar[at + BLOCK :]


def member_renamed(tar: bytes, parts: list[Part], chance: random.Random) -> bytes:
    part, other = two_of_a_kind(parts, chance)
    return rewritten(tar, part.start, name=other.name.encode())


def member_hidden(tar: bytes, parts: list[Part], chance: random.Random) -> bytes:
    part = chance.choice(parts)
    return rewritten(tar, part.start, name=part.name.rpartition(".")[0].encode() + b".npy")


def size_changed(tar: bytes, parts: list[Part], chance: random.Random) -> bytes:
    part = chance.choice(parts)
    return rewritten(tar, part.start, size=b"%011o" % chance.randrange(1500))


def member_dropped(tar: bytes, parts: list[Part], chance: random.Random) -> bytes:
    part = chance.choice(parts)
    return tar[: part.start] + tar[part.end :]


def member_doubled(tar: bytes, parts: list[Part], chance: random.Random) -> bytes:
    part, place = chance.choice(parts), chance.choice(parts)
    return tar[: place.start] + tar[part.start : part.end] + tar[place.start :]


def members_shuffled(tar: bytes, parts: list[Part], chance: random.Random) -> bytes:
    order = chance.sample(parts, len(parts))
    members = b"".join(tar[part.start : part.end] for part in order)
    return tar[: parts[0].start] + members + tar[parts[-1].end :]


def cut_off(tar: bytes, parts: list[Part], chance: random.Random) -> bytes:
    return tar[: chance.randrange(1, parts[-1].end)]


def cut_off_at_a_block(tar: bytes, parts: list[Part], chance: random.Random) -> bytes:
    return tar[: chance.randrange(1, parts[-1].end // BLOCK) * BLOCK]


def joined_with_itself(tar: bytes, parts: list[Part], chance: random.Random) -> bytes:
    return tar + tar


KINDS: dict[str, Mutation] = {
    "a bit flipped": bit_flipped,
    "8 bytes overwritten": overwritten(8, aligned=False),
    "100 bytes overwritten": overwritten(100, aligned=False),
    "a block overwritten": overwritten(BLOCK, aligned=True),
    "3,000 bytes overwritten": overwritten(3000, aligned=False),
    "100 bytes of zeros": overwritten(100, aligned=False, zero=True),
    "a block of zeros": overwritten(BLOCK, aligned=True, zero=True),
    "eight blocks of zeros": overwritten(8 * BLOCK, aligned=True, zero=True),
    "a byte cut out": cut_out(1, aligned=False),
    "a block cut out": cut_out(BLOCK, aligned=True),
    "six blocks cut out": cut_out(6 * BLOCK, aligned=True),
    "100 bytes inserted": inserted(100, aligned=False),
    "a block inserted": inserted(BLOCK, aligned=True),
    "two blocks of zeros inserted": inserted(2 * BLOCK, aligned=True, zero=True),
    "a block repeated": block_repeated,
    "a block copied over another": block_copied_over_another,
    "two blocks exchanged": blocks_exchanged,
    "two headers exchanged": headers_exchanged,
    "a header copied": header_copied,
    "two texts exchanged": data_exchanged,
    "a member renamed": member_renamed,
    "a member hidden": member_hidden,
    "a size changed": size_changed,
    "a member dropped": member_dropped,
    "a member doubled": member_doubled,
    "members shuffled": members_shuffled,
    "cut off": cut_off,
    "cut off at a block": cut_off_at_a_block,
    "joined with itself": joined_with_itself,
}
