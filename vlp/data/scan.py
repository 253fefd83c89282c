"""Reading a tar once, from its first header to its last: the samples that it holds, and what is
left out of them.

Consecutive members of one key are a sample. Where a key returns later, or a dotted key such as
x.seg may belong to x, the tar is read again and gathered by key: all pictures first and then all
texts is as good an order as any other.

What is left out is in `Shard.problems` and `Shard.left_out`, never silent: samples without a usable
image, further samples of a key, what lies next to damage, because it might be half a sample, and
every member that no reader looks at. A shard that was written with digests (`vlp.data.digests`) gives
exactly the samples that were written: what is whole beside damage is kept, and any other bytes are
left out, as samples that are missing are.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from vlp.data import digests, tar, wrong_captions
from vlp.data.captions import MAX_TEXT_BYTES, cut, form_of
from vlp.data.members import (
    MAX_IMAGE_BYTES,
    TEXT_TYPES,
    Content,
    Name,
    check_images,
    fill,
    is_guest,
    parse_name,
    separate,
)
from vlp.data.paths import unreadable
from vlp.data.rows import (
    CLASS,
    CONTINUES,
    EXTENT,
    LABELS,
    PICTURED,
    ROW,
    SCATTERED,
    Shard,
    labels_of,
)
from vlp.data.tar import BLOCK, DamagedTar, Member

Members = dict[str, Member]  # of one sample, by kind
_READ = ("image", "negative", *sorted(TEXT_TYPES))  # the kinds of members that make a sample


@dataclass(frozen=True)
class Found:
    """A usable sample of a tar: where its members lie, and what its texts say."""

    content: Content  # without the images' bytes
    members: Members  # the image is among them
    texts: bytes  # of its text members, one after another
    digest: int
    # its members follow one another, with none of another sample between, so that it can be read at
    # once
    whole: bool


# The statistics of a shard name what it was written with; deleting them accepts what it holds now.
_ALTERED = "altered since it was written: its members or their bytes are others; restore the shard"
_UNWRITTEN = (
    "not written with this shard: where the tar was changed on purpose, delete its _stats.json"
)


class _Scattered(Exception):
    """The members of some sample do not follow one another."""


@dataclass
class _Run:
    """Consecutive members of one key, and of keys that may be its guests."""

    key: str
    suspect: bool  # it lies next to damage
    parts: dict[str, Members] = field(default_factory=dict)  # by key
    names: set[str] = field(default_factory=set)


def scan(path: Path) -> Shard:
    """Index one tar; damage costs only the samples beside it. Raises ValueError for what is no tar
    to read from.
    """
    rows: list[_Rows] = []

    def begin(shard: Shard) -> Callable[[Found], None]:
        rows[:] = [_Rows(shard)]
        return rows[0].add

    shard = read(path, begin)
    rows[0].finish()
    return shard


def read(
    path: Path,
    begin: Callable[[Shard], Callable[[Found], None]],
    also: frozenset[str] = frozenset(),
) -> Shard:
    """Give every usable sample of a tar to the function that `begin` returns; the shard tells what
    is left out.

    `begin` is called again, and what it got before is void, where members turn out to be out of
    order. `also`: the extensions of further members to find, which are their kinds. Raises
    ValueError for what is no tar to read from.
    """
    try:
        with open(path, "rb", buffering=1 << 18) as file:
            status = os.fstat(file.fileno())
            shard = Shard(path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            _refuse_packed(path, file)
            try:
                _read(path, file, shard, begin(shard), also, _in_order)
            except _Scattered:
                shard = replace(
                    shard, left_out={}, problems=[], n_left_out=0, n_problems=0, n_damaged=0
                )
                _read(path, file, shard, begin(shard), also, _gathered)
    except IsADirectoryError:
        raise ValueError(
            f"{path} is a folder, not a tar; rename it, or make a tar of what it holds"
        ) from None
    except OSError as error:
        raise ValueError(unreadable(path, error)) from None
    return shard


def _refuse_packed(path: Path, file: BinaryIO) -> None:
    if name := tar.packed_with(file.read(BLOCK)):
        raise ValueError(
            f"{path} is compressed with {name}, but samples are read from any place of a plain tar; unpack it, or write "
            f"plain shards: vlp data reshard {path} --to DIR"
        )


def _read(
    path: Path,
    file: BinaryIO,
    shard: Shard,
    take: Callable[[Found], None],
    also: frozenset[str],
    arrange: Callable[..., Iterator[Any]],
) -> None:
    written = _written(path, shard)
    missing = dict.fromkeys(written or {})
    runs = _runs(file, shard, also)

    for key, members, whole in arrange(runs, file, shard, judged=written is not None):
        missing.pop(key, None)
        found = _found(file, shard, key, members, whole)
        if found is None:
            continue
        if written is not None and found.digest != written.get(key):
            shard.report(key, _ALTERED if key in written else _UNWRITTEN)
            shard.n_left_out += 1
            continue
        take(found)

    for key in missing:
        shard.report(key, f"lost: the shard was written with it ({digests.stats_of(path).name})")
        shard.n_left_out += 1


def _written(path: Path, shard: Shard) -> dict[str, int] | None:
    """The digests that a tar's samples were written with; None where none can be read."""
    try:
        return digests.beside(path)
    except ValueError as error:
        shard.report("", f"samples are not compared with what was written: {error}")
        return None


