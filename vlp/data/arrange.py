"""From runs of members to samples: which members belong together, wherever they lie in the tar."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from vlp.data.members import (
    MAX_IMAGE_BYTES,
    TEXT_TYPES,
    join_loose_texts,
    join_texts,
    kind_of_guest,
    separate,
)
from vlp.data.rows import Shard
from vlp.data.runs import Members, Run
from vlp.data.tar import Member
from vlp.data.text_files import TEXT_FILES


class Scattered(Exception):
    """The members of some sample do not follow one another."""


def in_order(
    runs: Iterator[Run], file: BinaryIO, shard: Shard, judged: bool
) -> Iterator[tuple[str, Members, bool]]:
    """(key, members, whole) of every sample, as they come; raises Scattered where that does not do.

    judged: digests will tell which samples are whole. Where there are none, nothing is trusted that
    lies beside damage.
    """
    seen: set[str] = set()
    is_text_alone = is_image_bare = False
    for run in runs if judged else _trusted(runs, shard, seen):
        # A key returns: its members lie in several places, or it is there twice.
        if not seen.isdisjoint(run.parts):
            raise Scattered
        seen.update(run.parts)

        alone = len(run.parts) == 1
        parts = run.parts if alone else _separate(run.parts, shard)
        for key, members in parts.items():
            may_be_guest = "." in key and not _complete(members)
            # The one may be the text of the other. What we wrote is never torn apart so.
            if "image" not in members:
                is_text_alone = True
            elif members.keys().isdisjoint(TEXT_FILES):
                is_image_bare = True
            is_loose = is_text_alone and is_image_bare and not judged
            if may_be_guest or is_loose:
                raise Scattered
            yield key, members, alone


def gathered(
    runs: Iterator[Run], file: BinaryIO, shard: Shard, judged: bool
) -> Iterator[tuple[str, Members, bool]]:
    """(key, members, whole) of every sample, wherever in the tar its members lie, in the order of
    their first ones. `judged` as above.
    """
    parts: dict[str, Members] = {}
    in_one_run: set[str] = set()
    suspects: set[str] = set()
    unclear: set[str] = set()
    for run in runs if judged else _trusted(runs, shard, suspects):
        if len(run.parts) == 1 and run.key not in parts:
            in_one_run.add(run.key)
        else:
            in_one_run -= run.parts.keys()

        for key, members in run.parts.items():
            first = parts.setdefault(key, {})
            twice = first.keys() & members.keys()
            if "image" in twice:
                same = read_member(file, first["image"]) == read_member(file, members["image"])
                which = "the same picture" if same else "another picture"
                shard.report(key, f"a second sample of this key: with {which}; the first is kept")
                shard.n_left_out += 1
                continue

            if twice:
                shard.report(key, f"a second text of this key: .{min(twice)}; the first is kept")
            # One of two different texts may be a neighbour's under a damaged name.
            for kind in twice:
                if read_member(file, first[kind]) != read_member(file, members[kind]):
                    unclear.add(key)
            parts[key] = members | first

    # A key's members beside damage may be half of it, and the others the other half.
    for key in suspects & parts.keys():
        del parts[key]
    if not judged:
        for key in sorted(unclear & parts.keys()):
            shard.report(key, "left out: its texts are there twice, with other words")
            shard.n_left_out += 1
            del parts[key]

    for key, members in _separate(parts, shard).items():
        has_joined = members.keys() != parts[key].keys()
        yield key, members, key in in_one_run and not has_joined


def read_member(file: BinaryIO, member: Member) -> bytes:
    """A member's bytes; of more than an image may have, as many as that."""
    file.seek(member.offset)
    return file.read(min(member.size, MAX_IMAGE_BYTES))


def _separate(parts: dict[str, Members], shard: Shard) -> dict[str, Members]:
    """The members by sample; guests, which nobody reads, are counted."""
    parts, n_loose = join_loose_texts(join_texts(parts, _extension))
    for how, n in n_loose.items():
        shard.pass_over(how, n)

    samples, guests = separate(parts)
    for key, host in guests.items():
        for member in parts[key].values():
            shard.pass_over(kind_of_guest(key[len(host) + 1 :], _extension(member)))
    return samples


def _extension(member: Member) -> str:
    return member.name.rpartition(".")[2].lower()


def _complete(members: Members) -> bool:
    return "image" in members and not members.keys().isdisjoint(TEXT_TYPES)


def _trusted(runs: Iterator[Run], shard: Shard, suspects: set[str]) -> Iterator[Run]:
    """The runs that lie beside no damage; the keys of the others, which are left out, go to
    `suspects`.
    """
    for run in runs:
        if not run.suspect:
            yield run
            continue

        shard.report(run.key, "left out: it lies beside damage and may be half a sample")
        shard.n_left_out += 1
        suspects.update(run.parts)