# --- from headers to samples ---------------------------------------------------------------------------------------------


def _runs(file: BinaryIO, shard: Shard, also: frozenset[str]) -> Iterator[_Run]:
    """The members that count, in runs of one key, in order; the shard learns of damage and of all
    other members.
    """
    file.seek(0)
    kind = "an empty file" if not shard.size else tar.foreign(file.read(BLOCK))
    if kind:
        shard.n_damaged += 1
        shard.report("", f"no tar: it is {kind}")
        return

    run: _Run | None = None
    passed: Counter[str] = Counter()
    position, suspect = 0, False
    while position < shard.size:
        try:
            for member in tar.walk(file, position, shard.size, passed):
                name = _counting(member, also, passed)
                if name is None:
                    continue
                if (
                    run is None
                    or member.name in run.names
                    or not (name.key == run.key or is_guest(name.key, run.key))
                ):
                    if run is not None:
                        yield run
                    run, suspect = _Run(name.key, suspect), False
                members = run.parts.setdefault(name.key, {})
                run.names.add(member.name)
                if name.kind in members:
                    passed[
                        f"further members of a kind that the sample has already: .{name.extension}"
                    ] += 1
                else:
                    members[name.kind] = member
            break
        except DamagedTar as error:
            shard.n_damaged += 1
            shard.report("", f"damage: {error}")
            if run is not None:
                run.suspect = True
                yield run
            run, suspect = None, True
            position = tar.find_header(
                file, error.offset + 1 + (-error.offset - 1) % BLOCK, shard.size
            )
    if run is not None:
        if not _ends(file, shard.size):
            shard.n_damaged += 1
            shard.report(
                "",
                "damage: the file ends without the mark of a tar's end, so its last sample may be half",
            )
            run.suspect = True
        yield run

    if joints := passed.pop("joints", 0):
        shard.report(
            "",
            f"several tars joined in one: tar and webdataset stop before the further {joints}, which are read here",
        )
    for kind, n in passed.items():
        shard.pass_over(kind, n)


def _counting(member: Member, also: frozenset[str], passed: Counter[str]) -> Name | None:
    """The name of a member that counts; of any other, `passed` learns what it is."""
    name = parse_name(member.name)
    if name is not None and name.kind:
        return name
    if name is not None and name.extension in also:
        return name._replace(kind=name.extension)
    if name is not None:
        passed[
            f"members .{name.extension[:12]}" if name.extension else "members without an extension"
        ] += 1
    elif not member.name.endswith("/"):
        passed["hidden files"] += 1
    return None


def _ends(file: BinaryIO, size: int) -> bool:
    """Whether the file ends in the zeros that close a tar; one that was cut between two members
    does not.
    """
    file.seek(max(0, size - BLOCK))
    return file.read() == bytes(BLOCK)


def _in_order(
    runs: Iterator[_Run], file: BinaryIO, shard: Shard, judged: bool
) -> Iterator[tuple[str, Members, bool]]:
    """(key, members, whole) of every sample, as they come; raises _Scattered where that does not
    do.

    judged: digests will tell which samples are whole. Where there are none, nothing is trusted that
    lies beside damage.
    """
    seen: set[str] = set()
    for run in runs if judged else _trusted(runs, shard, seen):
        if not seen.isdisjoint(run.parts):
            raise _Scattered
        seen.update(run.parts)
        alone = len(run.parts) == 1
        parts = run.parts if alone else _separate(run.parts, shard)
        for key, members in parts.items():
            may_be_guest = "." in key and not _complete(members)
            if may_be_guest:
                raise _Scattered
            yield key, members, alone


def _gathered(
    runs: Iterator[_Run], file: BinaryIO, shard: Shard, judged: bool
) -> Iterator[tuple[str, Members, bool]]:
    """(key, members, False) of every sample, wherever in the tar its members lie, in the order of
    their first ones. `judged` as above.
    """
    parts: dict[str, Members] = {}
    unclear: set[str] = set()
    suspects: set[str] = set()
    for run in runs if judged else _trusted(runs, shard, suspects):
        for key, members in run.parts.items():
            first = parts.setdefault(key, {})
            twice = first.keys() & members.keys()
            if "image" in twice:
                same = _bytes(file, first["image"]) == _bytes(file, members["image"])
                which = "the same picture" if same else "another picture"
                shard.report(key, f"a second sample of this key: with {which}; the first is kept")
                shard.n_left_out += 1
                continue
            if twice:
                shard.report(key, f"a second text of this key: .{min(twice)}; the first is kept")
            # One of two different texts may be a neighbour's under a damaged name.
            if any(_bytes(file, first[kind]) != _bytes(file, members[kind]) for kind in twice):
                unclear.add(key)
            parts[key] = members | first

    for key in suspects & parts.keys():
        del parts[key]
    if not judged:
        for key in sorted(unclear & parts.keys()):
            shard.report(key, "left out: its texts are there twice, with other words")
            shard.n_left_out += 1
            del parts[key]
    for key, members in _separate(parts, shard).items():
        yield key, members, False


def _separate(parts: dict[str, Members], shard: Shard) -> dict[str, Members]:
    """The members by sample; guests, which nobody reads, are counted."""
    samples, guests = separate(parts)
    for key, host in guests.items():
        for member in parts[key].values():
            shard.pass_over(f"members {key[len(host) :]}.{member.name.rpartition('.')[2].lower()}")
    return samples


def _complete(members: Members) -> bool:
    return "image" in members and not members.keys().isdisjoint(TEXT_TYPES)


def _trusted(runs: Iterator[_Run], shard: Shard, suspects: set[str]) -> Iterator[_Run]:
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


def _found(file: BinaryIO, shard: Shard, key: str, members: Members, whole: bool) -> Found | None:
    """The sample with its texts read; None, and a problem, where it cannot be used."""
    content = Content(key)
    try:
        check_images(members)
        data = {kind: _bytes(file, members[kind]) for kind in _READ if kind in members}
        texts = {kind: data[kind][: MAX_TEXT_BYTES + 1] for kind in members if kind in TEXT_TYPES}
        fill(content, texts)
    except ValueError as error:
        shard.report(key, str(error))
        shard.n_left_out += 1
        return None

    for note in content.notes:
        shard.report(key, note)
    digest = digests.digest_of({members[kind].name: data[kind] for kind in data})
    return Found(content, members, b"".join(texts.values()), digest, whole)


def _bytes(file: BinaryIO, member: Member) -> bytes:
    """A member's bytes; of more than an image may have, as many as that."""
    file.seek(member.offset)
    return file.read(min(member.size, MAX_IMAGE_BYTES))


# --- from samples to rows ------------------------------------------------------------------------------------------------


class _Rows:
    """The rows of a shard, as its samples are found."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.rows, self.extents = bytearray(), bytearray()
        self.forms: dict[tuple, int] = {}  # each with its number
        self.numbers: dict[tuple, int] = {}  # of the forms before they are cut
        self.keys, self.texts, self.content = (hashlib.sha256() for _ in range(3))
        self.origin: Any = None  # of the last row; None: it has none

    def add(self, found: Found) -> None:
        """One more sample."""
        content, members = found.content, found.members
        meta, before = content.meta, self.origin
        places = _places(found)
        length = sum(size for _, size in places)
        if length > 2 * MAX_IMAGE_BYTES:
            self.shard.report(content.key, f"members spread over too many bytes: {length}")
            self.shard.n_left_out += 1
            return

        self.origin = meta.get("origin")
        flags = CLASS if isinstance(meta.get("class"), str) else 0
        if "negative" in members:
            flags |= PICTURED
        if self.origin is not None and self.origin == before:
            flags |= CONTINUES
        for name in labels_of(meta):
            flags |= LABELS[name]

        form = tuple(form_of(meta, content.text).items())
        number = self.numbers.get(form)
        if number is None:
            kept = tuple(cut(dict(form)).items())
            number = self.numbers[form] = self.forms.setdefault(kept, len(self.forms))
        for problem in wrong_captions.problems(meta, content.captions):
            self.shard.report(content.key, problem)
        counts = []
        for name in wrong_captions.LISTS:
            texts = wrong_captions.read(meta, name, content.captions)
            counts.append(min(texts.most(content.captions), 255))
        start = places[0][0]
        if len(places) > 1:
            flags |= SCATTERED
            start = len(self.extents) // EXTENT.size
            self.extents += b"".join(EXTENT.pack(*place) for place in places)

        self.keys.update(content.key.encode() if not self.rows else b"\n" + content.key.encode())
        self.texts.update(found.texts)
        self.content.update(found.digest.to_bytes(4, "little"))
        self.rows += ROW.pack(start, length, number, found.digest, *counts, flags)

    def finish(self) -> None:
        """Give the shard what was gathered."""
        shard = self.shard
        shard.rows, shard.extents = bytes(self.rows), bytes(self.extents)
        shard.count = len(shard.rows) // ROW.size
        shard.forms = [dict(form) for form in self.forms]
        shard.keys, shard.texts = self.keys.hexdigest(), self.texts.hexdigest()
        shard.content = self.content.hexdigest()


def _places(found: Found) -> list[tuple[int, int]]:
    """(offset, bytes) of a sample's members: one place where they follow one another, with all that
    lies between them.
    """
    members = list(found.members.values())
    if found.whole:
        return [(members[0].start, members[-1].end - members[0].start)]
    places: list[tuple[int, int]] = []
    for member in sorted(members, key=lambda member: member.start):
        if places and sum(places[-1]) == member.start:
            places[-1] = (places[-1][0], member.end - places[-1][0])
        else:
            places.append((member.start, member.end - member.start))
    return places
